"""Write a search's report, one HTML file to send: `python -m search.report RUN_FOLDER...`."""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple
from html import escape
from importlib.metadata import version
from typing import NamedTuple

import optuna
from markupsafe import Markup
from optuna.importance import FanovaImportanceEvaluator, get_param_importances

from crdiff_core.errors import CRDiffError
from search import charts
from search.comparison import EQUAL, Comparison, shortened, standard_error, telling
from search.config import ConfigError
from search.evaluations import Evaluation
from search.export import PACKAGES, load_plan, source_of, validated
from search.gallery import groups
from search.ledger import STAGES
from search.page import chart, render
from search.plan import Plan
from search.runs import RATIOS_FILE, REPORT_FILE, RUN_FILE, read_record
from search.space import Space
from search.storage import Storage

# Fewer evaluations say nothing of which ratio matters.
_ENOUGH = 10


def write_report(plan: Plan) -> Storage:
    """Write report.html of a search, finished or not; return its place.

    Raises ConfigError if nothing has been evaluated, or StorageError if it cannot be written.
    """
    if not plan.search.evaluations:
        raise ConfigError(
            f"{plan.folder}: nothing has been evaluated yet: run the command in its {RUN_FILE}"
        )
    plan.folder.write(REPORT_FILE, render("report.html", **_content(plan)))
    return plan.folder / REPORT_FILE


def _content(plan: Plan) -> dict[str, object]:
    search, comparison = plan.search, validated(plan)
    looked_at = _looked_at(plan)
    return {
        "name": f"{plan.model.name} at {plan.config.res}",
        "state": _state(plan),
        "verdict": _verdict(plan, comparison),
        "found": _found(plan),
        "scores": _scores(plan, comparison),
        "groups": groups(plan),
        "keeps_pictures": plan.config.report.pictures > 0,
        "validation": None if comparison is None else _validation(plan, comparison),
        "reranked": _reranked(plan),
        "reranked_on": plan.freshness("rerank"),
        "history": _history(plan),
        "num_steps": search.num_steps,
        "notes": _notes(plan),
        **_where(plan, looked_at),
        "importance": _importance(plan.search.space, looked_at),
        "spent": _spent(plan),
        "stages": _stages(plan),
        "stage_names": STAGES,
        "failures": _failures(plan),
        "made_with": _made_with(plan),
        "command": read_record(plan.folder).get("command", ""),
        "use": _use(plan) if search.winner is not None else None,
    }


# --- what came of it -------------------------------------------------------------------------


class Verdict(NamedTuple):
    """The headline, the class that colours it, and the sentence under it."""

    headline: str
    kind: str
    sentence: str


_HEADLINES = {
    "better": ("Better: CR-Diff with these ratios beats the dense model", "better"),
    "no difference shown": ("No difference shown: this search is no reason to prune", "neutral"),
    "worse": ("Worse: draw with the dense model, not with these ratios", "worse"),
    "no verdict": ("No verdict: this search is no reason to prune", "neutral"),
}


def _state(plan: Plan) -> str | None:
    """Say what an unfinished search lacks."""
    search = plan.search
    if search.failure is not None:
        return f"This search has failed: {search.failure}"
    if search.finished:
        return None
    done, total = search.progress
    return (
        f"This search is not finished: {done} of {total} evaluations are done. Run its command "
        "again, it goes on where it was; what follows is what there is so far."
    )


def _verdict(plan: Plan, comparison: Comparison | None) -> Verdict:
    if comparison is None:
        if plan.search.winner is None or not plan.search.finished:
            return Verdict("No verdict yet", "neutral", "Nothing has been validated.")
        return Verdict(
            "Not validated: no verdict",
            "neutral",
            "A validation evaluation failed, so nothing is shown either way; see Cost.",
        )
    return Verdict(
        *_HEADLINES[comparison.verdict],
        f"On {comparison.sample}, by which nothing was chosen, the mean reward of CR-Diff minus "
        f"that of the dense model is {comparison.figures}. {comparison.note}".strip(),
    )


