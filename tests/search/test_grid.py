"""A grid: which searches it is, how they share a cluster, and what is written of them."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from crdiff_core.ratios import BlockRatios
from search import run
from search.comparison import Comparison
from search.config import ConfigError
from search.grid import check, main, shared_out
from search.grid_report import (
    GRID_FILE,
    MARKDOWN_FILE,
    TABLE_FILE,
    Found,
    Paper,
    Row,
    name_cells,
    rows_in,
    write_grid,
)
from search.storage import Storage

PAPER = json.loads((Path(__file__).parents[1] / "conf" / "paper_cells.json").read_text())
HOSTILE = "<script>alert(1)</script> [a](javascript:b) | `c`"


@pytest.fixture
def searches(monkeypatch):
    """What a command line asks for: (model, resolution, the arguments of each alone)."""

    def call(*arguments, is_grid=True):
        monkeypatch.setattr(sys, "argv", ["search.run", *arguments])
        return run._compose(is_grid)

    return call


def cells(found):
    return [(each.config.model.name, str(each.config.res)) for each in found]


def of_paper(*models):
    return [
        (cell["model"], f"{cell['height']}x{cell['width']}")
        for model in models
        for cell in PAPER
        if cell["model"] == model
    ]


# --- which searches --------------------------------------------------------------------------


def test_the_papers_grid_is_its_13_cells(searches):
    found = searches("experiment=paper_grid", "budget.steps=20")

    assert len(found) == 13
    assert cells(found) == of_paper("sdxl", "sd15", "sd21")
    assert {each.config.budget.steps for each in found} == {20}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["experiment=paper_grid", "res=480x360"],
            [("sdxl", "480x360"), ("sd15", "480x360"), ("sd21", "480x360")],
        ),
        (["model=sd21", "res=64x64,paper"], [("sd21", "64x64"), *of_paper("sd21")]),
        (["res=24x40,48x48"], [("shapes", "24x40"), ("shapes", "48x48")]),
        (["seed=range(0,2)"], [("shapes", "24x40")] * 2),
        (['prompts.text="a cat, asleep"'], [("shapes", "24x40")]),
    ],
)
def test_a_sweep_is_a_search_of_each(searches, arguments, expected):
    assert cells(searches(*arguments)) == expected


@pytest.mark.parametrize(
    "arguments",
    [
        ("experiment=paper_grid", "model=sdxl", "res=480x360,512x512"),
        ("res=24x40,48x48", 'prompts.text="a cat, asleep"'),
        ("searcher=glob(a*)", "seed=3"),
    ],
)
def test_the_arguments_of_a_cell_ask_for_it_alone(searches, arguments):
    for each in searches(*arguments):
        (alone,) = searches(*each.arguments, is_grid=False)
        assert alone.config == each.config


@pytest.mark.parametrize("model", ["sdxl", "sd15", "sd21"])
def test_conf_has_the_papers_rewards(searches, model):
    (found,) = searches(f"model={model}")

    assert found.config.model.paper_image_reward == {
        f"{cell['height']}x{cell['width']}": tuple(cell["image_reward"].values())
        for cell in PAPER
        if cell["model"] == model
    }


# --- what is checked before any begins -------------------------------------------------------


def test_cells_of_one_size_are_named_by_their_search_too(searches, tmp_path):
    found = searches("seed=0,1", f"output={tmp_path}")
    checked = check([(each.config, " ".join(each.arguments)) for each in found])

    assert [cell.name for cell in checked] == [
        "shapes_24x40/annealing-seed0",
        "shapes_24x40/annealing-seed1",
    ]
    assert not any(cell.is_finished for cell in checked)


def test_the_share_of_a_cell_does_not_change_its_search(searches, tmp_path):
    from search.plan import Plan

    one, other = searches("cluster.num_workers=1,2", "cluster.cells=3", f"output={tmp_path}")

    assert Plan.make(one.config).key == Plan.make(other.config).key


def test_one_place_for_all_cells(searches, tmp_path):
    found = searches(f"output={tmp_path}/a,{tmp_path}/b")

    with pytest.raises(ConfigError, match="output: a grid has one for all its cells"):
        check([(each.config, "") for each in found])


@pytest.mark.parametrize(
    ("workers", "cells", "asked", "shares"),
    [
        (2, 3, None, [2]),
        (16, 13, None, [8, 8]),
        (64, 3, None, [22, 21, 21]),
        (2, 3, 3, [1, 1]),
        (5, 2, 2, [3, 2]),
        (7, 1, 4, [7]),
    ],
)
def test_workers_are_shared_out_whole(workers, cells, asked, shares):
    assert shared_out(workers, cells, asked) == shares


# --- what is written -------------------------------------------------------------------------

BETTER = Row(
    name="",
    folder="sdxl_480x360/annealing-seed0",
    status="finished",
    command="python -m search.run model=sdxl res=480x360",
    found=Found(
        *(BlockRatios(0.4, 0.3, 0.2), 1.5, "image_reward", -1.0, 0.5),
        Comparison(1.5, 1.2, 1.8, num_prompts=64, num_texts=64),
    ),
    paper=Paper(BlockRatios(0.434, 0.428, 0.355), -2.148, -0.516, -0.099),
    started_there=True,
    has_report=True,
)
FAILED = Row("", "shapes_24x40/tpe-seed0", "failed", HOSTILE, "python -m search.run searcher=tpe")


@pytest.fixture
def written(place):
    output = Storage.at(place)
    output.make()
    write_grid(output, [BETTER, FAILED], "python -m search.run -m 'res=<b>'")
    return output


def read(output, name):
    return output.read(name).decode()


def test_the_table_has_ours_beside_the_papers(written):
    ours, failed = json.loads(read(written, TABLE_FILE))["cells"]

    assert (ours["model"], ours["res"], ours["verdict"]) == ("sdxl", "480x360", "better")
    assert ours["ratios"] == {"down": 0.4, "mid": 0.3, "up": 0.2}
    assert (ours["dense"], ours["cr_diff"], ours["poa_weight"]) == (-1.0, 0.5, 1.5)
    assert ours["comparison"]["low"] == 1.2
    assert ours["paper"]["ratios"] == {"down": 0.434, "mid": 0.428, "up": 0.355}
    assert ours["paper"]["image_reward"]["cr_diff"] == -0.099
    assert (failed["status"], failed["reason"], failed["paper"]) == ("failed", HOSTILE, None)


def test_markdown_has_both_tables(written):
    text = read(written, MARKDOWN_FILE)

    assert (
        "| sdxl | 480x360 | better | image\\_reward | -1.0000 | 0.5000 | +1.5000 | "
        "+1.2000 to +1.8000 | 64 fresh prompts | 1.5 | -2.148 | -0.516 | -0.099 | +2.049 |" in text
    )
    assert "| sdxl | 480x360 | 0.400 | 0.300 | 0.200 | 1.5 | 0.434 / 0.428 / 0.355 |" in text
    assert "compare sign and size of the differences, not the rewards" in text


def test_the_report_has_the_verdict_links_and_reasons(written):
    page = read(written, GRID_FILE)

    assert '<a href="sdxl_480x360/annealing-seed0/report.html">sdxl_480x360</a>' in page
    assert page.index("Better: 1 of ") < page.index("failed: 1 of ") < page.index("<table")
    assert "shapes_24x40/tpe-seed0/report.html" not in page  # It has written none.
    assert "also tried the paper&#39;s ratios" in page


def test_what_a_failure_says_is_text(written):
    page, text = read(written, GRID_FILE), read(written, MARKDOWN_FILE)

    assert "<script>alert" not in page
    assert "res=&lt;b&gt;" in page
    assert "\\<script\\>alert(1)\\</script\\> \\[a\\](javascript:b) \\| \\`c\\`" in text


def test_reasons_and_cells_without_a_folder_stay_in_a_report_written_again(written):
    rows, command = rows_in(written)

    assert command == "python -m search.run -m 'res=<b>'"
    # Of the finished one nothing is left: its folder counts, and there is none.
    assert rows == [replace(FAILED, name="shapes_24x40")]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"cells": 3}', '{"cells": [{"folder": 1}]}'])
def test_a_damaged_table_is_left_out(tmp_path, content):
    (tmp_path / TABLE_FILE).write_text(content)

    assert rows_in(Storage.at(tmp_path)) == ([], "")


def test_a_report_of_nothing_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}: no search is there: give the output of searches\n"
    )


def test_a_cell_with_several_searches_names_each():
    folders = ["shapes_24x40/tpe-seed0", "shapes_24x40/gp-seed0", "sdxl_8x8/gp-seed0"]

    assert name_cells(folders) == [*folders[:2], "sdxl_8x8"]
