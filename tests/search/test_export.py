"""Export: best_ratios.json and history.parquet of searches over analytic rewards."""

import io
import json
import os
import shutil
import statistics
from dataclasses import asdict, replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crdiff_core.models import Model
from crdiff_core.ratios import GROUPS, RatiosFile, Resolution
from search.config import ConfigError
from search.driver import _begin_folder as begin_folder
from search.export import (
    HISTORY_FILE,
    PACKAGES,
    load_plan,
    main,
    source_of,
    validated,
    write_history,
    write_ratios,
)
from search.plan import EARLIER
from search.racing import Race
from search.runs import RATIOS_FILE, RUN_FILE
from search.storage import Storage
from tests.search.landscapes import make_search, measure, work
from tests.search.test_report import best_above, make_plan, searched

NUM_STEPS = 12


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The plan of a finished search, recorded as the driver does at its end."""
    plan = searched(tmp_path_factory.mktemp("export"), "report.pictures=0")
    assert plan.search.finished
    begin_folder(plan, "command")
    return plan


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of its files in another place: the run's folder there."""
    cell = finished.folder.local.parent
    shutil.copytree(cell, tmp_path / "moved" / cell.name)
    return tmp_path / "moved" / cell.name / finished.folder.name


def read(plan, name):
    return plan.folder.read(name)


# --- the best ratios -------------------------------------------------------------------------


def test_the_file_says_which_ratios_won_and_where(finished):
    place = write_ratios(finished)
    found = RatiosFile.read(place.local)
    winner = finished.search.winner

    assert place == finished.folder / RATIOS_FILE
    assert (found.model, found.resolution) == ("shapes", Resolution(24, 40))
    assert (found.ratios, found.poa_weight) == (winner.ratios, 1.5)
    prompts = finished.prompt_sets["search"].prompts
    assert found.score == pytest.approx(
        statistics.fmean(best_above(winner.ratios, prompt) for prompt in prompts)
    )


def test_its_provenance_says_how_they_were_found(finished):
    write_ratios(finished)
    provenance = json.loads(read(finished, RATIOS_FILE))["provenance"]
    winner, sets = finished.search.winner, finished.prompt_sets
    reranked = [best_above(winner.ratios, prompt) for prompt in sets["rerank"].prompts]
    gains = [best_above(winner.ratios, prompt) for prompt in sets["validation"].prompts]
    steps = {step.evaluation.key for step in finished.search.steps}

    assert provenance["ledger_key"] == winner.key
    drawn, recipe = provenance["recipe"], asdict(finished.recipe)
    for name in ("model", "revision", "height", "width", "num_steps", "reward", "poa_weight"):
        assert drawn[name] == recipe[name]
    assert provenance["sparsity"] == winner.ratios.as_dict()
    assert provenance["num_prunable"] == finished.model.num_prunable()
    assert provenance["searcher"]["name"] == "annealing"
    assert provenance["seed"] == 0
    assert provenance["prompts"] == {
        name: {"digest": prompts.digest, "num_prompts": len(prompts)}
        for name, prompts in sets.items()
    }
    assert (provenance["num_steps"], provenance["num_failed"]) == (NUM_STEPS, 0)
    assert provenance["num_evaluations"] == len(steps)
    assert provenance["dense_score"] == 0.0
    assert provenance["rerank_score"] == pytest.approx(statistics.fmean(reranked))
    # The dense model has a reward of 0 on every prompt.
    assert provenance["validation"]["difference"] == pytest.approx(statistics.fmean(gains))
    assert provenance["validation"]["num_prompts"] == len(gains)
    assert provenance["validation"]["verdict"] == validated(finished).verdict
    assert provenance["use"]["pictures"] == finished.ledger.table().num_rows
    assert set(provenance["versions"]) == set(PACKAGES)