def _found(plan: Plan) -> list[tuple[str, str]]:
    config, winner = plan.config, plan.search.winner
    best = winner or next(iter(plan.search.candidates), None)
    found = []
    if best is not None:
        weight = f", amplified by k = {best.candidate.poa_weight:.4g}"
        name = "Best ratios" if winner else "Best so far"
        found.append((name, f"{best.ratios} (down / mid / up){weight}"))
    if resizing := _resizing(plan):
        found.append(("Resizing instead", resizing))
    return [
        *found,
        ("Model", f"{plan.model.name}, {plan.recipe.dtype}"),
        ("Size", f"{config.res} (height x width, in pixels)"),
        ("Reward", plan.recipe.reward),
        ("Searcher", f"{config.searcher.name}, seed {config.seed}"),
    ]


def _resizing(plan: Plan) -> str | None:
    """Say what the dense model has at its native size, resized, where nothing was chosen."""
    resized, winner = plan.search.of("resized"), plan.search.of("validation")
    if resized is None or winner is None or not (resized.is_complete and winner.is_complete):
        return None
    num_first = len(telling(winner.rewards, plan.config.report.pictures).first)
    means = [statistics.fmean(each.rewards[:num_first]) for each in (resized, winner)]
    return (
        f"drawn at {resized.candidate.drawn_at} and resized, the dense model has {means[0]:.4f} "
        f"on the first {num_first} validation prompts, where CR-Diff has {means[1]:.4f}"
    )


def _scores(plan: Plan, comparison: Comparison | None) -> list[tuple[str, float, float]]:
    """Return name, mean and standard error of the two on the validation prompts."""
    winner, dense = plan.search.of("validation"), plan.search.of("dense validation")
    if comparison is None or winner is None or dense is None:
        return []
    return [
        ("Dense", dense.mean, dense.standard_error),
        ("CR-Diff", winner.mean, winner.standard_error),
    ]


def _validation(plan: Plan, comparison: Comparison) -> dict[str, object]:
    """Return how many pairs of pictures were won and lost, and by how much each."""
    winner, dense = plan.search.of("validation"), plan.search.of("dense validation")
    assert winner is not None
    assert dense is not None
    gains = [a - b for a, b in zip(winner.rewards, dense.rewards, strict=True)]
    # Charts take HTML for what it says.
    names = [escape(shortened(text)) for text in winner.prompts.texts]
    num_won, num_lost = (sum(sign * gain > EQUAL for gain in gains) for sign in (1, -1))
    return {
        "comparison": comparison,
        "paired_error": standard_error(gains, winner.prompts.texts),
        "num_won": num_won,
        "num_lost": num_lost,
        "num_equal": len(gains) - num_won - num_lost,
        "chart": chart(
            charts.gains(comparison, list(zip(names, gains, strict=True))),
            f"Differences in reward of {len(gains)} pairs of pictures, sorted: {num_won} won, "
            f"{num_lost} lost",
        ),
    }


def _reranked(plan: Plan) -> list[dict[str, object]]:
    """Return the best few of the search, with their rewards there and when drawn again."""
    search = plan.search
    searched = {evaluation.candidate: evaluation for evaluation in search.candidates}
    return [
        {
            "point": search.space.describe(each.candidate),
            "searched": searched[each.candidate].mean,
            "reranked": each.failure or f"{each.mean:.4f}",
            "won": search.winner is not None and each.candidate == search.winner.candidate,
        }
        for each in search.evaluations
        if each.kind == "rerank" and each.candidate in searched
    ]


# --- how it went -----------------------------------------------------------------------------


def _history(plan: Plan) -> Markup | None:
    steps, dense = plan.search.steps, plan.search.of("dense")
    if not steps:
        return None
    level = dense.mean if dense is not None and dense.is_complete else None
    return chart(
        charts.history(steps, level), f"Reward of {len(steps)} steps, and the best so far"
    )


def _notes(plan: Plan) -> list[str]:
    """Say what else one should know of the course of the search."""
    search = plan.search
    lost = sum(step.lost_race for step in search.steps)
    notes = [f"{lost} steps were stopped early by racing."] if lost else []
    if search.warm_start:
        notes.append(f"It began with {len(search.warm_start)} evaluations of other searches.")
    if search.mixed is not None:
        notes.append(search.mixed)
    if search.ended_by is not None:
        notes.append(f"It was ended by {search.ended_by}: run it again with more to go on.")
    off = search.best_off_path
    if off is not None:
        notes.append(
            f"{off.mean:.4f} was seen at {search.space.describe(off.candidate)}, evaluated ahead "
            "but not on the search's way: rerank.off_path=true would let it win."
        )
    return notes


