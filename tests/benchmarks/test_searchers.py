"""The simulated searches: what they search, how they are run, and what comes of it."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from crdiff_core.models import Model
from tests.benchmarks import landscapes, searchers
from tests.benchmarks.landscapes import FOLDER, GRID, SIZES, Landscape
from tests.benchmarks.searchers import CONFIGURATIONS, Figures, Run
from tests.benchmarks.simulation import Course, PromptBatches, WholeEvaluations, simulate
from tests.benchmarks.surfaces import FIRST_FOR_TUNING, Surface, surface

QUICK = ["--seeds=2", "--evaluations=12", "--processes=1"]


# Landscapes


@pytest.mark.parametrize("size", SIZES)
def test_a_table_says_what_it_was_rendered_with(size):
    metadata = pq.read_schema(FOLDER / f"shapes_{size}.parquet").metadata
    assert metadata[b"revision"].decode() == Model.find("shapes", "float32").revision
    assert metadata[b"prompts"].decode() == landscapes.prompt_set().digest
    assert metadata[b"resolution"].decode() == size


@pytest.mark.parametrize("size", SIZES)
def test_interpolation_hits_the_grid(size):
    landscape = Landscape.read(size)
    assert landscape.bounds == ((GRID[0], GRID[-1]),) * 3
    vertices = np.array(landscapes.triples()[1:])
    expected = landscape.table.reshape(len(vertices), -1)
    assert np.array_equal(landscape.rewards(vertices), expected)
    assert expected.shape[1] == landscape.num_prompts == landscapes.NUM_PROMPTS
    assert landscape.rewards(np.array([landscape.best_point])).mean() == landscape.best


def test_between_two_vertices_lies_their_mean():
    landscape = Landscape.read(SIZES[0])
    ends = np.array([[GRID[1], GRID[2], GRID[3]], [GRID[1], GRID[2], GRID[4]]])
    middle = landscape.rewards(ends.mean(0, keepdims=True))[0]
    assert middle == pytest.approx(landscape.rewards(ends).mean(0))


def test_rows_of_the_table_are_its_own_triples(tmp_path, monkeypatch):
    monkeypatch.setattr(landscapes, "FOLDER", tmp_path)
    rng = np.random.default_rng(0)
    rewards = {triple: rng.random(64).astype(np.float32) for triple in landscapes.triples()}
    landscapes.write("24x40", rewards, tmp_path / "shapes_24x40.parquet")
    landscape = Landscape.read("24x40")
    triple = (0.27, 0.95, 0.1)
    assert landscape.rewards(np.array([triple]))[0] == pytest.approx(rewards[triple])
    assert landscape.dense == pytest.approx(rewards[0.0, 0.0, 0.0])


def test_rendering_goes_on_from_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(landscapes, "GRID", (0.1,))
    done = [json.dumps({"ratios": t, "rewards": [0.5]}) for t in landscapes.triples()]
    work = tmp_path / "work.jsonl"
    work.write_text("\n".join([*done, done[-1][:20]]))
    monkeypatch.setattr(landscapes.Renderer, "start", None)
    assert landscapes.render("24x40", work) == {t: [0.5] for t in landscapes.triples()}


# Surfaces


def test_the_prompts_of_a_surface_agree_on_average_alone():
    found = surface(FIRST_FOR_TUNING)
    points = np.random.default_rng(0).uniform(*found.bounds[0], (2000, 3))
    rewards = found.rewards(points)
    assert rewards.mean(1) == pytest.approx(found.means(points))
    assert found.means(points).max() <= found.best
    moved = found.rewards(points + 0.01) - rewards
    assert moved.std(1).mean() < rewards.std(1).mean() / 2


def test_a_surface_is_known_by_its_number():
    points = np.full((1, 3), 0.4)
    first, again = (Surface(FIRST_FOR_TUNING).rewards(points) for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, surface(FIRST_FOR_TUNING + 1).rewards(points))


# The simulation


def course_of(name, num_workers=1, seed=FIRST_FOR_TUNING, num_evaluations=20):
    return Run(name, "synthetic", num_workers, seed, num_evaluations)()[1]


def test_a_chain_alone_gains_nothing_from_workers():
    assert course_of("reference", 8) == course_of("reference", 1)


def test_many_workers_shorten_what_does_not_wait():
    one, many = (course_of("random", n, num_evaluations=120) for n in (1, 8))
    assert one.makespan == pytest.approx(120, rel=0.1)
    assert one.makespan / many.makespan == pytest.approx(8, rel=0.15)
    assert one.num_pictures == many.num_pictures == 120 * 64
    assert one.regret == sorted(one.regret, reverse=True)
    assert one.regret[-1] == many.regret[-1]


def test_prompt_batches_come_to_what_whole_evaluations_do():
    found = surface(FIRST_FOR_TUNING)
    courses = []
    for work in (WholeEvaluations, PromptBatches):
        searcher = CONFIGURATIONS["reference"].make(found.bounds, 0, 12)
        batch_size = {"batch_size": 8} if work is PromptBatches else {}
        courses.append(simulate(work(searcher, found, **batch_size), found, 1, 0))
    whole, batches = courses
    assert batches.pictures == whole.pictures
    assert batches.regret == pytest.approx(whole.regret)
    assert batches.num_steps == whole.num_steps == 12
    assert batches.makespan == pytest.approx(whole.makespan, rel=0.2)


# Figures


def test_renders_are_counted_to_the_first_median_that_is_good_enough():
    courses = {
        Run("random", "synthetic", 1, seed, 10): Course([1, 2], [64, 64 * seed], [0.5, 0.1])
        for seed in (2, 3, 9)
    }
    figures = Figures(courses, 10)
    assert figures.renders_to("random", "synthetic", 0.5) == 64
    assert figures.renders_to("random", "synthetic", 0.2) == 64 * 3
    assert figures.renders_to("random", "synthetic", 0.05) == 10 * 64 * 2
    assert figures.median("random", "synthetic", 64 * 2) == 0.5


def test_the_benchmark_runs_and_does_not_run_twice(tmp_path, monkeypatch, capsys):
    output, work = tmp_path / "searchers.json", tmp_path / "work.jsonl"
    arguments = [*QUICK, f"--work={work}", f"--output={output}"]
    code = searchers.main(arguments)
    result = json.loads(output.read_text())
    assert {entry["configuration"] for entry in result["entries"]} == set(CONFIGURATIONS)
    assert {entry["landscape"] for entry in result["entries"]} == set(searchers.LANDSCAPES)
    for entry in result["entries"]:
        low, median, high = entry["regret_at_pictures"][str(12 * 64)]
        assert 0 <= low <= median <= high
    assert output.with_suffix(".png").stat().st_size > 10_000
    assert ("MISSED" in capsys.readouterr().out) == bool(code)

    monkeypatch.setattr(Run, "__call__", None)
    work.write_text(work.read_text() + '{"key": "cut sho')
    searchers.main(arguments)
    assert json.loads(output.read_text())["entries"] == result["entries"]
