"""What a search would cost: everything checked and one trial timed here, none started."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from crdiff_core.errors import ModelError
from crdiff_core.prompts import Prompt
from crdiff_core.ratios import GROUPS, BlockRatios
from search.batching import MAX_BATCH
from search.comparison import FEWEST, num_independent
from search.config import AnnealingSettings, ConfigError
from search.evaluations import NUM_KEPT
from search.plan import Plan

if TYPE_CHECKING:
    import torch

    from crdiff_core.replica import Replica

GIB = 1 << 30
# A trial's Parquet file and its MLflow records; measured on the embedded model.
_BYTES_PER_TRIAL = 32 << 10
# Of a picture that is kept: a JPEG of quality 92 takes less than half of it.
_BYTES_PER_PIXEL = 1
# A render is so many equal steps and a constant: two of them tell.
_FEW_STEPS = (1, 3)
# A batch whose first step alone takes longer is not timed as a whole.
_PATIENCE_S = 30


@dataclass(frozen=True)
class Estimate:
    """The cost of one search, most of it extrapolated from a few denoising steps.

    device:        what the trial was timed on.
    batch_size:    pictures drawn at once, as many as fit into memory.
    num_timed:     pictures of the timed trial; trial_s: its time, all steps, once warm.
    load_s:        loading the model and encoding the prompts, once for each worker.
    num_pictures:  that the search draws at most; num_known: of them in the ledger already.
    results_gib:   of disk that the results take; disk_gib: there is; None: nobody can say.
    memory_gib:    peak while drawing on a GPU, else the weights'; free_gib: there is.
    """

    plan: Plan
    device: str
    batch_size: int
    num_timed: int
    trial_s: float
    load_s: float
    num_pictures: int
    num_known: int
    memory_gib: float
    free_gib: float
    results_gib: float
    disk_gib: float | None

    @property
    def hours(self) -> float:
        """Of one worker such as this machine's, for what the ledger does not know."""
        num_left = max(0, self.num_pictures - self.num_known)
        return num_left * self.trial_s / self.num_timed / 3600

    def lines(self) -> list[str]:
        """Say it to a person."""
        plan, config = self.plan, self.plan.config
        source = plan.model.path or plan.model.hub_id or "embedded"
        price = config.cluster.gpu_hour_price
        known = f", {self.num_known} of them known to the ledger" if self.num_known else ""
        ahead = ""
        if isinstance(config.searcher, AnnealingSettings) and config.searcher.speculation != "off":
            ahead = "; several workers evaluate more, ahead of the search, and end it sooner"
        spent = f"{self.hours:.2f} hours" if self.hours >= 1 else f"{self.hours * 60:.1f} minutes"
        free = "" if self.disk_gib is None else f", and {self.disk_gib:.1f} GiB are free there"
        lines = [
            f"model      {plan.model.name} ({source}), revision {plan.recipe.revision}, "
            f"{plan.recipe.dtype}, drawing {config.res}",
            f"reward     {plan.recipe.reward}, version {plan.recipe.reward_version}",
            "prompts    "
            + ", ".join(f"{len(each)} {name}" for name, each in plan.prompt_sets.items()),
            f"memory     {self.memory_gib:.2f} GiB, and {self.free_gib:.1f} GiB are free on "
            f"{self.device}",
            f"one trial  {self.num_timed} pictures of {plan.recipe.num_steps} steps in "
            f"{self.trial_s:.2f} s, {self.batch_size} at once, extrapolated from {_FEW_STEPS[0]} "
            f"and {_FEW_STEPS[1]} steps; before the first, {self.load_s:.0f} s to load",
            f"search     at most {config.most_evaluations} evaluations, {self.num_pictures} "
            f"pictures with re-ranking and validation{known}{ahead}",
            f"time       about {spent} of drawing by one worker such as this ({self.device})",
            f"disk       about {self.results_gib:.2f} GiB of results at {config.output}{free}",
        ]
        if price is not None and self.device == "cpu":
            lines.append("price      unknown: this machine has no GPU to time a trial on")
        elif price is not None:
            lines.append(f"price      about {self.hours * price:.2f}, at {price:g} a GPU hour")
        num = num_independent(plan.prompt_sets["validation"].texts)
        if num < FEWEST:
            lines.append(
                f"verdict    none: it takes {FEWEST} validation prompts (of one prompt, noises), "
                f"and these settings give {num}"
            )
        return [*lines, "Nothing was searched: leave out dry_run=true to start."]


