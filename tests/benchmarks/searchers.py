"""Regret of every searcher against rendered pictures and against rounds, by simulation.

python -m tests.benchmarks.searchers
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import ray
import torch
from numpy.typing import NDArray
from ray.tune.search import Searcher

from crdiff_core.ratios import GROUPS
from search import baselines
from search.annealing import REFERENCE, space_filling
from search.racing import Race
from search.searchers import AnnealingSearch
from tests.benchmarks.landscapes import FOLDER, Landscape, read_lines
from tests.benchmarks.measuring import (
    RESULTS,
    Goal,
    goals_as_json,
    machine,
    print_goals,
    write_json,
)
from tests.benchmarks.simulation import (
    Course,
    PromptBatches,
    Rewards,
    WholeEvaluations,
    simulate,
)
from tests.benchmarks.surfaces import surface

Array = NDArray[np.float64]
Bounds = tuple[tuple[float, float], ...]

HERE = Path(__file__).parent
WORK = HERE.parents[1] / "runs" / "benchmarks" / "searchers.jsonl"
LANDSCAPES = ("24x40", "24x24", "synthetic")
WORKERS = (1, 8, 64)
NUM_PROMPTS = 64
START = (0.3, 0.3, 0.3)
# A regret, in units of the landscape's scale, that no real search could tell from none.
NO_REGRET = 1e-3
MAX_ROUNDS = 0.35
MAX_RENDERS = 0.6


# --- what is compared ----------------------------------------------------------------------------


def annealing(
    bounds: Bounds, seed: int, num_evaluations: int, num_filling: int = 7, **parameters: Any
) -> Searcher:
    """Ours, from the starting points that a search has by default."""
    starts = (START, *space_filling(bounds, num_filling))
    return AnnealingSearch(
        dict(zip(GROUPS, bounds, strict=True)),
        seed=seed,
        max_steps=num_evaluations,
        seeds=[dict(zip(GROUPS, start, strict=True)) for start in starts[:num_evaluations]],
        **parameters,
    )


def baseline(bounds: Bounds, seed: int, num_evaluations: int, *, name: str) -> Searcher:
    """One of Optuna's samplers, or a grid."""
    space = dict(zip(GROUPS, bounds, strict=True))
    return baselines.baseline(name, space, seed, num_evaluations=num_evaluations)


@dataclass(frozen=True)
class Configuration:
    """A searcher with its settings.

    make:       (bounds, seed, num_evaluations) -> Searcher.
    batch_size: prompts of one trial; None: a trial is a whole evaluation.
    workers:    how many it is simulated with.
    stretch:    times as many steps, ended when the pictures of the usual number are rendered.
    most_seeds: with so many workers at most so many seeds.
    """

    make: Callable[[Bounds, int, int], Searcher]
    batch_size: int | None = None
    workers: tuple[int, ...] = WORKERS
    stretch: int = 1
    most_seeds: Mapping[int, int] = field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        return self._factory is annealing

    @property
    def _factory(self) -> Any:
        return self.make.func if isinstance(self.make, partial) else self.make

    def __str__(self) -> str:
        parameters = self.make.keywords if isinstance(self.make, partial) else {}
        stretch = f" x {self.stretch}" if self.stretch > 1 else ""
        return f"{self._factory.__name__} {parameters} {self.batch_size}{stretch}"


SERIAL, SPECULATIVE, RACING = "annealing", "speculative", "racing"
CONFIGURATIONS: dict[str, Configuration] = {
    SERIAL: Configuration(partial(annealing, speculation="off"), workers=(1,)),
    SPECULATIVE: Configuration(annealing, most_seeds={64: 6}),
    RACING: Configuration(partial(annealing, race=Race()), batch_size=8, workers=(1,), stretch=3),
    "reference": Configuration(
        partial(annealing, speculation="off", num_filling=0, **REFERENCE),
        workers=(1,),
    ),
    **{
        # A search by the Gaussian process takes 10 to 20 seconds, all of them together hours.
        name: Configuration(partial(baseline, name=name), most_seeds={8: 10, 64: 10})
        for name in baselines.BASELINES
    },
}


