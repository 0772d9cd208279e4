"""The report of a search, over analytic rewards and pictures of one colour."""

import io
import json
import re
import sys
from html import unescape

import pytest
from PIL import Image

from crdiff_core.evaluation import Measurement
from crdiff_core.ratios import BlockRatios
from crdiff_core.rewards.shapes import ShapesReward
from search import report
from search.config import ConfigError
from search.driver import _begin_folder as begin_folder
from search.plan import Plan
from search.report import REPORT_FILE, main, write_report
from tests.conf.test_config import composed

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \"a\" & 'b' {{ 7 * 7 }}"
SIZES = ("prompts.search=4", "prompts.rerank=3", "prompts.validation=9", "tracking=none")
SIZES += ("report.pictures=6", "budget.steps=12", "render.batch_size=8")


def best_above(ratios, prompt):
    """Better than dense by far; only the up ratio matters, and the prompt a little."""
    level = 0.0 if ratios.is_dense else 1.0 - abs(ratios.up - 0.3)
    return level + prompt.seed % 100 / 1000 * (not ratios.is_dense)


def picture(reward):
    file = io.BytesIO()
    Image.new("RGB", (40, 24), (max(0, min(255, int(255 * reward))), 90, 160)).save(file, "PNG")
    return file.getvalue()


def make_plan(folder, *overrides):
    return Plan.make(composed(f"output={folder}", *SIZES, *overrides))


def searched(
    folder,
    *overrides,
    rewards=best_above,
    fails=lambda ratios: False,
    fails_on=None,
    most=999,
):
    """A plan whose search has gone on, for so many trials at most.

    fails_on: the prompt set on which every pruned model fails.
    """
    plan = make_plan(folder, *overrides)
    begin_folder(plan, "python -m search.run --the command")
    plan.search.ahead = 1
    for count in range(most):
        config = plan.search.suggest(f"trial{count}")
        if not isinstance(config, dict):
            break
        ratios = BlockRatios(**config["ratios"])
        prompts = plan.prompt_sets[config["prompts"]].prompts
        scores = tuple(rewards(ratios, prompts[number]) for number in config["batch"])
        kept = {place: picture(scores[place]) for place in config["keep"]}
        seconds = {"prune": 0.5, "render": 1.0 * len(scores), "score": 0.25}
        measured = Measurement(scores, ratios.as_dict(), seconds, len(scores), 3.5, kept)
        reported = {"measured": measured}
        if fails(ratios) or (config["prompts"] == fails_on and not ratios.is_dense):
            reported = {"failure": "black pictures & <b>no</b> light", "transient": False}
        plan.search.on_trial_complete(f"trial{count}", reported)
    return plan


def page_of(plan):
    """The report's HTML, without the scripts at its end."""
    place = write_report(plan)
    return place.local.read_text(encoding="utf-8").split("<script>")[0]


def text_of(page):
    """What a reader sees, but for charts."""
    page = re.sub(r'<script type="application/json">.*?</script>', "", page)
    return " ".join(unescape(re.sub("<[^>]*>", " ", page.partition("<body>")[2])).split())


