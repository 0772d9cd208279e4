"""The benchmarks run and say what they measured; at toy size their figures mean nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from crdiff_core.pruning import num_prunable, target_layers
from crdiff_core.ratios import GROUPS
from tests.benchmarks import prune_pass, reference_way, trial_cost, trial_overhead
from tests.benchmarks.architectures import TOY_SDXL, UNETS, meta_unet
from tests.benchmarks.measuring import Goal
from tests.pipelines import save_sd, small_unet

# Diffusers' scheduler calls np.array on a tensor, which torch has not yet adapted to numpy 2.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
ROOT = Path(__file__).parents[2]
TOY = {"unets": {"toy": TOY_SDXL.unet}, "measured": {"toy": ("down", "mid")}}


@pytest.fixture(scope="module")
def sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd(tmp_path_factory.mktemp("benchmarks") / "model")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for one another on a busy machine take ten times as long."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


# Goals


@pytest.mark.parametrize(
    ("figure", "kind", "met"),
    [(3, "at least", True), (2, "at least", False), (3, "at most", True), (4, "at most", False)],
)
def test_a_goal_is_met_at_its_limit(figure, kind, met):
    goal = Goal("speed", figure, kind, 3)
    assert goal.met is met
    assert goal.as_json() == {"figure": figure, kind.replace(" ", "_"): 3, "met": met}


def test_a_goal_without_a_figure_is_neither_met_nor_missed():
    assert Goal("speed", None, "at least", 3).met is None


# Architectures


@pytest.mark.parametrize(
    ("model", "millions", "num_tensors", "num_parameters"),
    [
        ("sdxl", {"down": 550.5, "mid": 262.1, "up": 825.8}, 420, 2567.5),
        ("sd15", {"down": 68.8, "mid": 26.2, "up": 103.2}, 96, 859.5),
    ],
)
def test_the_full_sizes_are_the_real_models(model, millions, num_tensors, num_parameters):
    unet = meta_unet(UNETS[model])
    prunable = {group: round(count / 1e6, 1) for group, count in num_prunable(unet).items()}
    assert prunable == millions
    assert sum(len(target_layers(unet, group)) for group in GROUPS) == num_tensors
    num = sum(parameter.numel() for parameter in unet.parameters())
    assert round(num / 1e6, 1) == num_parameters


# The reference's way


def test_the_reference_way_prunes_the_same_layers():
    unet = small_unet()
    for group in GROUPS:
        expected = [layer.weight.data_ptr() for layer in target_layers(unet, group)]
        found = [weight.data_ptr() for weight in reference_way.group_weights(unet, group)]
        assert found == expected


# Prune pass


def test_the_prune_pass_compares_three_ways_and_their_masks(tmp_path, capsys):
    output = tmp_path / "result.json"
    code = prune_pass.main(["--device=cpu", "--num-repeats=2", f"--output={output}"], **TOY)
    result = json.loads(output.read_text())
    assert [(entry["model"], entry["group"]) for entry in result["entries"]] == [
        ("toy", "down"),
        ("toy", "mid"),
    ]
    for entry in result["entries"]:
        assert set(entry["median_ms"]) == {"ours", "reference", "copy"}
        assert entry["masks_equal"]
    assert result["machine"]["torch"] == torch.__version__
    assert len(result["goals"]) == 4
    assert ("MISSED" in capsys.readouterr().out) == bool(code)


def test_masks_that_differ_stop_the_prune_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(
        prune_pass, "reference_prune", lambda dense, _: [weight * 0 for weight in dense]
    )
    with pytest.raises(AssertionError, match="the masks differ"):
        prune_pass.main(["--device=cpu", f"--output={tmp_path / 'result.json'}"], **TOY)


# Trials


def test_the_trial_overhead_is_what_its_parts_leave(sd_folder, tmp_path, capsys):
    output = tmp_path / "result.json"
    code = trial_overhead.main(
        [f"--model-path={sd_folder}", "--num-prompts=2", "--num-repeats=1", f"--output={output}"]
    )
    result = json.loads(output.read_text())
    parts = result["median_s"]
    inside = parts["unet"] + parts["vae"] + parts["reward"]
    assert min(parts.values()) > 0
    assert parts["outside"] == pytest.approx(parts["total"] - inside, abs=1e-4)
    assert result["share_outside"] == pytest.approx(1 - inside / parts["total"], abs=1e-3)
    assert ("MISSED" in capsys.readouterr().out) == bool(code)


COST = ["--num-prompts=1", "--num-rounds=1", "--num-fast=1", "--resolution=16x24"]


def test_the_trial_cost_compares_three_ways_and_their_pictures(sd_folder, tmp_path, capsys):
    output = tmp_path / "result.json"
    code = trial_cost.main([*COST, f"--model-path={sd_folder}", f"--output={output}"])
    result = json.loads(output.read_text())
    seconds = result["median_s"]
    assert set(seconds) == {"ours", "naive", "reference"}
    assert seconds["reference"] == pytest.approx(
        sum(result["reference_process_median_s"].values()), abs=0.1
    )
    assert result["times_cheaper_than_naive"] == pytest.approx(
        seconds["naive"] / seconds["ours"], rel=0.01
    )
    assert result["largest_differences"]["naive_pictures"] < trial_cost.PICTURE_TOLERANCE
    assert ("MISSED" in capsys.readouterr().out) == bool(code)


def test_pictures_that_differ_stop_the_trial_cost(sd_folder, tmp_path, monkeypatch):
    class Untouched(trial_cost.ReferenceWay):
        def _picture(self, ratios, prompt):
            trial_cost.to_png(torch.zeros(3, 16, 24)).save(self.png(ratios, prompt))
            return 0.0

    monkeypatch.setattr(trial_cost, "ReferenceWay", Untouched)
    with pytest.raises(AssertionError, match="the reference's differ"):
        trial_cost.main([*COST, f"--model-path={sd_folder}", f"--output={tmp_path / 'r.json'}"])


# GPU

WITHOUT_THE_SEARCHS_PACKAGES = """
import runpy, sys
for name in ("ray", "hydra", "omegaconf", "mlflow", "optuna", "pyarrow"):
    sys.modules[name] = None
runpy.run_module("tests.benchmarks.gpu", run_name="__main__", alter_sys=True)
"""


def test_the_gpu_benchmark_runs_at_toy_size_with_torch_and_diffusers_alone(tmp_path):
    output = tmp_path / "result.json"
    # Too little time for whole UNets, which take longest to trace.
    arguments = ["--toy", "--budget-s=199", f"--output={output}"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_SEARCHS_PACKAGES, *arguments],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert result["note"] == "not measured: no CUDA device; toy size"
    assert result["note"] in done.stdout
    assert result["goals"] == {}
    assert result["failed"] == {}
    assert list(result["not_measured"]) == ["trial of 1 prompts, graphs"]
    assert "left of the budget" in result["not_measured"]["trial of 1 prompts, graphs"]
    compiled = result["measurements"]["trial of 2 prompts, blocks"]
    assert compiled["recompiled"] is False
    assert compiled["mean_difference_from_eager"] < 1e-4
