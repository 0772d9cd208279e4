"""RatioTrial: one prompt batch under one ratio triple, in an actor that keeps its replica."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray import tune

from crdiff_core.numerics import make_reproducible

# torch and all that needs it are imported by the first step: see RatioTrial.
if TYPE_CHECKING:
    from crdiff_core.models import Model
    from crdiff_core.prompts import PromptSet
    from crdiff_core.ratios import Resolution


@dataclass(frozen=True)
class TrialSetup:
    """All that an actor needs to draw and score, sent to it once.

    revision:          of the model's weights as the driver sees them.
    size_conditioning: what SDXL is told of a picture's size; None: the resolution.
    negative_prompt:   what guidance leads away from; None: the pipeline's own.
    reward_options:    of `crdiff_core.rewards.load_reward`, and the version they give the driver.
    device:            auto, cpu or cuda.
    num_threads:       CPU threads for torch.
    """

    model: Model
    revision: str
    resolution: Resolution
    num_steps: int
    guidance_scale: float
    poa_weight: float
    size_conditioning: Resolution | None
    negative_prompt: str | None
    compile: str
    reward: str
    reward_options: Mapping[str, Any]
    reward_version: str
    prompt_sets: Mapping[str, PromptSet]
    device: str
    num_threads: int


class RatioTrial(tune.Trainable):  # type: ignore[misc]
    """A trial is (ratios, prompt batch); its result is the rewards of the batch.

    Ray reuses the actor for every trial, so the model is loaded once and a trial changes four
    numbers. What goes wrong is reported as `failure`, never as a reward; `transient` says
    whether another try could help.

    The first step loads the model, so that an actor starts at once. While one starts, Ray takes
    the trial that it is meant for to any actor that is free by then, and gives up on the new one:
    with a slower start no second worker would ever begin beside one that is at work.
    """

    def setup(self, config: dict[str, Any], setup: bytes) -> None:
        """Take the pickled TrialSetup."""
        self._setup = setup
        self._is_loaded = False
        self._broken: str | None = None

    def _load(self) -> None:
        make_reproducible()  # A remote worker does not inherit the driver's environment.
        import torch

        from crdiff_core.errors import CRDiffError, ModelError, RewardError
        from crdiff_core.replica import Replica, choose_device
        from crdiff_core.rewards import load_reward

        self._is_loaded = True
        setup: TrialSetup = pickle.loads(self._setup)
        torch.set_num_threads(setup.num_threads)
        self._prompts = {name: each.prompts for name, each in setup.prompt_sets.items()}
        try:
            if setup.model.revision != setup.revision:
                raise ModelError(
                    f"{setup.model.folder} on this node is revision {setup.model.revision}, not "
                    f"the driver's {setup.revision}: give every node the same weights"
                )
            self._replica = Replica(
                setup.model.load(choose_device(setup.device)),
                setup.resolution,
                num_steps=setup.num_steps,
                guidance_scale=setup.guidance_scale,
                poa_weight=setup.poa_weight,
                size_conditioning=setup.size_conditioning,
                negative_prompt=setup.negative_prompt,
                compile=setup.compile,
            )
            self._reward = load_reward(setup.reward, **setup.reward_options)
            if self._reward.version != setup.reward_version:
                raise RewardError(
                    f"reward {setup.reward} on this node is version {self._reward.version}, not "
                    f"the driver's {setup.reward_version}: give every node the same weights"
                )
        except CRDiffError as error:
            self._broken = str(error)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial; the loaded replica stays."""
        return True

    def step(self) -> dict[str, Any]:
        """Prune, draw and score one prompt batch."""
        if not self._is_loaded:
            self._load()
        from crdiff_core.errors import CRDiffError
        from crdiff_core.evaluation import evaluate
        from crdiff_core.ratios import BlockRatios, Resolution

        if self._broken is not None:
            return {"failure": self._broken, "transient": False, "done": True}
        ratios = BlockRatios(**self.config["ratios"])
        numbered = self._prompts[self.config["prompts"]]
        prompts = [numbered[number] for number in self.config["batch"]]
        try:
            self._replica.poa_weight = self.config["poa_weight"]
            drawn_at = self.config["drawn_at"]
            measured = evaluate(
                self._replica,
                ratios,
                prompts,
                self._reward,
                drawn_at=None if drawn_at == "requested" else Resolution.parse(drawn_at),
                keep=self.config["keep"],
            )
        except CRDiffError as error:
            return {"failure": str(error), "transient": False, "done": True}
        except Exception as error:  # Whatever it is, the search goes on without this batch.
            if not self._replica.is_usable():
                raise  # Ray then starts another worker.
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            return {"failure": reason, "transient": True, "done": True}
        return {"measured": measured, "done": True}

    def cleanup(self) -> None:
        """Free the replica."""
        if self._is_loaded and self._broken is None:
            self._replica.close()
