"""What a search would cost: everything checked and one trial timed, none started."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from crdiff_core.errors import CRDiffError, ModelError
from crdiff_core.prompts import Prompt
from crdiff_core.ratios import GROUPS, BlockRatios
from crdiff_core.rewards import Reward, load_reward
from search.batching import batch_length
from search.cluster import LOCAL, check_device, connect
from search.comparison import FEWEST, num_independent
from search.config import AnnealingSettings, Config, ConfigError
from search.evaluations import NUM_KEPT
from search.ledger import Recipe
from search.plan import Plan, reward_options

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
# How long a trial may wait for a worker of the cluster, and take.
_CLUSTER_PATIENCE_S = 900


@dataclass(frozen=True)
class Timing:
    """How long a trial takes on one worker, extrapolated from a few denoising steps.

    device:      its GPU's name, or cpu.
    batch_size:  pictures drawn at once, as many as fit into memory.
    num_timed:   pictures of the timed trial; trial_s: its time, all steps, once warm.
    load_s:      loading the model and encoding the prompts, once for each worker.
    memory_gib:  peak while drawing on a GPU, else the weights'; free_gib: there is.
    """

    device: str
    batch_size: int
    num_timed: int
    trial_s: float
    load_s: float
    memory_gib: float
    free_gib: float


@dataclass(frozen=True)
class Estimate:
    """The cost of one search.

    num_pictures:  that the search draws at most; num_known: of them in the ledger already.
    results_gib:   of disk that the results take; disk_gib: there is; None: nobody can say.
    """

    plan: Plan
    timing: Timing
    num_pictures: int
    num_known: int
    results_gib: float
    disk_gib: float | None

    @property
    def hours(self) -> float:
        """Of one worker such as the one that was timed, for what the ledger does not know."""
        num_left = max(0, self.num_pictures - self.num_known)
        return num_left * self.timing.trial_s / self.timing.num_timed / 3600

    @property
    def gpu_hours(self) -> float:
        """Of a GPU, of which a worker takes a part, or several."""
        return self.hours * self.plan.config.cluster.gpus_per_trial

    def lines(self) -> list[str]:
        """Format for the console."""
        plan, config, timing = self.plan, self.plan.config, self.timing
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
            f"memory     {timing.memory_gib:.2f} GiB, and {timing.free_gib:.1f} GiB are free on "
            f"{timing.device}",
            f"one trial  {timing.num_timed} pictures of {plan.recipe.num_steps} steps in "
            f"{timing.trial_s:.2f} s, {timing.batch_size} at once, extrapolated from "
            f"{_FEW_STEPS[0]} and {_FEW_STEPS[1]} steps; before the first, {timing.load_s:.0f} s "
            "to load",
            f"search     at most {config.most_evaluations} evaluations, {self.num_pictures} "
            f"pictures with re-ranking and validation{known}{ahead}",
            f"time       about {spent} of drawing by one worker such as this ({timing.device})",
            f"disk       about {self.results_gib:.2f} GiB of results at {config.output}{free}",
        ]
        if price is not None and timing.device == "cpu":
            lines.append("price      unknown: there is no GPU to time a trial on")
        elif price is not None:
            share = config.cluster.gpus_per_trial
            of = "" if share == 1 else f", with {share:g} GPUs for a worker"
            lines.append(
                f"price      about {self.gpu_hours * price:.2f}, at {price:g} a GPU hour{of}"
            )
        num = num_independent(plan.prompt_sets["validation"].texts)
        if num < FEWEST:
            lines.append(
                f"verdict    none: it takes {FEWEST} validation prompts (of one prompt, noises), "
                f"and these settings give {num}"
            )
        return [*lines, "Nothing was searched: leave out dry_run=true to start."]


def estimate(plan: Plan) -> Estimate:
    """Time one trial of the plan's model, on this machine or on the cluster that would draw.

    Raises a CRDiffError, in one line, for too little disk or memory and whatever would end the
    search itself, or if no worker of a cluster can be had.
    """
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
    length = batch_length(sizes["search"], search.batch_size)
    results_gib, disk_gib = _disk(plan, num_pictures // length + 1)
    prompts = plan.prompt_sets["search"].prompts[:length]
    if config.cluster.address == LOCAL:
        timing = time_trial(config, plan.recipe, prompts, config.cluster.device)
    else:
        timing = _time_on_cluster(plan, prompts)
    return Estimate(
        plan=plan,
        timing=timing,
        num_pictures=num_pictures,
        num_known=search.num_known,
        results_gib=results_gib,
        disk_gib=disk_gib,
    )


def _time_on_cluster(plan: Plan, prompts: Sequence[Prompt]) -> Timing:
    """Time a trial on one worker of the cluster: the driver's machine may be no such one."""
    import ray

    config = plan.config
    with connect(config.cluster) as resources:
        device = check_device(resources, config.cluster, plan.model)
        timed = ray.remote(_time_or_error).options(
            num_cpus=resources["cpu"], num_gpus=resources.get("gpu", 0), max_retries=0
        )
        try:
            found = ray.get(
                timed.remote(config, plan.recipe, prompts, device), timeout=_CLUSTER_PATIENCE_S
            )
        except ray.exceptions.RayError as error:
            reason = " ".join(str(error).split())[:300]
            if isinstance(error, ray.exceptions.GetTimeoutError):
                reason = f"no worker has drawn one within {_CLUSTER_PATIENCE_S / 60:.0f} minutes"
            raise ConfigError(
                f"a trial cannot be timed on cluster.address={config.cluster.address}: {reason}: "
                "try again when a worker is free"
            ) from error
    if isinstance(found, CRDiffError):
        raise found
    assert isinstance(found, Timing)
    return found


