"""The whole path on the embedded model: real Ray, real MLflow, real pictures."""

import json
import shutil
import sqlite3
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient

import crdiff_core
from crdiff_core.models import Model
from search import run, sync
from search.batching import batch_length, batches, filled
from search.export import load_plan
from search.lease import Lease
from search.runs import Run
from search.storage import Storage
from tests.searches import SMALL, num_drawn, search


def test_it_prints_verdict_ratios_and_how_to_go_on(finished):
    lines = {line.split("  ")[0] for line in finished.printed.splitlines()}

    assert {"against dense", "best ratios", "search prompts", "ratios file", "dashboard"} <= lines
    assert "(down / mid / up), the best of 3 on fresh prompts" in finished.printed
    # Dense and four triples on 8 prompts, the best three on 4, winner and dense on 8, and for the
    # report the pruned model alone on those of the last 8 that tell most.
    for_report = num_drawn(finished.printed) - (5 * 8 + 3 * 4 + 2 * 8)
    assert 6 <= for_report <= 8


def test_without_a_terminal_progress_is_plain_lines(finished):
    assert "11/11 evaluations, best " in finished.printed
    assert "\x1b" not in finished.printed
    assert "\r" not in finished.printed


def test_the_list_of_searches_says_what_it_found(finished):
    run = Run.read(Storage.at(finished.folder))
    exported = json.loads((finished.folder / "best_ratios.json").read_text())

    assert (run.state, run.num_steps, run.max_steps) == ("finished", 4, 4)
    assert run.num_pictures == num_drawn(finished.printed)
    assert run.ratios[1] == exported["best_global_params_ratio"]["mid_ratio"]
    assert run.comparison.num_prompts == 8
    recorded = json.loads((finished.folder / "run.json").read_text())["standing"]
    assert tuple(recorded["ratios"]) == run.ratios


def again(finished):
    return run.main, *SMALL, f"output={finished.output}"


def test_the_same_command_draws_nothing_and_answers_the_same(finished, command):
    before = (finished.folder / "best_ratios.json").read_bytes()
    code, printed, errors = command(*again(finished))

    assert code == 0, errors
    assert num_drawn(printed) == 0
    assert (finished.folder / "best_ratios.json").read_bytes() == before
    verdicts = [
        [line for line in text.splitlines() if line.startswith("against dense")]
        for text in (printed, finished.printed)
    ]
    assert verdicts[0] == verdicts[1]


def test_a_second_driver_of_a_search_is_refused_in_one_line(finished, command):
    with Lease(Storage.at(finished.folder)):
        code, _, errors = command(*again(finished))

    assert code == 2
    assert errors.startswith("error: another driver works on this search (process")
    assert errors.count("\n") == 1