def estimate(plan: Plan) -> Estimate:
    """Load the plan's model on this machine and time one trial of it.

    Raises a CRDiffError, in one line, for too little disk or memory and whatever would end the
    search itself.
    """
    import torch

    from crdiff_core.replica import Replica, choose_device

    config, search = plan.config, plan.search
    search.replay()
    sizes = {name: len(each) for name, each in plan.prompt_sets.items()}
    top = config.rerank.top if config.rerank.top > 1 else 0
    num_pictures = (
        (1 + config.most_evaluations) * sizes["search"]
        + top * sizes["rerank"]
        + 2 * sizes["validation"]
        + search.num_for_report
    )
    if config.budget.pictures is not None:
        num_pictures = min(num_pictures, config.budget.pictures)
    batch_size = config.render.batch_size or MAX_BATCH
    prompts = plan.prompt_sets["search"].prompts[:batch_size]
    results_gib, disk_gib = _disk(plan, num_pictures // len(prompts) + 1)
    device = choose_device(config.cluster.device)
    torch.set_num_threads(config.cluster.cpus_per_trial)
    free = _free_bytes(device)
    needed = plan.model.num_bytes()
    if needed > free:
        raise ModelError(
            f"{plan.model.name} in {plan.model.dtype} takes {needed / GIB:.1f} GiB and {device} "
            f"has {free / GIB:.1f} GiB free: use another device or a half-precision model.dtype"
        )
    started = time.perf_counter()
    replica = Replica(
        plan.model.load(device),
        config.res,
        num_steps=_FEW_STEPS[0],
        guidance_scale=plan.recipe.guidance_scale,
        poa_weight=plan.recipe.poa_weight,
        size_conditioning=plan.recipe.told_size,
        negative_prompt=plan.recipe.negative_prompt,
        compile=config.render.compile,
    )
    _trial_s(plan, replica, prompts[:1], _FEW_STEPS[0])
    load_s = time.perf_counter() - started
    if _trial_s(plan, replica, prompts[:1], _FEW_STEPS[0]) * len(prompts) > _PATIENCE_S:
        prompts = prompts[:1]  # A large model on a CPU, which gains nothing from more at once.
    else:
        _trial_s(plan, replica, prompts, _FEW_STEPS[0])
    few, more = (_trial_s(plan, replica, prompts, num_steps) for num_steps in _FEW_STEPS)
    per_step = max(0.0, more - few) / (_FEW_STEPS[1] - _FEW_STEPS[0])
    on_gpu = device.type == "cuda"
    memory = torch.cuda.max_memory_allocated(device) if on_gpu else needed
    name = torch.cuda.get_device_name(device) if on_gpu else "cpu"
    replica.close()
    return Estimate(
        plan=plan,
        device=name,
        batch_size=min(len(prompts), replica.batch_limit),
        num_timed=len(prompts),
        trial_s=few + per_step * (plan.recipe.num_steps - _FEW_STEPS[0]),
        load_s=load_s,
        num_pictures=num_pictures,
        num_known=search.num_known,
        memory_gib=memory / GIB,
        free_gib=free / GIB,
        results_gib=results_gib,
        disk_gib=disk_gib,
    )


def _trial_s(plan: Plan, replica: Replica, prompts: Sequence[Prompt], num_steps: int) -> float:
    """Time one trial of so few steps, with ratios that it has not got yet."""
    from crdiff_core.evaluation import evaluate

    old = replica.denoiser.ratios.down
    ratios = BlockRatios(**{group: 0.3 if old != 0.3 else 0.4 for group in GROUPS})
    replica.num_steps = num_steps
    return sum(evaluate(replica, ratios, prompts, plan.reward).seconds.values())


def _disk(plan: Plan, num_trials: int) -> tuple[float, float | None]:
    """Return the GiB that the results take and that are free. Raises ConfigError if too few."""
    config, local = plan.config, plan.folder.local
    needed = num_trials * _BYTES_PER_TRIAL
    if config.report.pictures:
        num_kept = (1 + config.most_evaluations) * NUM_KEPT + 2 * config.prompts.validation
        num_kept += plan.search.num_for_report
        needed += num_kept * config.res.height * config.res.width * _BYTES_PER_PIXEL
    if local is None:
        return needed / GIB, None
    folder = next(path for path in local.parents if path.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"{folder} has {free / GIB:.2f} GiB free and the results may take "
            f"{needed / GIB:.2f}: set output to a folder with more"
        )
    return needed / GIB, free / GIB


def _free_bytes(device: torch.device) -> int:
    import psutil
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
