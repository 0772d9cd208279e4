"""RatioTrial: one prompt batch under one ratio triple, in an actor that keeps its replica."""

from __future__ import annotations

import pickle
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray import tune

from crdiff_core.numerics import make_reproducible

# torch and all that needs it are imported by the first step: see RatioTrial.
if TYPE_CHECKING:
    from crdiff_core.models import Model
    from crdiff_core.prompts import Prompt, PromptSet
    from crdiff_core.ratios import Resolution

# Seconds between two signs of life of a worker that is not used.
_IDLE_S = 2.0


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
    with a slower start no second worker would ever begin beside one that is at work. It reports
    the worker's pace, and the next step draws the batch.

    A batch is drawn in one forward pass or not at all: in parts it would have other digits. Where
    the memory is too small for it, the trial reports `num_fit` and idles until the search ends,
    so that Ray gives its GPU to nobody else of the search.
    """

    def setup(self, config: dict[str, Any], setup: bytes) -> None:
        """Take the pickled TrialSetup."""
        self._setup = setup
        self._is_loaded = False
        self._is_unfit = False
        self._broken: str | None = None
        # Largest batch drawn here so far.
        self._num_drawn = 0

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
            return
        self._no_limit = self._replica.batch_limit
        device = self._replica.device
        self._drawn_by = {
            "device": torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else f"cpu {torch.backends.cpu.get_cpu_capability()}",
            "torch": torch.__version__,
            "compile": setup.compile,
        }

    def _warm_up(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Score and draw a batch of one step: it loads the reward, and compiles.

        So it shows what fits, and what a picture takes.
        """
        import torch

        from crdiff_core.errors import RenderError, TooLittleMemoryError
        from crdiff_core.evaluation import score
        from crdiff_core.ratios import GROUPS, BlockRatios

        replica = self._replica
        size = replica.resolution
        pictures = torch.rand(len(prompts), 3, size.height, size.width, device=replica.device)
        score(replica, self._reward, pictures, [prompt.text for prompt in prompts])
        del pictures
        replica.set_ratios(BlockRatios(**dict.fromkeys(GROUPS, 0.3)))
        num_steps, replica.num_steps = replica.num_steps, 1
        began_s = 0.0
        try:
            for _ in range(1 if self._drawn_by["compile"] == "none" else 2):
                began_s = time.monotonic()
                replica.render(prompts)
        except TooLittleMemoryError:
            return self._unfit(0)
        except RenderError:
            pass  # Of one step it is no picture.
        finally:
            replica.num_steps = num_steps
        num_fit = self._take_limit()
        if num_fit < len(prompts):
            return self._unfit(num_fit)
        return {"picture_s": (time.monotonic() - began_s) * num_steps / len(prompts)}

    def _take_limit(self) -> int:
        """Return how many pictures memory let the replica draw at once, and forget it."""
        limit, self._replica.batch_limit = self._replica.batch_limit, self._no_limit
        return limit

    def _unfit(self, num_fit: int) -> dict[str, Any]:
        self._is_unfit = True
        return {"num_fit": num_fit, "device": self._drawn_by["device"]}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial; the loaded replica stays."""
        return True

    def step(self) -> dict[str, Any]:
        """Load the model, or prune, draw and score one prompt batch."""
        if self._is_unfit:
            time.sleep(_IDLE_S)
            return {"is_idle": True}
        is_first = not self._is_loaded
        if is_first:
            self._load()
        from crdiff_core.errors import CRDiffError, TooLittleMemoryError
        from crdiff_core.evaluation import evaluate
        from crdiff_core.ratios import BlockRatios, Resolution

        if self._broken is not None:
            return {"failure": self._broken, "transient": False, "done": True}
        ratios = BlockRatios(**self.config["ratios"])
        numbered = self._prompts[self.config["prompts"]]
        prompts = [numbered[number] for number in self.config["batch"]]
        is_new = len(prompts) > self._num_drawn
        drawn_at = self.config["drawn_at"]
        try:
            if is_first:
                return self._warm_up(prompts)
            self._replica.poa_weight = self.config["poa_weight"]
            self._take_limit()  # A batch that failed may have left one.
            measured = evaluate(
                self._replica,
                ratios,
                prompts,
                self._reward,
                drawn_at=None if drawn_at == "requested" else Resolution.parse(drawn_at),
                keep=self.config["keep"],
            )
        except TooLittleMemoryError as error:
            self._take_limit()
            if is_new and drawn_at == "requested":
                return self._unfit(0)
            # Where as many have fitted, somebody else has taken the memory for a while.
            return {"failure": str(error), "transient": not is_new, "done": True}
        except CRDiffError as error:
            return {"failure": str(error), "transient": False, "done": True}
        except Exception as error:  # Whatever it is, the search goes on without this batch.
            if not self._replica.is_usable():
                raise  # Ray then starts another worker.
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            return {"failure": reason, "transient": True, "done": True}
        num_fit = self._take_limit()
        if num_fit < len(prompts) and is_new:
            return self._unfit(num_fit)
        self._num_drawn = max(self._num_drawn, len(prompts))
        return {
            "measured": measured,
            # As pairs: Ray Tune flattens a dictionary into other names.
            "drawn_by": tuple(self._drawn_by.items()),
            "redrawn": measured.redrawn or num_fit < len(prompts),
            "done": True,
        }

    def cleanup(self) -> None:
        """Free the replica."""
        if self._is_loaded and self._broken is None:
            self._replica.close()