def test_the_score_of_the_reranking_is_the_winners(tmp_path):
    fresh = make_plan(tmp_path).prompt_sets["rerank"].prompts

    def rewards(ratios, prompt):
        """The best of the search is the worst on fresh prompts."""
        return best_above(ratios, prompt) * (-1 if prompt in fresh else 1)

    plan = searched(tmp_path, "report.pictures=0", "budget.steps=3", rewards=rewards)
    winner = plan.search.winner
    write_ratios(plan)
    provenance = json.loads(read(plan, RATIOS_FILE))["provenance"]

    assert winner.key != plan.search.candidates[0].key
    assert provenance["rerank_score"] == pytest.approx(
        statistics.fmean(rewards(winner.ratios, prompt) for prompt in fresh)
    )


def test_failed_evaluations_are_counted(tmp_path):
    plan = searched(tmp_path, "report.pictures=0", fails=lambda ratios: ratios.up > 0.5)
    write_ratios(plan)
    provenance = json.loads(read(plan, RATIOS_FILE))["provenance"]
    failed = {step.evaluation.key for step in plan.search.steps if step.evaluation.failure}

    assert provenance["num_failed"] == len(failed) > 0


@pytest.mark.parametrize(
    ("fails_on", "missing"),
    [("rerank", "rerank_score"), ("validation", "validation")],
)
def test_what_failed_is_null(tmp_path, fails_on, missing):
    plan = searched(tmp_path, "report.pictures=0", "budget.steps=2", fails_on=fails_on)
    write_ratios(plan)
    provenance = json.loads(read(plan, RATIOS_FILE))["provenance"]
    values = {name: provenance[name] for name in ("dense_score", "rerank_score", "validation")}

    assert [name for name, value in values.items() if value is None] == [missing]


@pytest.mark.parametrize(
    ("model", "source"),
    [
        (Model("shapes"), {"hub_id": "", "hub_revision": "main"}),
        (Model("sdxl", hub_id="a/b", hub_revision="c"), {"hub_id": "a/b", "hub_revision": "c"}),
        (Model("mine", path="FOLDER/mine", hub_id="a/b"), {"file": "mine"}),
        (
            Model("sdxl", path="FOLDER/mine.safetensors", hub_id="a/b", hub_revision="c"),
            {"hub_id": "a/b", "hub_revision": "c", "file": "mine.safetensors"},
        ),
    ],
    ids=["embedded", "hub", "folder", "checkpoint"],
)
def test_the_source_of_a_model_says_no_path_of_this_machine(tmp_path, model, source):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine.safetensors").touch()
    model = replace(model, path=model.path.replace("FOLDER", str(tmp_path)))

    assert source_of(model) == source


def test_writing_again_gives_the_same_bytes_and_leaves_the_file_its_age(finished):
    path = write_ratios(finished).local
    before = path.read_bytes()
    os.utime(path, (1000, 1000))
    write_ratios(finished)

    assert path.stat().st_mtime == 1000
    path.write_bytes(before[:-9])
    write_ratios(finished)
    assert path.read_bytes() == before
    assert path.stat().st_mtime > 1000


def test_an_unfinished_search_has_no_best_ratios(tmp_path):
    plan = searched(tmp_path, "report.pictures=0", most=5)

    with pytest.raises(ConfigError, match="this search is not finished: run it again"):
        write_ratios(plan)
    assert RATIOS_FILE not in plan.folder.files()
    assert validated(plan) is None


# --- the history -----------------------------------------------------------------------------


def history_of(plan, folder, search):
    """The rows that are written of another search than the plan's."""
    other = replace(plan, search=search, folder=Storage.at(folder))
    write_history(other)
    return pq.read_table(io.BytesIO(read(other, HISTORY_FILE))).to_pylist()


def test_its_columns_are_always_these(finished, tmp_path):
    columns = {
        "step": pa.int32(),
        "kind": pa.string(),
        **dict.fromkeys(GROUPS, pa.float64()),
        **dict.fromkeys(("poa_weight", "reward", "standard_error"), pa.float64()),
        "num_prompts": pa.int32(),
        "seconds": pa.float64(),
        "failure": pa.string(),
        "chain": pa.int32(),
        "event": pa.string(),
        "temperature": pa.float64(),
        "lost_race": pa.bool_(),
        "ledger_key": pa.string(),
    }
    begun = searched(tmp_path, "report.pictures=0", most=1)
    for plan in (finished, begun):
        write_history(plan)
        schema = pq.read_schema(io.BytesIO(read(plan, HISTORY_FILE)))

        assert dict(zip(schema.names, schema.types, strict=True)) == columns
        assert schema.names == list(columns)


