"""notebooks/: run on a real, tiny search, and stored without outputs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.pipelines import save_sd

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
ALL = sorted(NOTEBOOKS.glob("*.ipynb"))


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory, ray_tmpdir):
    """The folder of a finished search."""
    folder = tmp_path_factory.mktemp("notebook")
    settings = [
        *(f"model.path={save_sd(folder / 'model')}", f"output={folder / 'runs'}", "res=24x32"),
        *("budget.steps=4", "rerank.top=2", "render.num_steps=2", "tracking=none"),
        *("prompts.search=2", "prompts.rerank=2", "prompts.validation=4", "render.batch_size=4"),
    ]
    ended = subprocess.run(
        [sys.executable, "-m", "search.run", *settings],
        env={**os.environ, "RAY_TMPDIR": ray_tmpdir},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr
    return folder / "runs/shapes_24x32/annealing-seed0"


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


def test_read_a_search_shows_what_the_run_found(run_folder, monkeypatch):
    cells, answers = execute(
        *("read_a_search.ipynb", run_folder, monkeypatch),
        "best.ratios.as_dict()",
        "best_so_far.tolist()",
        "searched['reward'].tolist()",
        "dense_reward",
        "len(difference)",
        "difference.mean()",
        "[dense.size, pruned.size]",
        "dense != pruned",
        "isinstance(pipe.unet, crdiff_core.poa.POADenoiser)",
    )
    ratios, best_so_far, rewards, dense, num_prompts, difference, sizes, differ, applied = answers
    result = json.loads((run_folder / "best_ratios.json").read_text())
    wanted = result["best_global_params_ratio"]

    assert {f"{group}_ratio": ratio for group, ratio in ratios.items()} == wanted
    assert best_so_far == [max(rewards[: end + 1]) for end in range(4)]
    assert dense == result["provenance"]["dense_score"]
    assert num_prompts == 4
    assert difference == pytest.approx(result["provenance"]["validation"]["difference"], abs=1e-12)
    assert sizes == [[32, 24], [32, 24]]
    assert differ
    assert not applied
    pictures = [
        output
        for cell in cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 4


@pytest.mark.parametrize("file", ALL, ids=lambda file: file.name)
def test_notebooks_store_no_outputs(file):
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert not any(cell.outputs or cell.execution_count for cell in code)
