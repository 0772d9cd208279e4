"""notebooks/: run on a real, small search, and stored without outputs."""

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
ALL = sorted(NOTEBOOKS.glob("*.ipynb"))


@pytest.fixture
def run_folder(finished):
    """The folder of a finished search of the embedded model, tracked by MLflow."""
    return finished.folder


def execute(name, run_folder, monkeypatch, *questions):
    """Run a notebook on a run folder; its cells, and the answers to Python expressions."""
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    asked = ", ".join(questions)
    notebook.cells.append(nbformat.v4.new_code_cell(f"import json\nprint(json.dumps([{asked}]))"))
    monkeypatch.setenv("CRDIFF_RUN", str(run_folder))
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": NOTEBOOKS}}).execute()
    *cells, last = notebook.cells
    return cells, json.loads(last.outputs[-1].text)


def num_figures(cells):
    return sum(
        "image/png" in output.get("data", {})
        for cell in cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )


@pytest.fixture
def result(run_folder):
    return json.loads((run_folder / "best_ratios.json").read_text())


def test_read_a_search_shows_what_the_run_found(run_folder, result, monkeypatch):
    cells, answers = execute(
        *("1_read_a_search.ipynb", run_folder, monkeypatch),
        "best.ratios.as_dict()",
        "best_so_far.tolist()",
        "searched['reward'].tolist()",
        "dense_reward",
        "len(difference)",
        "difference.mean()",
        "children['tags.kind'].value_counts().to_dict()",
        "len(both)",
        "difference_to_mlflow",
    )
    ratios, best_so_far, rewards, dense, num_prompts, difference, *in_mlflow = answers
    kinds, num_compared, difference_to_mlflow = in_mlflow
    wanted = result["best_global_params_ratio"]

    assert {f"{group}_ratio": ratio for group, ratio in ratios.items()} == wanted
    assert best_so_far == [max(rewards[: end + 1]) for end in range(4)]
    assert dense == result["provenance"]["dense_score"]
    assert num_prompts == 8
    assert difference == pytest.approx(result["provenance"]["validation"]["difference"], abs=1e-12)
    assert kinds.items() >= {"dense": 1, "search": 4, "rerank": 3, "validation": 1}.items()
    assert num_compared == sum(kinds.values())
    assert difference_to_mlflow == 0
    assert num_figures(cells) == 3


def test_pictures_and_landscape_shows_what_was_drawn_and_expected(run_folder, result, monkeypatch):
    cells, answers = execute(
        *("2_pictures_and_landscape.ipynb", run_folder, monkeypatch),
        "list(rewards)",
        "len(ends)",
        "columns['CR-Diff'].mean - columns['dense'].mean",
        "gain[ends].tolist()",
        "[kept.get(each.key, ends).count(None) for each in columns.values()]",
        "len(points)",
        "expected(winner[None]).item()",
        "[reward.min(), reward.max()]",
        "list(reach.index)",
    )
    columns, num_shown, difference, gains, missing, num_points, at_winner, *others = answers
    (low, high), reach = others

    assert columns == ["dense", "pruned alone", "CR-Diff"]
    assert num_shown == 4
    validated = result["provenance"]["validation"]["difference"]
    assert difference == pytest.approx(validated, abs=1e-12)
    assert gains == sorted(gains, reverse=True)
    assert missing == [0, 0, 0]
    assert num_points >= 4
    assert low <= at_winner <= high
    assert reach == ["down", "mid", "up", "one standard error"]
    assert num_figures(cells) == 2


def test_use_the_ratios_draws_bakes_and_prepares_a_card(run_folder, result, monkeypatch):
    # Its own assertions say that `applied`, `remove` and the baked model draw what they should.
    cells, answers = execute(
        *("3_use_the_ratios.ipynb", run_folder, monkeypatch),
        "best.ratios.as_dict()",
        "[picture.size for picture in pictures.values()]",
        "dense != cr_diff != pruned != by_hand",
        "type(pipe.unet).__name__",
        "readme",
    )
    ratios, sizes, differ, unet, readme = answers
    wanted = result["best_global_params_ratio"]

    assert {f"{group}_ratio": ratio for group, ratio in ratios.items()} == wanted
    assert sizes == [[40, 24]] * 3
    assert differ
    assert unet == "UNet2DConditionModel"
    assert "# CR-Diff ratios for shapes at 24x40" in readme
    assert num_figures(cells) == 2


@pytest.mark.parametrize("file", ALL, ids=lambda file: file.name)
def test_notebooks_store_no_outputs(file):
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert not any(cell.outputs or cell.execution_count for cell in code)