def test_the_exported_file_has_the_references_keys_and_ours(finished):
    exported = json.loads((finished.folder / "best_ratios.json").read_text())

    assert exported["model_config"] == {"name": "shapes", "width": 40, "height": 24}
    assert set(exported["best_global_params_ratio"]) == {"down_ratio", "up_ratio", "mid_ratio"}
    assert set(exported) == {
        "model_config",
        "best_avg_score",
        "best_global_params_ratio",
        "pruning_method",
        "poa_weight",
        "provenance",
    }
    provenance = exported["provenance"]
    assert provenance["validation"]["num_prompts"] == 8
    assert (provenance["num_steps"], provenance["num_evaluations"]) == (4, 4)
    assert provenance["use"]["pictures"] == num_drawn(finished.printed)
    # Of a build, such as +cpu, one or the other says nothing.
    assert provenance["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_the_exported_file_works_in_diffusers_code(finished):
    pipe = Model("shapes").load(torch.device("cpu"))
    crdiff_core.apply(pipe, finished.folder / "best_ratios.json")
    image = pipe(
        "a big red circle on a white background", height=24, width=40, num_inference_steps=2
    ).images[0]

    assert image.size == (40, 24)


def test_the_ledger_has_every_reward_once(finished):
    rows = pq.read_table(finished.folder.parent / "ledger").to_pylist()
    keys = {(row["key"], row["prompt"], row["seed"]) for row in rows}

    assert len(rows) == len(keys) == num_drawn(finished.printed)
    assert all(0 <= row["reward"] <= 1 for row in rows)


def test_every_row_says_what_else_moves_its_digits(finished):
    rows = pq.read_table(finished.folder.parent / "ledger").to_pylist()

    assert {row["torch"] for row in rows} == {torch.__version__}
    assert {row["compile"] for row in rows} == {"none"}
    (device,) = {row["device"] for row in rows}
    assert device.startswith("cpu ")


@pytest.mark.slow
@pytest.mark.parametrize("racing", ["off", "on"])
def test_one_and_two_workers_find_the_same(tmp_path, environment, racing):
    """Really in parallel: two workers evaluate ahead what one does not."""
    arguments = ("budget.steps=8", "searcher.space_filling=2", "tracking=none")
    arguments += ("render.batch_size=8", "render.num_steps=2", f"racing={racing}")
    arguments += ("prompts.search=16", "racing.stride=8", "racing.alpha=0.4")
    exported, drawn_by = [], []
    for num_workers in (1, 2):
        output = tmp_path / str(num_workers)
        done = search(output, environment, *arguments, f"cluster.num_workers={num_workers}")
        assert done.returncode == 0, done.stdout + done.stderr
        folder = output / "shapes_24x40" / f"annealing{'-racing' * (racing == 'on')}-seed0"
        found = json.loads((folder / "best_ratios.json").read_text())
        assert found["provenance"].pop("use").keys() == {
            *("evaluations", "pictures", "gpu_hours", "wall_hours")
        }
        exported.append(found)
        drawn_by.append(num_drawn(done.stdout))
        history = pq.read_table(folder / "history.parquet").to_pylist()
        assert [row["step"] for row in history if row["step"]] == list(range(1, 9))

    assert exported[0] == exported[1]
    assert drawn_by[0] <= drawn_by[1]


@pytest.fixture
def one_thread():
    """As a trial on the CPU has: the number of threads decides the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_rewards_do_not_depend_on_who_draws_them(finished):
    from crdiff_core.evaluation import evaluate
    from crdiff_core.replica import Replica
    from crdiff_core.rewards import load_reward

    plan = load_plan(finished.folder)
    plan.search.replay()
    winner = plan.search.winner
    replica = Replica(
        plan.model.load(torch.device("cpu")),
        plan.config.res,
        num_steps=plan.recipe.num_steps,
        guidance_scale=plan.recipe.guidance_scale,
        poa_weight=plan.recipe.poa_weight,
    )
    reward = load_reward("shapes")
    prompts, size = winner.prompts.prompts, plan.search.batch_size
    rewards = []
    for batch in batches(len(prompts), size):
        drawn = [prompts[number] for number in filled(batch, batch_length(len(prompts), size))]
        rewards += evaluate(replica, winner.ratios, drawn, reward).rewards[: len(batch)]

    assert rewards == list(winner.rewards)


def test_mlflow_has_a_parent_run_and_a_child_for_each_evaluation(finished):
    client = MlflowClient(f"sqlite:///{finished.output}/mlflow.db")
    experiment = client.get_experiment_by_name("crdiff-search")
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "crdiff.run" in run.data.tags]

    assert len(parents) == 1
    assert len(runs) == 1 + 11
    assert {"best_reward", "reward", "temperature", "dense_reward"} <= set(parents[0].data.metrics)


def written(folder):
    """All that the files of a folder say, tables and databases decoded."""
    for file in folder.rglob("*"):
        if file.is_file():
            yield file, file.read_bytes()
        if file.suffix == ".parquet":
            table = pq.read_table(file)
            yield file, f"{table.schema.metadata} {table.to_pydict()}".encode()
        if file.suffix == ".db":
            database = sqlite3.connect(file)
            yield file, "\n".join(database.iterdump()).encode()
            database.close()


def test_no_secret_is_written_or_printed(finished):
    said = [*written(Path(finished.output)), *written(Path(finished.ray_files))]
    said += [("stdout", finished.printed.encode()), ("stderr", finished.errors.encode())]
    names = {Path(place).name for place, _ in said}
    assert {"run.json", "best_ratios.json", "history.parquet", "mlflow.db"} <= names
    assert {"gcs_server.out", "raylet.out", "runtime_env_agent.log"} <= names
    assert any(b"crdiff.evaluation" in data for place, data in said if "mlflow.db" in str(place))
    prompt = pq.read_table(finished.folder.parent / "ledger")["prompt"][0].as_py().encode()
    assert any(prompt in data for place, data in said if Path(place).parent.name == "ledger")

    for name, secret in finished.secrets.items():
        assert [place for place, data in said if secret.encode() in data] == [], name


def test_sync_fills_what_mlflow_has_lost(finished, tmp_path, command):
    output = tmp_path / "copy"
    shutil.copytree(finished.output, output)
    (output / "mlflow.db").unlink()
    record = output / "shapes_24x40" / "annealing-seed0" / "run.json"
    record.rename(tmp_path / "run.json")
    assert command(sync.main, output) == (
        2,
        "",
        f"error: {output}: no search is there: give a run's folder, or the output of searches\n",
    )

    (tmp_path / "run.json").rename(record)
    code, printed, errors = command(sync.main, output)
    assert code == 0, errors
    assert printed == f"{output}/shapes_24x40/annealing-seed0: 11 evaluations, FINISHED\n"
    client = MlflowClient(f"sqlite:///{output}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("crdiff-search").experiment_id])
    assert len(runs) == 1 + 11
    assert {run.info.status for run in runs} == {"FINISHED"}


@pytest.mark.slow
def test_another_searcher_of_the_cell_shares_the_ledger(finished, environment):
    done = search(finished.output, environment, "searcher=random", "tracking=none")

    # The dense model is known already, on search and validation prompts.
    assert done.returncode == 0, done.stderr
    assert num_drawn(done.stdout) <= 4 * 8 + 3 * 4 + 8 + 8