def test_the_dense_model_is_first_then_the_steps_then_the_end(finished):
    write_history(finished)
    rows = pq.read_table(io.BytesIO(read(finished, HISTORY_FILE))).to_pylist()
    steps = finished.search.steps

    assert [row["kind"] for row in rows] == [
        "dense",
        *["search"] * NUM_STEPS,
        *["rerank"] * 3,
        "dense validation",
        "validation",
    ]
    assert [row["step"] for row in rows] == [None, *range(1, NUM_STEPS + 1), *[None] * 5]
    for row, step in zip(rows[1:], steps, strict=False):
        assert row["ledger_key"] == step.evaluation.key
        assert tuple(row[group] for group in GROUPS) == tuple(
            step.evaluation.ratios.as_dict().values()
        )
        assert (row["reward"], row["num_prompts"]) == (step.evaluation.mean, 4)
        assert (row["chain"], row["event"]) == (step.chain, step.event)
        assert row["temperature"] == step.temperature
        assert row["lost_race"] is False
    assert rows[-1]["ledger_key"] == finished.search.of("validation").key
    assert [rows[-1][group] for group in GROUPS] == [
        finished.search.winner.ratios[group] for group in GROUPS
    ]
    assert rows[-1]["standard_error"] == finished.search.of("validation").standard_error


def test_what_annealing_passed_by_comes_after_the_steps_without_a_number(finished, tmp_path):
    search = make_search(tmp_path / "ledger", annealing={"seed": 5, "min_step_size": 0.3})
    work(search, num_workers=6, seed=2)
    rows = history_of(finished, tmp_path, search)
    kinds = [row["kind"] for row in rows]
    passed = rows[1 + 20 : kinds.index("rerank")]
    taken = {step.evaluation.key for step in search.steps}

    assert [row["step"] for row in rows[1:21]] == list(range(1, 21))
    assert {row["ledger_key"] for row in passed} == {
        e.key for e in search.known_evaluations if e.key not in taken
    }
    assert passed
    assert all(row["step"] is row["event"] is row["lost_race"] is None for row in passed)


@pytest.mark.parametrize("num_workers", [1, 6])  # Six draw on while a race is being lost.
def test_a_lost_race_has_no_reward_but_says_how_far_it_got(finished, tmp_path, num_workers):
    search = make_search(tmp_path / "ledger", steps=20, race=Race(alpha=0.3, stride=2))
    work(search, num_workers, seed=1)
    rows = [row for row in history_of(finished, tmp_path, search) if row["step"]]
    lost = [row for row in rows if row["lost_race"]]

    assert [row["lost_race"] for row in rows] == [step.lost_race for step in search.steps]
    assert lost
    assert all(row["reward"] is row["standard_error"] is None for row in lost)
    assert all(row["num_prompts"] >= 2 for row in lost)
    assert all(row["reward"] is not None for row in rows if not row["lost_race"])


def test_a_failed_step_has_its_reason_and_no_reward(finished, tmp_path):
    def outcome(ratios, prompts):
        if ratios.down > 0.31:
            return {"failure": "NaN pictures", "transient": False}
        return {"measured": measure(ratios, prompts)}

    search = make_search(tmp_path / "ledger")
    work(search, outcome=outcome)
    rows = history_of(finished, tmp_path, search)
    failed = [row for row in rows if row["failure"] is not None]

    assert failed
    for row in failed:
        assert (row["failure"], row["reward"], row["num_prompts"]) == ("NaN pictures", None, 0)
        assert row["event"] == "fail"


# --- the plan of an earlier run --------------------------------------------------------------