def charts_of(page):
    found = re.findall(r'<script type="application/json">(.*?)</script>', page)
    return [json.loads(each) for each in found]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A search that is finished, with hostile prompts and a price; its plan and page."""
    folder = tmp_path_factory.mktemp("report")
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(f"{number} {HOSTILE}" for number in range(16)))
    with pytest.MonkeyPatch.context() as patched:
        # Its detector would look for nothing but shapes; here nothing is detected.
        patched.setattr(ShapesReward, "check", lambda self, prompts: None)
        plan = searched(folder, f"prompts.path={prompts}", "cluster.gpu_hour_price=3")
    assert plan.search.finished
    return plan, page_of(plan)


def test_the_verdict_comes_first_with_its_interval(found):
    plan, page = found
    comparison = report.validated(plan)
    words = text_of(page)

    assert (
        '<h1 class="better">Better: CR-Diff with these ratios beats the dense model</h1>' in page
    )
    assert (
        f"On 9 fresh prompts, by which nothing was chosen, the mean reward of CR-Diff minus "
        f"that of the dense model is {comparison.difference:+.4f}, 95% interval "
        f"[{comparison.low:+.4f}, {comparison.high:+.4f}]." in words
    )
    assert words.index("Better:") < words.index(str(plan.search.winner.ratios)) < 1000
    assert "not finished" not in words


@pytest.mark.parametrize(
    ("gain", "headline"),
    [
        (
            lambda number: -0.5 - number / 100,
            "Worse: draw with the dense model, not with these ratios",
        ),
        (lambda number: number % 3 - 1, "No difference shown: this search is no reason to prune"),
        (lambda number: -0.5, "No verdict: this search is no reason to prune"),
    ],
    ids=["worse", "no difference", "no spread"],
)
def test_it_says_so_when_pruning_does_not_help(tmp_path, gain, headline):
    def rewards(ratios, prompt):
        numbers = [each.seed for each in validation]
        number = numbers.index(prompt.seed) if prompt.seed in numbers else 0
        return 0.0 if ratios.is_dense else gain(number)

    validation = make_plan(tmp_path).prompt_sets["validation"].prompts
    page = page_of(searched(tmp_path, "budget.steps=3", rewards=rewards))

    assert f">{headline}</h1>" in page


def test_pictures_stand_side_by_side_with_their_rewards(found):
    plan, page = found
    winner, dense = plan.search.of("validation"), plan.search.of("dense validation")
    alone = plan.search.of("pruned alone")
    rows = page.split('<div class="row">')[1:]
    words = text_of(page)

    # Three as they come and two gains; nothing was lost.
    assert len(rows) == 5
    assert all(row.count("<img") == 3 for row in rows)
    assert page.count("data:image/png;base64,") == 15
    assert 'class="small"' in rows[0]
    first = text_of("<body>" + rows[0])
    assert f"Dense {dense.rewards[0]:.4f}" in first
    gain = winner.rewards[0] - dense.rewards[0]
    assert f"CR-Diff, k = 1.5 {winner.rewards[0]:.4f} ({gain:+.4f})" in first
    assert f"Pruned alone {alone.rewards[0]:.4f}" in first
    assert words.index("As they come") < words.index("Where it gained most")
    assert f"Mean rewards of these 3: Dense {0:.4f};" in words


def test_a_prompt_is_text_and_nothing_else(found):
    plan, page = found
    prompt = plan.prompt_sets["validation"].prompts[0].text

    assert prompt in text_of(page)
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert len(charts_of(page)) == page.count('<div class="chart"') == 6
    assert all("</" not in json.dumps(each).replace("</extra>", "") for each in charts_of(page))


def test_wins_and_losses_are_counted(tmp_path):
    validation = {}

    def rewards(ratios, prompt):
        number = validation.get(prompt, 0)
        return 0.0 if ratios.is_dense else (0.5, -0.25, 0.0)[number % 3]

    prompts = make_plan(tmp_path).prompt_sets["validation"].prompts
    validation |= {prompt: number for number, prompt in enumerate(prompts[:8])}
    page = page_of(searched(tmp_path, "budget.steps=3", rewards=rewards))

    assert (
        "Of 9 pairs of validation pictures CR-Diff won 4, lost 3 and was equal on 2."
        in text_of(page)
    )


def test_the_ratio_that_matters_is_named(found):
    plan, page = found
    shares = re.search(
        r"What mattered .*? up (\d+)% down|What mattered .*? up (\d+)%", text_of(page)
    )

    assert int(shares[1] or shares[2]) > 60
    assert page_of(plan) == page


def test_cost_is_counted_by_stage_and_in_money(found):
    plan, page = found
    words, use = text_of(page), plan.search.use

    assert f"Pictures drawn {use.pictures}" in words
    assert "Peak GPU memory 3.50 GiB" in words
    assert f"Money {3 * use.gpu_hours:.2f} (3 for a GPU hour)" in words
    # The dense model on 4 prompts, in one trial.
    assert "dense 1 4 4.8 0.5 4.0 0.2" in words
    assert "No evaluation failed." in words


def test_it_says_how_to_reproduce_and_use_it(found):
    plan, page = found
    words = text_of(page)

    assert "python -m search.run --the command" in words
    assert plan.search.winner.key in words
    assert plan.recipe.revision in words
    assert f"{plan.folder}/best_ratios.json" in words
    assert "crdiff_core.apply(pipe, 'best_ratios.json')" in words
    assert "python -m crdiff_core.generate --ratios best_ratios.json --prompt" in words


def test_failures_are_shown_with_their_reasons(tmp_path):
    page = page_of(searched(tmp_path, fails=lambda ratios: ratios.up > 0.5))

    assert "black pictures & <b>no</b> light" in text_of(page)
    assert "<b>no</b>" not in page


def test_a_failed_search_says_why(tmp_path):
    words = text_of(page_of(searched(tmp_path, fails=lambda ratios: ratios.is_dense)))

    assert "This search has failed: the dense model cannot be evaluated: black pictures" in words
    assert "No verdict yet" in words


def test_an_unfinished_search_shows_what_there_is(tmp_path):
    page = page_of(searched(tmp_path, most=6))
    words = text_of(page)

    assert words.startswith(
        "CR-Diff pruning ratios for shapes at 24x40 This search is not finished"
    )
    assert "No verdict yet" in words
    assert "CR-Diff, best so far" in words
    assert page.count("data:image/png") == 8
    assert "complete evaluations are too few to tell" in words


def test_a_search_that_has_nothing_is_an_error_with_the_remedy(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing has been evaluated yet: run the command in"):
        write_report(searched(tmp_path, most=0))


@pytest.mark.parametrize(
    ("space", "num_maps"),
    [(("space=uniform",), 1), (("space.poa_weight=[1.0,2.0]",), 6)],
    ids=["one ratio", "k too"],
)
def test_maps_are_of_the_space_that_was_searched(tmp_path, space, num_maps):
    page = page_of(searched(tmp_path, *space))

    assert page.count('aria-label="Where it looked:') == num_maps


def test_pictures_that_are_lost_or_were_never_kept_are_said_to_be(tmp_path):
    plan = searched(tmp_path, "budget.steps=2")
    for file in (tmp_path / "shapes_24x40" / "pictures").iterdir():
        file.unlink()

    page = page_of(plan)
    assert "<img" not in page
    assert page.count("not kept") == 3 * page.count('<div class="row">') > 0
    without = searched(tmp_path / "none", "budget.steps=2", "report.pictures=0")
    assert "This search kept none (report.pictures=0)." in text_of(page_of(without))


def test_one_run_that_fails_keeps_no_other_from_its_report(tmp_path, capsys, monkeypatch):
    plan = searched(tmp_path, "budget.steps=2")
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "empty"), str(plan.folder)])

    assert main() == 2
    printed = capsys.readouterr()
    assert printed.out == f"{plan.folder / REPORT_FILE}\n"
    assert printed.err.startswith(f"error: {tmp_path / 'empty'} is not the folder of a run")
    assert printed.err.count("\n") == 1
    assert (plan.folder.local / REPORT_FILE).is_file()
