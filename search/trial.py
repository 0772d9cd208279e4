"""RatioTrial: one prompt batch under one ratio triple, in an actor that keeps its replica."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray import tune

from crdiff_core.errors import CRDiffError, ModelError
from crdiff_core.models import Model
from crdiff_core.prompts import PromptSet
from crdiff_core.ratios import BlockRatios, Resolution


@dataclass(frozen=True)
class TrialSetup:
    """All that an actor needs to draw and score, sent to it once.

    revision:    of the model's weights as the driver sees them.
    device:      auto, cpu or cuda.
    num_threads: CPU threads for torch.
    """

    model: Model
    revision: str
    resolution: Resolution
    num_steps: int
    guidance_scale: float
    poa_weight: float
    reward: str
    prompt_sets: Mapping[str, PromptSet]
    batch_size: int
    device: str
    num_threads: int


class RatioTrial(tune.Trainable):  # type: ignore[misc]
    """A trial is (ratios, prompt batch); its result is the rewards of the batch.

    Ray reuses the actor for every trial, so the model is loaded once and a trial changes three
    numbers. What goes wrong is reported as `failure`, never as a reward; `transient` says
    whether another try could help.
    """

    def setup(self, config: dict[str, Any], setup: TrialSetup) -> None:
        """Load the model and the reward."""
        import torch

        from crdiff_core.replica import Replica, choose_device
        from crdiff_core.rewards import load_reward

        torch.set_num_threads(setup.num_threads)
        self._broken: str | None = None
        self._batches = {
            name: prompts.batches(setup.batch_size) for name, prompts in setup.prompt_sets.items()
        }
        try:
            if setup.model.revision != setup.revision:
                raise ModelError(
                    f"{setup.model.folder} on this node is revision {setup.model.revision}, not "
                    f"the driver's {setup.revision}: give every node the same weights"
                )
            self._replica = Replica(
                setup.model,
                setup.resolution,
                num_steps=setup.num_steps,
                guidance_scale=setup.guidance_scale,
                poa_weight=setup.poa_weight,
                device=choose_device(setup.device),
            )
            self._reward = load_reward(setup.reward)
        except CRDiffError as error:
            self._broken = str(error)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial; the loaded replica stays."""
        return True

    def step(self) -> dict[str, Any]:
        """Prune, draw and score one prompt batch."""
        from crdiff_core.evaluation import evaluate

        if self._broken is not None:
            return {"failure": self._broken, "transient": False, "done": True}
        ratios = BlockRatios(**self.config["ratios"])
        prompts = self._batches[self.config["prompts"]][self.config["batch"]]
        try:
            measured = evaluate(self._replica, ratios, prompts, self._reward)
        except CRDiffError as error:
            return {"failure": str(error), "transient": False, "done": True}
        except Exception as error:  # Whatever it is, the search goes on without this batch.
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            return {"failure": reason, "transient": True, "done": True}
        return {"measured": measured, "done": True}

    def cleanup(self) -> None:
        """Free the replica."""
        if self._broken is None:
            self._replica.close()