def _looked_at(plan: Plan) -> list[Evaluation]:
    """Return the search's evaluations in its space, those too that annealing passed by."""
    search = plan.search
    return [
        each
        for each in search.known_evaluations
        if search.space.suggestion(each.candidate) is not None
    ]


def _where(plan: Plan, evaluations: Sequence[Evaluation]) -> dict[str, object]:
    """Return the charts of the box that is searched."""
    space, winner = plan.search.space, plan.search.winner
    num_complete = sum(evaluation.is_complete for evaluation in evaluations)
    if not num_complete:
        return {"maps": [], "parallel": None, "num_complete": 0}
    maps = charts.maps(space, evaluations, winner)
    return {
        "maps": [(name, chart(each, f"Where it looked: {name}")) for name, each in maps.items()],
        "parallel": chart(
            charts.parallel(space, evaluations, winner), f"{num_complete} candidates as lines"
        ),
        "num_complete": num_complete,
    }


def _importance(space: Space, evaluations: Sequence[Evaluation]) -> dict[str, float] | str:
    """Return what each dimension alone explains of the variance, scaled to sum to 1; or why not.

    By functional ANOVA over random forests (Hutter et al. 2014), as Optuna has it.
    """
    complete = [evaluation for evaluation in evaluations if evaluation.is_complete]
    if len(space.bounds) == 1:
        return "There is one ratio only."
    if len(complete) < _ENOUGH:
        return f"{len(complete)} complete evaluations are too few to tell ({_ENOUGH} are enough)."
    if len({evaluation.mean for evaluation in complete}) == 1:
        return "All evaluations have the same reward, so no ratio made a difference."
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize")
    distributions = {
        name: optuna.distributions.FloatDistribution(*span) for name, span in space.bounds.items()
    }
    for evaluation in sorted(complete, key=lambda e: e.key):  # In no order of workers' making.
        study.add_trial(
            optuna.trial.create_trial(
                params=space.suggestion(evaluation.candidate),
                distributions=distributions,
                value=evaluation.mean,
            )
        )
    # Of any depth, trees take minutes for a few hundred evaluations.
    evaluator = FanovaImportanceEvaluator(n_trees=32, max_depth=5, seed=0)
    shares = get_param_importances(study, evaluator=evaluator)
    return {name: float(share) for name, share in shares.items()}


# --- what it took, and what to do with it ----------------------------------------------------


def _spent(plan: Plan) -> list[tuple[str, str]]:
    """Return what this search has paid for, in all its sessions."""
    use, price = plan.search.use, plan.config.cluster.gpu_hour_price
    peaks = [e.memory_gib for e in plan.search.evaluations if e.memory_gib is not None]
    spent = [
        ("Pictures drawn", f"{use.pictures:,}"),
        ("Candidates evaluated", f"{use.evaluations:,}"),
        ("GPU hours" if peaks else "Hours of workers", _hours(use.gpu_hours)),
        ("Wall-clock hours", _hours(use.wall_hours)),
    ]
    if peaks:
        spent.append(("Peak GPU memory", f"{max(peaks):.2f} GiB"))
    if price is not None:
        spent.append(("Money", f"{use.gpu_hours * price:.2f} ({price:g} for a GPU hour)"))
    return spent


def _hours(hours: float) -> str:
    return f"{hours:.3g} ({hours * 3600:.0f} s)" if hours < 0.1 else f"{hours:.2f}"


def _stages(plan: Plan) -> list[tuple[str, int, int, list[float | None]]]:
    """Return evaluations, pictures and seconds (in all, then by stage) of what was done, by kind.

    Whichever search paid for them.
    """
    search = plan.search
    others = [evaluation for evaluation in search.evaluations if evaluation.kind != "search"]
    rows = {
        "dense": [e for e in others if e.kind == "dense"],
        "search": search.known_evaluations,
        "best few again": [e for e in others if e.kind == "rerank"],
        "validation": [e for e in others if e.kind.endswith("validation")],
        "for this report": [e for e in others if e.kind in ("pruned alone", "resized")],
    }
    return [
        (
            name,
            len(some),
            sum(len(e.rewards) for e in some),
            [sum(e.seconds for e in some), *(_stage(some, stage) for stage in STAGES)],
        )
        for name, some in rows.items()
        if some
    ]


