"""MLflow's pages of a real search, in a real browser: what a user looks at and compares.

For the README's picture make a larger search, with `python -m search.run output=/tmp/ui
budget.steps=20 prompts.search=16 prompts.validation=64`, then

    CRDIFF_RUNS=/tmp/ui CRDIFF_SCREENSHOTS=/tmp/ui pytest -n0 tests/services/test_mlflow_ui.py
    cp /tmp/ui/comparison.png tests/services/mlflow.png
"""

import json
import os
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from search.tracking import EVALUATION_TAG, RUN_TAG
from tests.faults.proxy import serving

# MLflow's first page is one for language models, beside an assistant.
SETTINGS = {
    "mlflow.workflowType_v1": '"machine_learning"',
    "mlflow.assistant.panelOpen_v1": "false",
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": "true",
}
# Of every search; that of an acceptance rate begins with the first decision.
BY_STEP = {"best_reward", "dense_reward", "num_failed", "pictures_per_second", "reward"}
RATIOS = ["ratio_down", "ratio_mid", "ratio_up"]
# What each page may take to show what it is for; the first loads megabytes of scripts.
PATIENCE_MS = 60_000


class Tracked:
    """A search's runs in MLflow, and the address of their experiment's pages."""

    def __init__(self, uri, database):
        client = MlflowClient(f"sqlite:///{database}")
        (self.experiment,) = client.search_experiments(filter_string="name = 'crdiff-search'")
        runs = client.search_runs([self.experiment.experiment_id])
        (self.parent,) = (run for run in runs if RUN_TAG in run.data.tags)
        self.children = [run for run in runs if EVALUATION_TAG in run.data.tags]
        # Of a figure with one point MLflow draws a bar.
        self.by_step = {
            key
            for key in self.parent.data.metrics
            if len(client.get_metric_history(self.parent.info.run_id, key)) > 1
        }
        self.name = self.parent.info.run_name
        self.uri = uri
        self.pages = f"{uri}/#/experiments/{self.experiment.experiment_id}/runs"

    @property
    def searched(self):
        return [run for run in self.children if run.data.tags["kind"] == "search"]


@pytest.fixture(scope="module")
def tracked(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("server")
    chosen = os.environ.get("CRDIFF_RUNS")
    output = Path(chosen or request.getfixturevalue("finished").output)
    shutil.copy(output / "mlflow.db", folder)
    with serving(folder) as port:
        yield Tracked(f"http://127.0.0.1:{port}", folder / "mlflow.db")


@pytest.fixture(scope="module")
def context(browser):
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    context.set_default_timeout(PATIENCE_MS)
    for key, value in SETTINGS.items():
        context.add_init_script(f"localStorage.setItem({json.dumps(key)}, {json.dumps(value)})")
    yield context
    context.close()


@pytest.fixture
def page(context):
    page = context.new_page()
    yield page
    page.close()


def test_the_list_of_runs_has_the_search_and_within_it_its_evaluations(page, tracked, screenshots):
    page.goto(tracked.pages)
    search = page.get_by_role("row").filter(has_text=tracked.name)
    search.get_by_role("button").first.click()
    for run in tracked.searched[:3]:
        page.get_by_text(run.info.run_name, exact=True).first.wait_for()
    page.screenshot(path=screenshots / "runs.png")


def test_a_searchs_page_begins_with_what_came_of_it(page, tracked, screenshots):
    verdict = tracked.parent.data.tags["verdict"]
    page.goto(f"{tracked.pages}/{tracked.parent.info.run_id}")
    page.get_by_text(f"Against dense: {verdict}.").wait_for()
    page.get_by_text("result/difference", exact=True).wait_for()
    page.screenshot(path=screenshots / "search.png")


def test_a_search_has_a_chart_of_each_figure_by_step(page, tracked, screenshots):
    page.goto(f"{tracked.pages}/{tracked.parent.info.run_id}/model-metrics")
    found = page.get_by_placeholder("Search metric charts")
    assert tracked.by_step >= BY_STEP
    for name in sorted(tracked.by_step):
        found.fill(f"^{name}$")
        page.locator(".js-plotly-plot .scatterlayer .trace").first.wait_for()
        page.get_by_text(name, exact=True).first.wait_for()
    found.fill("reward")
    page.locator(".js-plotly-plot .scatterlayer .trace").nth(2).wait_for()
    page.screenshot(path=screenshots / "charts.png")


def test_a_search_shows_pictures_of_each_new_best_by_step(page, tracked, screenshots):
    page.goto(f"{tracked.pages}/{tracked.parent.info.run_id}/model-metrics")
    page.get_by_placeholder("Search metric charts").fill("^best$")
    card = page.get_by_test_id("experiment-view-compare-runs-card")
    card.get_by_role("slider").wait_for()
    page.screenshot(path=screenshots / "picture.png")
    shown = card.locator("img[src*='step%2B0%2B']")
    shown.wait_for()
    card.get_by_role("slider").press("ArrowRight")
    shown = card.locator("img[src*='step%2B1%2B']")
    shown.wait_for()
    shown.click()
    opened = page.locator("img[src*='step%2B1%2B']:not([src*=compressed])").first
    opened.wait_for()
    page.wait_for_function("image => image.naturalWidth > 500", arg=opened.element_handle())
    page.screenshot(path=screenshots / "picture_opened.png")


def test_evaluations_compare_as_parallel_coordinates_of_ratios_and_reward(
    page, tracked, screenshots
):
    runs = json.dumps([run.info.run_id for run in tracked.searched])
    experiments = json.dumps([tracked.experiment.experiment_id])
    page.goto(f"{tracked.uri}/#/compare-runs?runs={runs}&experiments={experiments}")
    page.locator(".js-plotly-plot .parcoords .axis-title").nth(len(RATIOS)).wait_for()
    dimensions = page.locator(".js-plotly-plot").first.evaluate(
        "plot => plot.data[0].dimensions.map(each => [each.label, [...each.values]])"
    )
    page.screenshot(path=screenshots / "comparison.png")

    assert [label for label, _ in dimensions] == [*RATIOS, "reward"]
    points = zip(*(values for _, values in dimensions), strict=True)
    assert sorted(points) == sorted(
        (*(float(run.data.params[ratio]) for ratio in RATIOS), run.data.metrics["reward"])
        for run in tracked.searched
    )