def test_a_run_that_was_moved_is_found_where_it_is(finished, copied):
    plan = load_plan(copied)

    assert plan.key == finished.key
    assert plan.folder == Storage.at(copied)
    assert plan.search.replay()
    assert plan.search.num_drawn == 0
    assert plan.search.winner.key == finished.search.winner.key


@pytest.mark.parametrize("place", ["../{run}", "../../{cell}/{run}/."])
def test_a_run_is_found_from_beside_it(copied, monkeypatch, place):
    cell, beside = copied.parent, copied.parent / "ledger"
    monkeypatch.chdir(beside)

    found = load_plan(place.format(cell=cell.name, run=copied.name))
    assert found.folder == Storage.at(copied)
    assert all(path.suffix == ".parquet" for path in beside.iterdir())


@pytest.mark.parametrize("which", ["the run's", "the cell's"])
def test_a_renamed_folder_is_refused_and_nothing_is_made_in_its_place(copied, which):
    cell = copied.parent
    names = f"{cell.name}/{copied.name}"
    old = copied if which == "the run's" else cell
    new = old.rename(old.with_name("renamed"))
    place = new if which == "the run's" else new / copied.name

    with pytest.raises(ConfigError) as refused:
        load_plan(place)
    assert str(refused.value).startswith(f"{place} was renamed: call it {names} again, as its ")
    assert not old.exists()


def test_the_same_file_comes_from_the_ledger_alone(finished, copied):
    write_ratios(finished)
    plan = load_plan(copied)
    plan.search.replay()
    write_ratios(plan)

    assert read(plan, RATIOS_FILE) == read(finished, RATIOS_FILE)


def test_what_failed_then_stays_failed(tmp_path):
    plan = searched(
        tmp_path,
        "report.pictures=0",
        "trial.retry_failed=true",
        fails=lambda ratios: ratios.up > 0.5,
    )
    again = load_plan(plan.folder.local)

    assert again.search.replay()
    assert any(step.evaluation.failure for step in again.search.steps)


def test_results_of_earlier_settings_are_no_run(copied):
    earlier = copied / EARLIER / "20261121-072805"
    earlier.mkdir(parents=True)
    shutil.copy(copied / RUN_FILE, earlier)

    with pytest.raises(ConfigError, match="holds the results of earlier settings") as refused:
        load_plan(earlier)
    assert f"run the command in its {RUN_FILE} again" in str(refused.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record["config"]["render"].update(num_steps=99),
        lambda record: record["config"]["prompts"].update(seed=1),
        lambda record: record.update(key="0" * 16),
    ],
    ids=["recipe", "prompts", "key"],
)
def test_a_run_that_these_settings_do_not_give_is_refused(copied, change):
    record = json.loads((copied / RUN_FILE).read_text())
    change(record)
    (copied / RUN_FILE).write_text(json.dumps(record))

    with pytest.raises(ConfigError, match="was made with another model, reward or prompts"):
        load_plan(copied)


# --- the command line ------------------------------------------------------------------------


def test_the_command_writes_both_files_and_prints_the_place(finished, copied, capsys):
    write_ratios(finished)
    write_history(finished)
    (copied / RATIOS_FILE).unlink(missing_ok=True)

    assert main([str(copied)]) == 0
    assert capsys.readouterr().out == f"{copied / RATIOS_FILE}\n"
    assert (copied / RATIOS_FILE).read_bytes() == read(finished, RATIOS_FILE)
    written = pq.read_table(copied / HISTORY_FILE)
    assert written.equals(pq.read_table(finished.folder.local / HISTORY_FILE))


def test_the_command_says_in_one_line_why_there_is_nothing_to_export(tmp_path, capsys):
    plan = searched(tmp_path, "report.pictures=0", most=5)

    assert main([str(plan.folder)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == (
        f"error: {plan.folder}: this search is not finished: run it again, it goes on where it "
        "was\n"
    )
    # What there is so far can be looked at.
    rows = pq.read_table(plan.folder.local / HISTORY_FILE).to_pylist()
    assert len(rows) == 5
