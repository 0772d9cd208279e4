"""Ratios, resolutions and the file in which both travel."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crdiff_core import BlockRatios, RatiosFile, Resolution
from crdiff_core.errors import CRDiffError, RatiosError
from crdiff_core.ratios import GROUPS, group_of

REFERENCE = {
    "model_config": {"name": "sdxl", "width": 360, "height": 480},
    "best_avg_score": 0.71,
    "best_global_params_ratio": {"down_ratio": 0.43, "up_ratio": 0.36, "mid_ratio": 0.5},
}
"""A file as the reference implementation writes it."""

unit = st.floats(0, 1, exclude_max=True)


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def changed(**changes: Any) -> dict[str, Any]:
    return {**REFERENCE, **changes}


def with_ratio(value: Any) -> dict[str, Any]:
    return changed(
        best_global_params_ratio={**REFERENCE["best_global_params_ratio"], "up_ratio": value}
    )


# Block ratios


@given(down=unit, mid=unit, up=unit)
def test_ratios_in_range_are_kept(down, mid, up):
    assert BlockRatios(down, mid, up).as_dict() == {"down": down, "mid": mid, "up": up}


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("value", [1, 1.2, -0.1, -1e-300, math.nan, math.inf, -math.inf, 10**400])
def test_a_ratio_outside_the_range_is_refused(group, value):
    with pytest.raises(RatiosError, match=rf"^{group} ratio .* is outside \[0, 1\): give"):
        BlockRatios(**{group: value})


@pytest.mark.parametrize("value", ["0.3", None, True, [0.3], 1j])
def test_a_ratio_that_is_no_number_is_refused(value):
    with pytest.raises(RatiosError, match=r"^mid ratio .* is not a number: give"):
        BlockRatios(mid=value)


def test_a_numpy_ratio_becomes_a_plain_float():
    assert type(BlockRatios(down=np.float64(0.25)).down) is float


def test_ratios_are_dense_only_if_all_are_zero():
    assert BlockRatios().is_dense
    assert not BlockRatios(mid=0.1).is_dense


def test_equal_ratios_are_one_key():
    assert len({BlockRatios(0, 0.5, 0.25), BlockRatios(0.0, 0.5, 0.25)}) == 1


def test_a_ratios_error_is_what_users_catch():
    assert issubclass(RatiosError, CRDiffError)
    assert issubclass(RatiosError, ValueError)


# Groups


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight", "down"),
        ("mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj.weight", "mid"),
        ("up_blocks.2.attentions.1.transformer_blocks.0.attn1.to_out.0.weight", "up"),
        ("up_blocks.2.attentions.1.transformer_blocks.0.attn2.to_out.0.weight", None),
        ("up_blocks.2.attentions.1.proj_in.weight", None),
        ("up_blocks.2.resnets.0.conv1.weight", None),
        ("controlnet_up_blocks.0.attn1.to_q.weight", None),
        ("attn1.to_q.weight", None),
        # As peft names what a LoRA is for, and the LoRA itself.
        ("up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.base_layer.weight", "up"),
        ("up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.style.weight", None),
        ("mid_block.attentions.0.transformer_blocks.0.ff.net.2.lora_B.style.weight", None),
    ],
)
def test_a_layers_group_is_told_by_its_name(name, group):
    assert group_of(name) == group


# Resolutions


def test_a_resolutions_height_comes_first():
    assert Resolution.parse("480x360") == Resolution(height=480, width=360)


@given(height=st.integers(1, 99_999), width=st.integers(1, 99_999))
def test_a_resolution_is_read_as_it_is_written(height, width):
    resolution = Resolution(height, width)
    assert Resolution.parse(str(resolution)) == resolution


@pytest.mark.parametrize(
    ("size", "native", "found"),
    [
        ("480x360", "1024x1024", "1184x888"),
        ("1536x1536", "1024x1024", "1024x1024"),
        ("400x560", "512x512", "432x608"),
        ("24x40", "32x32", "24x40"),
        ("8x4096", "32x32", "8x728"),
    ],
)
def test_a_size_of_the_same_shape_and_the_native_area(size, native, found):
    assert str(Resolution.parse(size).scaled_to(Resolution.parse(native))) == found


@pytest.mark.parametrize("text", ["480", "480X360", "0x8", "-8x8", "8x8x8", "8.0x8", "", "a x b"])
def test_what_is_no_resolution_is_refused(text):
    with pytest.raises(RatiosError, match="is not HEIGHTxWIDTH: write it as 480x360"):
        Resolution.parse(text)


# Files


def test_a_file_is_read_as_it_was_written(tmp_path):
    file = RatiosFile(
        model="shapes",
        resolution=Resolution(24, 40),
        score=-0.125,
        ratios=BlockRatios(0.1, 0.2, 0.3),
        poa_weight=1.25,
        provenance={"seeds": [1, 2], "num_prunable": {"down": 1}},
    )
    file.write(tmp_path / "best_ratios.json")
    assert RatiosFile.read(tmp_path / "best_ratios.json") == file


def test_the_references_scripts_find_exactly_their_keys_first(tmp_path):
    RatiosFile("sdxl", Resolution(480, 360), 0.71, BlockRatios(0.43, 0.5, 0.36)).write(
        tmp_path / "file"
    )
    written = json.loads((tmp_path / "file").read_text())
    assert {key: written[key] for key in REFERENCE} == REFERENCE
    assert list(written)[:3] == list(REFERENCE)


# As the reference's scripts spell the models whose weights they can load.
@pytest.mark.parametrize(
    ("model", "spelling"),
    [("sdxl", "sdxl"), ("sd15", "sd1.5"), ("sd21", "sd2.1"), ("shapes", "shapes")],
)
def test_a_models_name_is_written_as_the_reference_spells_it_and_read_back(
    tmp_path, model, spelling
):
    file = RatiosFile(model, Resolution(480, 360), 0.71, BlockRatios(0.43, 0.5, 0.36), 1.5)
    file.write(tmp_path / "file")
    assert json.loads((tmp_path / "file").read_text())["model_config"]["name"] == spelling
    assert RatiosFile.read(tmp_path / "file") == file


def test_the_references_file_is_readable(tmp_path):
    assert RatiosFile.read(write(tmp_path / "file", REFERENCE)) == RatiosFile(
        model="sdxl",
        resolution=Resolution(height=480, width=360),
        score=0.71,
        ratios=BlockRatios(down=0.43, mid=0.5, up=0.36),
        poa_weight=None,
    )


def test_a_score_that_is_no_number_is_not_written(tmp_path):
    file = RatiosFile("sdxl", Resolution(8, 8), math.nan, BlockRatios())
    with pytest.raises(ValueError, match="not JSON compliant"):
        file.write(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_writing_leaves_no_draft_behind(tmp_path):
    for score in (0.1, 0.2):
        RatiosFile("sdxl", Resolution(8, 8), score, BlockRatios()).write(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param([], "model_config is missing or not an object", id="list"),
        pytest.param(
            {"down": 0.4, "mid": 0.5, "up": 0.3},
            r"file has model_config \(name, width, height\), .*; give mere ratios by --down",
            id="mere ratios",
        ),
        pytest.param(None, "model_config is missing or not an object", id="null"),
        pytest.param(
            changed(model_config="sdxl"), "model_config is missing or not an object", id="model"
        ),
        pytest.param(
            changed(model_config={"name": "sdxl", "width": 360}),
            "is not HEIGHTxWIDTH",
            id="height",
        ),
        pytest.param(
            changed(model_config={"name": "sdxl", "width": -360, "height": 480}),
            "is not HEIGHTxWIDTH",
            id="negative width",
        ),
        pytest.param(
            changed(best_global_params_ratio=None),
            "best_global_params_ratio is missing or not an object",
            id="no ratios",
        ),
        pytest.param(
            changed(best_global_params_ratio={"down_ratio": 0.4, "up_ratio": 0.4}),
            r"has the keys \['down_ratio', 'up_ratio'\]: it needs exactly",
            id="missing ratio",
        ),
        pytest.param(
            changed(
                best_global_params_ratio={
                    **REFERENCE["best_global_params_ratio"],
                    "text_ratio": 0.1,
                }
            ),
            "'text_ratio', 'up_ratio'.: it needs exactly",
            id="extra ratio",
        ),
        pytest.param(with_ratio(math.nan), r"up ratio nan is outside \[0, 1\)", id="NaN ratio"),
        pytest.param(with_ratio(-0.1), r"up ratio -0.1 is outside \[0, 1\)", id="negative ratio"),
        pytest.param(with_ratio("0.36"), "up ratio '0.36' is not a number", id="string ratio"),
        pytest.param(with_ratio([0.36]), r"up ratio \[0.36\] is not a number", id="nested ratio"),
        pytest.param(with_ratio(None), "up ratio None is not a number", id="null ratio"),
        pytest.param(
            changed(best_avg_score="0.71"), "best_avg_score '0.71' is not", id="string score"
        ),
        pytest.param(
            changed(best_avg_score=math.nan), "best_avg_score nan is not", id="NaN score"
        ),
        pytest.param(
            changed(best_avg_score=10**400), "best_avg_score 10*.* is not", id="huge score"
        ),
        pytest.param(
            changed(poa_weight="1.5"), "poa_weight '1.5' is not a number", id="string weight"
        ),
        pytest.param(
            changed(poa_weight=math.inf), "poa_weight inf is not a number", id="infinite weight"
        ),
        *(
            pytest.param(
                changed(poa_weight=weight),
                rf"poa_weight {weight} is outside \[0, 10\]: give 1 for the pruned",
                id=f"weight {weight}",
            )
            for weight in (-1, 1_000_000_000.0)
        ),
        pytest.param(
            changed(pruning_method="mask"), "pruning_method 'mask' is unknown", id="method"
        ),
        pytest.param(changed(provenance=[1]), "provenance is missing or not", id="provenance"),
    ],
)
def test_a_broken_value_is_one_clear_line(tmp_path, content, reason):
    path = write(tmp_path / "best_ratios.json", content)
    with pytest.raises(RatiosError, match=reason) as caught:
        RatiosFile.read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message


def test_a_score_is_not_optional(tmp_path):
    content = {key: value for key, value in REFERENCE.items() if key != "best_avg_score"}
    with pytest.raises(RatiosError, match="best_avg_score None is not a number"):
        RatiosFile.read(write(tmp_path / "file", content))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"ratios"], ids=repr)
def test_a_file_that_is_not_json_is_one_clear_line(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(RatiosError, match=r"not JSON .*: export it again$"):
        RatiosFile.read(path)


def test_a_missing_file_is_one_clear_line(tmp_path):
    with pytest.raises(RatiosError, match=r"absent.json: No such file or directory: give"):
        RatiosFile.read(tmp_path / "absent.json")


def test_a_folder_is_no_ratios_file(tmp_path):
    with pytest.raises(RatiosError, match="Is a directory: give"):
        RatiosFile.read(tmp_path)


def test_reading_a_ratios_file_needs_no_torch():
    code = "import sys, crdiff_core; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