# --- runs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One search: on a tabulated landscape, or on the synthetic surface of the seed's number."""

    configuration: str
    landscape: str
    num_workers: int
    seed: int
    num_evaluations: int

    def __call__(self) -> tuple[Run, Course]:
        """Simulate it."""
        configuration = CONFIGURATIONS[self.configuration]
        rewards = _rewards(self.landscape, self.seed)
        num_steps = configuration.stretch * self.num_evaluations
        searcher = configuration.make(rewards.bounds, self.seed, num_steps)
        work = (
            WholeEvaluations(searcher, rewards)
            if configuration.batch_size is None
            else PromptBatches(searcher, rewards, configuration.batch_size)
        )
        most = NUM_PROMPTS * self.num_evaluations if configuration.stretch > 1 else math.inf
        return self, simulate(work, rewards, self.num_workers, self.seed, most)

    @property
    def key(self) -> str:
        """Everything that its course is a function of."""
        configuration = CONFIGURATIONS[self.configuration]
        made_by = _digest(*(_OURS if configuration.is_ours else _THEIRS))
        parts = {
            **asdict(self),
            "configuration": str(configuration),
            "made_by": made_by,
            "optuna": "" if configuration.is_ours else optuna.__version__,
            "simulation": _digest(HERE / "simulation.py"),
            "rewards": _digest(
                HERE / "surfaces.py"
                if self.landscape == "synthetic"
                else FOLDER / f"shapes_{self.landscape}.parquet"
            ),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _rewards(landscape: str, seed: int) -> Rewards:
    return surface(seed) if landscape == "synthetic" else _tabulated(landscape)


@cache
def _tabulated(landscape: str) -> Landscape:
    return Landscape.read(landscape)


# What a searcher does is a function of these alone.
_SEARCH = Path(baselines.__file__).parent
_THEIRS = (_SEARCH / "baselines.py",)
_OURS = tuple(
    _SEARCH / f"{name}.py"
    for name in (
        "annealing",
        "batching",
        "evaluation_search",
        "evaluations",
        "racing",
        "searchers",
        "space",
        "speculation",
        "surrogate",
    )
)


@cache
def _digest(*files: Path) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def all_runs(options: argparse.Namespace) -> list[Run]:
    """Return every run, a seed after the other."""
    return [
        Run(name, landscape, num_workers, seed, options.evaluations)
        for seed, name, landscape in product(
            range(options.seeds), options.configurations, options.landscapes
        )
        for num_workers in CONFIGURATIONS[name].workers
        if seed < CONFIGURATIONS[name].most_seeds.get(num_workers, options.seeds)
    ]


def _simulated(runs: Sequence[Run], num_processes: int) -> Iterator[tuple[Run, Course]]:
    if num_processes <= 1:
        yield from map(Run.__call__, runs)
        return
    processes = multiprocessing.get_context("spawn")
    with processes.Pool(num_processes, torch.set_num_threads, (1,)) as pool:
        yield from pool.imap_unordered(Run.__call__, runs, chunksize=4)


def simulate_all(runs: Sequence[Run], work: Path, num_processes: int) -> dict[Run, Course]:
    """Simulate the runs that the file `work` does not have yet, and add them there."""
    known = {line["key"]: line["course"] for line in read_lines(work)}
    courses = {run: Course(**known[run.key]) for run in runs if run.key in known}
    todo = [run for run in runs if run not in courses] if num_processes else []
    work.parent.mkdir(parents=True, exist_ok=True)
    began = printed = time.monotonic()
    with work.open("a", encoding="utf-8") as file:
        for count, (run, course) in enumerate(_simulated(todo, num_processes), 1):
            courses[run] = course
            line = {"key": run.key, **asdict(run), "course": asdict(course)}
            file.write("\n" * (count == 1) + json.dumps(line) + "\n")
            now = time.monotonic()
            if now > printed + 20 or count == len(todo):
                file.flush()
                left = (now - began) / count * (len(todo) - count)
                print(f"{count}/{len(todo)} runs, {left / 60:.1f} min left", flush=True)
                printed = now
    return courses


# --- results -------------------------------------------------------------------------------------


def regrets(courses: Sequence[Course], axis: str, at: Array) -> Array:
    """Return each course's regret when it had taken so much: (courses, len(at)).

    axis: pictures or time; before the first evaluation is complete the regret is infinite.
    """
    rows = []
    for course in courses:
        steps = np.searchsorted(getattr(course, axis), at, side="right")
        rows.append(np.array([math.inf, *course.regret])[steps])
    return np.array(rows)


def quartiles(values: Array) -> Array:
    """(courses, n) -> (3, n): lower quartile, median, upper quartile, of actual values."""
    found: Array = np.percentile(values, [25, 50, 75], axis=0, method="inverted_cdf")
    return found


class Figures:
    """What the courses come to."""

    def __init__(self, courses: Mapping[Run, Course], num_evaluations: int) -> None:
        self.num_evaluations = num_evaluations
        self.num_pictures = num_evaluations * NUM_PROMPTS
        self.groups: dict[tuple[str, str, int], list[Course]] = defaultdict(list)
        for run in sorted(courses, key=lambda run: run.seed):
            self.groups[run.configuration, run.landscape, run.num_workers].append(courses[run])
        self.configurations = list(dict.fromkeys(key[0] for key in self.groups))
        self.landscapes = list(dict.fromkeys(key[1] for key in self.groups))
        shares = (1 / 12, 1 / 4, 1 / 2, 1)
        self.pictures = [NUM_PROMPTS * math.ceil(share * num_evaluations) for share in shares]
        self.rounds = [n for n in (1, 2, 4, 8, 15, 30, 60) if n < num_evaluations]
        self.rounds.append(num_evaluations)

    def as_json(self) -> list[dict[str, Any]]:
        """One entry for each configuration, landscape and number of workers."""
        return [
            {
                "configuration": name,
                "landscape": landscape,
                "num_workers": num_workers,
                "num_seeds": len(courses),
                "regret_at_pictures": self._table(courses, "pictures", self.pictures),
                "regret_at_rounds": self._table(courses, "time", self.rounds),
                "median_num_steps": float(np.median([course.num_steps for course in courses])),
                "median_num_pictures": float(
                    np.median([course.num_pictures for course in courses])
                ),
                "median_makespan": round(
                    float(np.median([course.makespan for course in courses])), 3
                ),
                "median_makespan_against_one_worker": self.speed(name, landscape, num_workers),
            }
            for (name, landscape, num_workers), courses in self.groups.items()
        ]

    def _table(self, courses: Sequence[Course], axis: str, at: Sequence[int]) -> dict[str, Any]:
        found = quartiles(regrets(courses, axis, np.array(at))).T
        return {
            str(key): [None if math.isinf(value) else float(f"{value:.4g}") for value in row]
            for key, row in zip(at, found, strict=True)
        }

    def median(self, name: str, landscape: str, pictures: int) -> float:
        """Median regret of one worker when so many pictures were rendered."""
        courses = self.groups[name, landscape, 1]
        return float(quartiles(regrets(courses, "pictures", np.array([pictures])))[1, 0])

    def renders_to(self, name: str, landscape: str, regret: float) -> int:
        """Return the pictures after which the median regret is this, or not worth more.

        Twice those of the whole search, if it never is.
        """
        at = np.arange(0, self.num_pictures * 2 + 1, 8)
        medians = quartiles(regrets(self.groups[name, landscape, 1], "pictures", at))[1]
        reached = np.flatnonzero(medians <= regret + NO_REGRET)
        return int(at[reached[0] if reached.size else -1])

    def speed(self, name: str, landscape: str, num_workers: int) -> float | None:
        """Median over the seeds of the rounds taken, as a share of those that one worker takes."""
        many, one = (self.groups.get((name, landscape, n)) for n in (num_workers, 1))
        if not many or not one:
            return None
        pairs = zip(many, one, strict=False)  # In the order of their seeds.
        return round(float(np.median([a.makespan / b.makespan for a, b in pairs])), 4)

    def goals(self) -> list[Goal]:
        """The issue's goals, for each landscape."""
        found = []
        for landscape in self.landscapes:
            speed = self.speed(SPECULATIVE, landscape, 8)
            found.append(
                Goal(f"{landscape}: rounds of 8 workers against 1", speed, "at most", MAX_ROUNDS)
            )
            share = None
            if {SERIAL, RACING} <= set(self.configurations):
                level = self.median(SERIAL, landscape, self.num_pictures)
                needed = [self.renders_to(name, landscape, level) for name in (RACING, SERIAL)]
                share = round(needed[0] / needed[1], 3)
            found.append(
                Goal(
                    f"{landscape}: renders of racing against serial", share, "at most", MAX_RENDERS
                )
            )
            compared = self.against_baselines(landscape)
            found.append(
                Goal(
                    f"{landscape}: our renders to the best baseline's final regret",
                    None if compared is None else compared["reached_by_ours"],
                    "at most",
                    self.num_pictures - 1,
                )
            )
        return found

    def against_baselines(self, landscape: str) -> dict[str, Any] | None:
        """Return the best baseline's final regret, and what it takes our quickest to reach it."""
        ours = [name for name in self.configurations if CONFIGURATIONS[name].is_ours]
        theirs = [name for name in self.configurations if name not in ours]
        if not ours or not theirs:
            return None
        best = min(theirs, key=lambda name: self.median(name, landscape, self.num_pictures))
        level = self.median(best, landscape, self.num_pictures)
        needed = {name: self.renders_to(name, landscape, level) for name in ours}
        quickest = min(ours, key=needed.__getitem__)
        return {
            "baseline": best,
            "regret": float(f"{level:.4g}"),
            "first_reached_by_baseline": self.renders_to(best, landscape, level),
            "ours": quickest,
            "reached_by_ours": needed[quickest],
        }

    def markdown(self) -> str:
        """Median regrets in percent after a quarter and all of the evaluations, one worker."""
        at = self.pictures[1], self.pictures[-1]
        titles = [f"{landscape}, {n // NUM_PROMPTS}" for landscape in self.landscapes for n in at]
        lines = [
            "| | " + " | ".join(titles) + " | rounds, 8 workers / 1 | seeds |",
            "|---" * (len(titles) + 3) + "|",
        ]
        for name in self.configurations:
            cells = [
                f"{100 * self.median(name, landscape, n):.2g}%"
                for landscape in self.landscapes
                for n in at
            ]
            speeds = [self.speed(name, landscape, 8) for landscape in self.landscapes]
            known = [speed for speed in speeds if speed is not None]
            cells.append(f"{np.mean(known):.2f}" if known else "-")
            counts = [len(self.groups[name, landscape, 1]) for landscape in self.landscapes]
            cells.append(str(min(counts)))
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def plot(self, path: Path) -> None:
        """Draw regret against pictures, and against rounds by the number of workers."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        columns = len(self.landscapes)
        # One worker's rounds are its pictures over again.
        rows = [("pictures", 1), *(("time", n) for n in WORKERS if n > 1)]
        figure, axes = plt.subplots(
            len(rows),
            columns,
            figsize=(4.6 * columns, 3.3 * len(rows)),
            squeeze=False,
            sharey="col",
            layout="constrained",
        )
        for (axis, num_workers), panels in zip(rows, axes, strict=True):
            for landscape, panel in zip(self.landscapes, panels, strict=True):
                self._draw(panel, landscape, axis, num_workers)
            panels[0].set_ylabel("median regret / scale")
        axes[0][0].legend(fontsize=8, ncols=2)
        draft = path.with_name(f".{path.name}")
        figure.savefig(draft, dpi=110, format="png")
        draft.replace(path)
        plt.close(figure)

    def _draw(self, panel: Any, landscape: str, axis: str, num_workers: int) -> None:
        last = self.num_pictures if axis == "pictures" else self.num_evaluations
        at = np.geomspace(NUM_PROMPTS if axis == "pictures" else 0.5, last, 200)
        for index, name in enumerate(self.configurations):
            courses = self.groups.get((name, landscape, num_workers))
            if not courses:
                continue
            low, middle, high = quartiles(regrets(courses, axis, at)).clip(min=NO_REGRET / 2)
            ours = CONFIGURATIONS[name].is_ours
            style = {"color": f"C{index}", "linestyle": "-" if ours else "--"}
            panel.plot(at, middle, label=name, linewidth=2.2 if ours else 1.3, **style)
            if ours:
                panel.fill_between(at, low, high, color=f"C{index}", alpha=0.12, linewidth=0)
        panel.set(xscale="log", yscale="log")
        panel.set_ylim(NO_REGRET / 2, 2)
        panel.set_xlabel("pictures rendered" if axis == "pictures" else "rounds")
        panel.set_title(f"{landscape}, {num_workers} worker{'s' * (num_workers > 1)}", fontsize=10)
        panel.grid(alpha=0.25)


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulate, print a table, write JSON and the plot; 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="of each (default 100)")
    parser.add_argument("--evaluations", type=int, default=120, help="of a search (default 120)")
    parser.add_argument(
        "--configurations", nargs="+", default=list(CONFIGURATIONS), choices=CONFIGURATIONS
    )
    parser.add_argument("--landscapes", nargs="+", default=LANDSCAPES, choices=LANDSCAPES)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--known", action="store_true", help="simulate nothing: report the runs that --work has"
    )
    parser.add_argument("--work", type=Path, default=WORK, help="file of runs to go on from")
    parser.add_argument("--output", type=Path, default=RESULTS / "searchers.json")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    courses = simulate_all(
        all_runs(options), options.work, 0 if options.known else options.processes
    )
    figures = Figures(courses, options.evaluations)
    goals = figures.goals()
    result = {
        "benchmark": "searchers",
        "num_seeds": options.seeds,
        "num_evaluations": options.evaluations,
        "num_prompts": NUM_PROMPTS,
        "configurations": {name: str(CONFIGURATIONS[name]) for name in options.configurations},
        "entries": figures.as_json(),
        "against_baselines": {
            name: figures.against_baselines(name) for name in figures.landscapes
        },
        "goals": goals_as_json(goals),
        "minutes": round((time.monotonic() - began) / 60, 1),
        "versions": {"optuna": optuna.__version__, "ray": ray.__version__},
        "machine": machine(torch.device("cpu")),
    }
    write_json(result, options.output)
    figures.plot(options.output.with_suffix(".png"))
    print("\nmedian regret after so many evaluations' pictures\n")
    print(figures.markdown() + "\n")
    return print_goals(goals, options.output)


if __name__ == "__main__":
    raise SystemExit(main())
