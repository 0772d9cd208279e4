"""Searches of the real model families, on small pipelines of their own classes."""

import json

import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient

import crdiff_core
from crdiff_core.models import Model
from crdiff_core.rewards.image_reward import Architecture
from search.export import load_plan
from tests.core.test_image_reward import random_weights
from tests.searches import num_drawn, search

SIZE = (16, 24)


@pytest.fixture(scope="module", params=["sdxl", pytest.param("sd15", marks=pytest.mark.slow)])
def searched(request, tmp_path_factory, environment, sd_folder, sdxl_folder):
    """One search of each: its name, its model's folder, its own folder and what it printed."""
    folder = {"sdxl": sdxl_folder, "sd15": sd_folder}[request.param]
    output = tmp_path_factory.mktemp(request.param)
    done = search(
        output,
        environment,
        f"model={request.param}",
        f"model.path='{folder}'",
        "model.dtype=float32",
        "res=16x24",
        # The captions' detector stands in for ImageReward, whose weights are gigabytes.
        "reward=shapes",
        "prompts=shapes",
        "render.num_steps=2",
        "report.pictures=2",
        # Else its resized pictures would be of a million pixels.
        "model.native_res=32x32",
        *(("render.size_conditioning=native",) if request.param == "sdxl" else ()),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return request.param, folder, output, done.stdout


def run_folder(name, output):
    return output / f"{name}_16x24" / "annealing-seed0"


def test_the_ledger_has_a_reward_for_every_picture_drawn(searched):
    name, _, output, printed = searched
    rows = pq.read_table(output / f"{name}_16x24" / "ledger").to_pylist()

    assert len(rows) == num_drawn(printed) > 0
    assert all(row["reward"] is not None and row["failure"] is None for row in rows)
    assert {row["size_conditioning"] for row in rows} == {
        "32x32" if name == "sdxl" else "requested"
    }


def test_mlflow_has_an_evaluation_for_every_ratio_triple(searched):
    name, _, output, _ = searched
    client = MlflowClient(f"sqlite:///{output / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("crdiff-search")
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "crdiff.run" in run.data.tags]

    assert [run.info.status for run in runs] == ["FINISHED"] * len(runs)
    assert [run.data.tags["model"] for run in parents] == [name]
    # Dense, four triples, three of them again, winner and dense again, and for the report the
    # pruned model alone and the dense one at its native size.
    assert len(runs) == 1 + 12


def test_the_exported_file_works_in_diffusers_code(searched):
    name, folder, output, _ = searched
    path = run_folder(name, output) / "best_ratios.json"
    exported = json.loads(path.read_text())
    pipe = Model(name, str(folder)).load(torch.device("cpu"))
    crdiff_core.apply(pipe, path)
    image = pipe("a cat", height=16, width=24, num_inference_steps=2).images[0]

    # As the reference's scripts spell it.
    spelled = {"sdxl": "sdxl", "sd15": "sd1.5"}[name]
    assert exported["model_config"] == {"name": spelled, "width": 24, "height": 16}
    assert pipe.unet.replica.sparsity() == pytest.approx(exported["provenance"]["sparsity"])
    assert image.size == (24, 16)


def test_the_batch_size_is_recorded_with_the_run(searched):
    name, _, output, _ = searched
    record = json.loads((run_folder(name, output) / "run.json").read_text())

    assert record["batch_size"] >= 1
    again = load_plan(run_folder(name, output))
    assert again.search.batch_size == record["batch_size"]


def test_a_gpu_that_is_not_up_yet_is_said_before_a_cpu_is_kept_busy_for_days(
    tmp_path, environment, sdxl_folder
):
    done = search(
        tmp_path,
        environment,
        "model=sdxl",
        f"model.path='{sdxl_folder}'",
        "res=16x24",
        "reward=shapes",
        "prompts=shapes",
    )

    assert done.returncode == 2
    assert done.stderr.startswith("error: the cluster has no GPU and sdxl is in float16")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_sdxl_is_searched_by_imagereward_of_full_size(tmp_path, environment, sdxl_folder):
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["[PAD]", *(f"[unused{i}]" for i in range(99))]
    vocabulary += ["[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    vocabulary += [f"[more{i}]" for i in range(30522 - len(vocabulary))]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    torch.save(random_weights(0, Architecture(), 0.03), tmp_path / "ImageReward.pt")
    done = search(
        tmp_path / "runs",
        environment,
        "model=sdxl",
        f"model.path='{sdxl_folder}'",
        "model.dtype=float32",
        "res=16x24",
        f"reward.path='{tmp_path / 'ImageReward.pt'}'",
        f"reward.tokenizer='{tmp_path}'",
        "render.num_steps=2",
        "budget.steps=2",
        "prompts.search=2",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = pq.read_table(tmp_path / "runs" / "sdxl_16x24" / "ledger").to_pylist()

    assert {row["reward_name"] for row in rows} == {"image_reward"}
    assert all(row["reward_version"].startswith("v1.0-") for row in rows)
    assert len({row["reward"] for row in rows}) > 2
    (tmp_path / "ImageReward.pt").unlink()  # Gigabytes, which pytest would keep.