def _time_or_error(
    config: Config, recipe: Recipe, prompts: Sequence[Prompt], device: str
) -> Timing | CRDiffError:
    try:
        return time_trial(config, recipe, prompts, device)
    except CRDiffError as error:  # Ray would wrap it into a traceback.
        return error


def time_trial(
    config: Config, recipe: Recipe, prompts: Sequence[Prompt], device_name: str
) -> Timing:
    """Load the model on this machine and time one trial of these prompts.

    Raises a CRDiffError for too little memory and whatever would end the search itself.
    """
    import torch

    from crdiff_core.replica import Replica, choose_device

    model, device = config.model.model(), choose_device(device_name)
    reward = load_reward(config.reward.name, **reward_options(config))
    torch.set_num_threads(config.cluster.cpus_per_trial)
    free = _free_bytes(device)
    needed = model.num_bytes()
    if needed > free:
        raise ModelError(
            f"{model.name} in {model.dtype} takes {needed / GIB:.1f} GiB and {device} "
            f"has {free / GIB:.1f} GiB free: use another device or a half-precision model.dtype"
        )
    started = time.perf_counter()
    replica = Replica(
        model.load(device),
        config.res,
        num_steps=_FEW_STEPS[0],
        guidance_scale=recipe.guidance_scale,
        poa_weight=recipe.poa_weight,
        size_conditioning=recipe.told_size,
        negative_prompt=recipe.negative_prompt,
        compile=config.render.compile,
    )
    _trial_s(replica, reward, prompts[:1], _FEW_STEPS[0])
    load_s = time.perf_counter() - started
    if _trial_s(replica, reward, prompts[:1], _FEW_STEPS[0]) * len(prompts) > _PATIENCE_S:
        prompts = prompts[:1]  # A large model on a CPU, which gains nothing from more at once.
    else:
        _trial_s(replica, reward, prompts, _FEW_STEPS[0])
    few, more = (_trial_s(replica, reward, prompts, num_steps) for num_steps in _FEW_STEPS)
    per_step = max(0.0, more - few) / (_FEW_STEPS[1] - _FEW_STEPS[0])
    on_gpu = device.type == "cuda"
    memory = torch.cuda.max_memory_allocated(device) if on_gpu else needed
    name = torch.cuda.get_device_name(device) if on_gpu else "cpu"
    batch_size = min(len(prompts), replica.batch_limit)
    replica.close()
    return Timing(
        device=name,
        batch_size=batch_size,
        num_timed=len(prompts),
        trial_s=few + per_step * (recipe.num_steps - _FEW_STEPS[0]),
        load_s=load_s,
        memory_gib=memory / GIB,
        free_gib=free / GIB,
    )


def _trial_s(replica: Replica, reward: Reward, prompts: Sequence[Prompt], num_steps: int) -> float:
    """Time one trial of so few steps, with ratios that it has not got yet."""
    from crdiff_core.evaluation import evaluate

    old = replica.denoiser.ratios.down
    ratios = BlockRatios(**{group: 0.3 if old != 0.3 else 0.4 for group in GROUPS})
    replica.num_steps = num_steps
    return sum(evaluate(replica, ratios, prompts, reward).seconds.values())


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
