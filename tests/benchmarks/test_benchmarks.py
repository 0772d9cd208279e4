"""The benchmarks run and say what they measured; at toy size their figures mean nothing."""

from __future__ import annotations

import json

import pytest
import torch

from tests.benchmarks import prune_pass, trial_overhead
from tests.pipelines import save_sd, small_unet


def test_the_prune_pass_compares_three_ways_and_their_masks(tmp_path, capsys):
    with torch.device("meta"):
        unet = small_unet()
    output = tmp_path / "result.json"
    code = prune_pass.main(["--device=cpu", "--num-repeats=2", f"--output={output}"], unet)
    result = json.loads(output.read_text())
    assert set(result["median_ms"]) == {"ours", "reference", "copy"}
    assert result["masks_equal"]
    assert result["machine"]["torch"] == torch.__version__
    assert ("MISSED" in capsys.readouterr().out) == bool(code)


def test_masks_that_differ_stop_the_prune_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(
        prune_pass, "reference_prune", lambda dense, _: [weight * 0 for weight in dense]
    )
    with torch.device("meta"):
        unet = small_unet()
    with pytest.raises(AssertionError, match="the masks differ"):
        prune_pass.main(["--device=cpu", f"--output={tmp_path / 'result.json'}"], unet)


def test_the_real_size_is_sd15s_up_group():
    layers = prune_pass.target_layers(prune_pass.sd15_unet(), prune_pass.GROUP)
    assert round(sum(layer.weight.numel() for layer in layers) / 1e6, 1) == 103.2


# Diffusers' scheduler calls np.array on a tensor, which torch has not yet adapted to numpy 2.
@pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
def test_the_trial_overhead_is_what_its_parts_leave(tmp_path, capsys):
    folder = save_sd(tmp_path / "model")
    output = tmp_path / "result.json"
    code = trial_overhead.main(
        [f"--model-path={folder}", "--num-prompts=2", "--num-repeats=1", f"--output={output}"]
    )
    result = json.loads(output.read_text())
    parts = result["median_s"]
    inside = parts["unet"] + parts["vae"] + parts["reward"]
    assert min(parts.values()) > 0
    assert parts["outside"] == pytest.approx(parts["total"] - inside, abs=1e-4)
    assert result["share_outside"] == pytest.approx(1 - inside / parts["total"], abs=1e-3)
    assert ("MISSED" in capsys.readouterr().out) == bool(code)