def _stage(evaluations: Sequence[Evaluation], stage: str) -> float | None:
    known = [e.stages[stage] for e in evaluations if stage in e.stages]
    return sum(known) if known else None


def _failures(plan: Plan) -> list[tuple[str, int]]:
    """Return why evaluations failed, and how many each time."""
    seen = [*plan.search.evaluations, *plan.search.known_evaluations]
    failed = {(e.kind, e.key): e.failure for e in seen if e.failure is not None}
    return Counter(failed.values()).most_common()


def _made_with(plan: Plan) -> list[tuple[str, str]]:
    """Return all that one needs to get the same again."""
    winner, recipe, negative = plan.search.winner, plan.recipe, plan.recipe.negative_prompt
    source = [f"{name} {value}" for name, value in source_of(plan.model).items() if value]
    source = source or ["embedded in crdiff_core"]
    rows = [
        ("Weights", ", ".join([*source, f"revision {recipe.revision}"])),
        (
            "Drawn with",
            f"{recipe.scheduler}, {recipe.num_steps} steps, guidance {recipe.guidance_scale:g}, "
            f"{recipe.dtype}, {plan.search.batch_size} at once at most"
            + (f", negative prompt {negative!r}" if negative is not None else ""),
        ),
        ("Reward", f"{recipe.reward} {recipe.reward_version}"),
        ("Seeds", f"{plan.config.seed} of the search, {plan.config.prompts.seed} of the prompts"),
        *(
            (f"Prompts, {name}", f"{len(prompts)}, SHA-256 {prompts.digest[:16]}")
            for name, prompts in plan.prompt_sets.items()
        ),
        ("Search key", plan.key),
    ]
    rows += [("Ledger key of the best", winner.key)] if winner else []
    rows.append(("Versions", ", ".join(f"{name} {version(name)}" for name in PACKAGES)))
    return rows


def _use(plan: Plan) -> dict[str, str]:
    """Return code and a command that draw with what was found."""
    recipe, told = plan.recipe, plan.recipe.told_size
    prompt = plan.prompt_sets["validation"].prompts[0].text
    others = f", original_size={astuple(told)}, target_size={astuple(told)}" if told else ""
    if recipe.negative_prompt is not None:
        others += f",\n    negative_prompt={recipe.negative_prompt!r}"
    file = str(plan.folder / RATIOS_FILE)
    code = f"""\
import torch

import crdiff_core
from crdiff_core.models import Model

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Or your own StableDiffusion(XL) pipeline of these weights.
pipe = {plan.model!r}.load(device)
# In place; crdiff_core.remove(pipe) undoes it.
crdiff_core.apply(pipe, {RATIOS_FILE!r})
image = pipe(
    {prompt!r},
    height={recipe.height}, width={recipe.width},
    num_inference_steps={recipe.num_steps}, guidance_scale={recipe.guidance_scale}{others},
).images[0]
image.save("picture.png")"""
    model = ["--model", plan.config.model.path] if plan.config.model.path else []
    arguments = ["--ratios", RATIOS_FILE, *model, "--prompt", prompt, "--out", "picture.png"]
    command = shlex.join(["python", "-m", "crdiff_core.generate", *arguments])
    return {"file": file, "code": code, "command": command}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write report.html into the folders of runs, from the ledger and the pictures kept."""
    parser = argparse.ArgumentParser(prog="python -m search.report", description=main.__doc__)
    parser.add_argument(
        "run", nargs="+", help="folders, such as runs/shapes_24x40/annealing-seed0"
    )
    code = 0
    for run in parser.parse_args(arguments).run:
        try:
            plan = load_plan(run)
            plan.search.replay()
            print(write_report(plan), flush=True)
        except CRDiffError as error:  # The others may be in order.
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            code = 2
    return code


if __name__ == "__main__":
    sys.exit(main())
