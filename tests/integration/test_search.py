"""The whole path on the embedded model: real Ray, real MLflow, real pictures."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient

import crdiff_core
from crdiff_core.models import Model
from search.export import load_plan
from search.runs import Run
from search.storage import Storage
from tests.integration.conftest import SECRETS, search

ROOT = Path(__file__).parents[2]


def drawn(printed):
    """The number of pictures that a run says it drew."""
    line = next(line for line in printed.splitlines() if line.startswith("pictures"))
    return 0 if "nothing was drawn" in line else int(line.split()[1])


def test_it_prints_verdict_ratios_and_how_to_go_on(finished):
    lines = {line.split("  ")[0] for line in finished.printed.splitlines()}

    assert {"against dense", "best ratios", "search prompts", "ratios file", "dashboard"} <= lines
    assert "(down / mid / up), the best of 3 on fresh prompts" in finished.printed
    # Dense and four triples on 8 prompts, the best three on 4, winner and dense on 8, and for the
    # report the pruned model alone on those of the last 8 that tell most.
    for_report = drawn(finished.printed) - (5 * 8 + 3 * 4 + 2 * 8)
    assert 6 <= for_report <= 8


def test_without_a_terminal_progress_is_plain_lines(finished):
    assert "11/11 evaluations, best " in finished.printed
    assert "\x1b" not in finished.printed
    assert "\r" not in finished.printed


def test_the_list_of_searches_says_what_it_found(finished):
    run = Run.read(Storage.at(finished.folder))
    exported = json.loads((finished.folder / "best_ratios.json").read_text())

    assert (run.state, run.num_steps, run.max_steps) == ("finished", 4, 4)
    assert run.num_pictures == drawn(finished.printed)
    assert run.ratios[1] == exported["best_global_params_ratio"]["mid_ratio"]
    assert run.comparison.num_prompts == 8
    recorded = json.loads((finished.folder / "run.json").read_text())["standing"]
    assert tuple(recorded["ratios"]) == run.ratios


def test_the_same_command_draws_nothing_and_answers_the_same(finished):
    before = (finished.folder / "best_ratios.json").read_bytes()
    again = subprocess.run(
        finished.command,
        cwd="/",
        env=finished.environment,
        capture_output=True,
        text=True,
        check=True,
    )

    assert drawn(again.stdout) == 0
    assert (finished.folder / "best_ratios.json").read_bytes() == before
    summary = [line for line in finished.printed.splitlines() if line.startswith("against dense")]
    assert summary == [
        line for line in again.stdout.splitlines() if line.startswith("against dense")
    ]


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
    assert provenance["use"]["pictures"] == drawn(finished.printed)
    assert provenance["versions"]["torch"] == torch.__version__


def test_the_exported_file_works_in_diffusers_code(finished):
    pipe = Model("shapes").load(torch.device("cpu"))
    crdiff_core.apply(pipe, finished.folder / "best_ratios.json")
    image = pipe(
        "a big red circle on a white background", height=24, width=40, num_inference_steps=2
    ).images[0]

    assert image.size == (40, 24)


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
        _, done = search(output, environment, *arguments, f"cluster.num_workers={num_workers}")
        assert done.returncode == 0, done.stdout + done.stderr
        folder = output / "shapes_24x40" / f"annealing{'-racing' * (racing == 'on')}-seed0"
        found = json.loads((folder / "best_ratios.json").read_text())
        assert found["provenance"].pop("use").keys() == {
            *("evaluations", "pictures", "gpu_hours", "wall_hours")
        }
        exported.append(found)
        drawn_by.append(drawn(done.stdout))
        history = pq.read_table(folder / "history.parquet").to_pylist()
        assert [row["step"] for row in history if row["step"]] == list(range(1, 9))

    assert exported[0] == exported[1]
    assert drawn_by[0] <= drawn_by[1]


def test_export_writes_the_same_file_from_the_ledger(finished):
    path = finished.folder / "best_ratios.json"
    before = path.read_bytes()
    path.unlink()
    subprocess.run(
        [sys.executable, "-m", "search.export", finished.folder],
        cwd="/",
        check=True,
        env=finished.environment,
    )

    assert path.read_bytes() == before


def test_export_of_earlier_results_is_one_line(finished, tmp_path):
    earlier = tmp_path / "earlier" / "20261121-072805"
    earlier.mkdir(parents=True)
    (earlier / "run.json").write_text((finished.folder / "run.json").read_text())
    done = subprocess.run(
        [sys.executable, "-m", "search.export", earlier],
        cwd="/",
        env=finished.environment,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 2
    assert "holds the results of earlier settings" in done.stderr
    assert done.stderr.count("\n") == 1
    assert [path.name for path in earlier.iterdir()] == ["run.json"]


def test_the_ledger_has_every_reward_once(finished):
    rows = pq.read_table(finished.folder.parent / "ledger").to_pylist()
    keys = {(row["key"], row["prompt"], row["seed"]) for row in rows}

    assert len(rows) == len(keys) == drawn(finished.printed)
    assert all(0 <= row["reward"] <= 1 for row in rows)


def test_an_export_whose_model_has_changed_is_refused(finished, tmp_path):
    folder = tmp_path / "shapes_24x40" / "annealing-seed0"
    folder.mkdir(parents=True)
    record = json.loads((finished.folder / "run.json").read_text())
    record["config"]["render"]["num_steps"] += 1
    (folder / "run.json").write_text(json.dumps(record))
    refused = subprocess.run(
        [sys.executable, "-m", "search.export", folder],
        cwd="/",
        env=finished.environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert refused.returncode == 2
    assert "was made with another model, reward or prompts" in refused.stderr


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
    prompts, size = winner.prompts.prompts, plan.search.batching.size(8)
    batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    rewards = [
        value
        for batch in batches
        for value in evaluate(replica, winner.ratios, batch, reward).rewards
    ]

    assert rewards == pytest.approx(list(winner.rewards), abs=1e-5)


def test_mlflow_has_a_parent_run_and_a_child_for_each_evaluation(finished):
    client = MlflowClient(f"sqlite:///{finished.output / 'mlflow.db'}")
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


def test_no_secret_is_written_or_printed(finished, ray_tmpdir):
    said = [*written(finished.output), *written(Path(ray_tmpdir))]
    said += [("stdout", finished.printed.encode()), ("stderr", finished.errors.encode())]
    names = {Path(place).name for place, _ in said}
    assert {"run.json", "best_ratios.json", "history.parquet", "mlflow.db"} <= names
    assert {"gcs_server.out", "raylet.out", "runtime_env_agent.log"} <= names
    assert any(b"crdiff.evaluation" in data for place, data in said if "mlflow.db" in str(place))
    prompt = pq.read_table(finished.folder.parent / "ledger")["prompt"][0].as_py().encode()
    assert any(prompt in data for place, data in said if Path(place).parent.name == "ledger")

    for name, secret in SECRETS.items():
        assert [place for place, data in said if secret.encode() in data] == [], name


def test_sync_fills_what_mlflow_has_lost(finished, tmp_path):
    output = tmp_path / "copy"
    shutil.copytree(finished.output, output)
    (output / "mlflow.db").unlink()
    (output / "shapes_24x40" / "annealing-seed0" / "run.json").rename(tmp_path / "run.json")

    def sync(folder):
        return subprocess.run(
            [sys.executable, "-m", "search.sync", folder],
            cwd="/",
            env=finished.environment,
            capture_output=True,
            text=True,
            check=False,
        )

    nothing = sync(output)
    assert nothing.returncode == 2
    assert nothing.stderr == (
        f"error: {output}: no search is there: give a run's folder, or the output of searches\n"
    )

    (tmp_path / "run.json").rename(output / "shapes_24x40" / "annealing-seed0" / "run.json")
    done = sync(output)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{output}/shapes_24x40/annealing-seed0: 11 evaluations, FINISHED\n"
    client = MlflowClient(f"sqlite:///{output / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("crdiff-search").experiment_id])
    assert len(runs) == 1 + 11
    assert {run.info.status for run in runs} == {"FINISHED"}


@pytest.mark.slow
def test_another_searcher_of_the_cell_shares_the_ledger(finished):
    _, done = search(finished.output, finished.environment, "searcher=random", "tracking=none")

    # The dense model is known already, on search and validation prompts.
    assert done.returncode == 0, done.stderr
    assert drawn(done.stdout) <= 4 * 8 + 3 * 4 + 8 + 8


def test_ctrl_c_keeps_everything_and_says_how_to_go_on(tmp_path, environment, finished):
    command = [str(part) for part in finished.command if not part.startswith("output=")]
    command.append(f"output={tmp_path}")
    process = subprocess.Popen(
        command,
        cwd="/",
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    ledger = tmp_path / "shapes_24x40" / "ledger"
    deadline = time.monotonic() + 120
    while len(list(ledger.glob("*.parquet"))) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    known = pq.read_table(ledger).num_rows

    assert process.returncode == 130
    assert "nothing measured is lost. To go on: python -m search.run" in errors
    assert "Traceback" not in errors

    # Going on to the same end is tested with harder ways to stop: tests/integration/faults.
    plan = load_plan(tmp_path / "shapes_24x40" / "annealing-seed0")
    assert not plan.search.replay()
    assert plan.search.num_known == known > 0


def test_a_wheel_works_from_any_folder(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    site = tmp_path / "site"
    zipfile.ZipFile(next(tmp_path.glob("*.whl"))).extractall(site)
    found = subprocess.run(
        [
            sys.executable,
            "-c",
            "from search.run import CONF, main; print(CONF); main()",
            "prompts.search=100000",
            f"output={tmp_path}",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )

    # It composed its own conf, found its own weights, and only then refused.
    assert found.stdout.splitlines()[0] == str(site / "search" / "conf")
    assert (site / "search" / "templates" / "report.html").is_file()
    assert "distinct prompts and 100000 search" in found.stderr
