"""The verdict on a winner: what its sample is, when there is none, and that all say the same."""

import json
import statistics
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest

from crdiff_core.ratios import BlockRatios
from search.comparison import Comparison, by_prompt, compare, interval, standard_error
from search.estimate import Estimate
from search.export import validated, write_ratios
from search.grid_report import Found, Row, write_grid
from search.plan import Plan
from search.run import _summary
from search.storage import Storage
from search.sync import _summary as note_of
from tests.benchmarks import verdicts
from tests.conf.test_config import composed
from tests.search.test_estimate import TIMING
from tests.search.test_report import page_of, searched, text_of


def compared(gains, texts=None, **about):
    texts = texts or [f"prompt {number}" for number in range(len(gains))]
    return compare(gains, [0.0] * len(gains), texts, **about)


# --- the sample ------------------------------------------------------------------------------


def test_many_noises_of_few_prompts_are_no_more_than_the_prompts():
    rng = np.random.default_rng(0)
    means = rng.normal(size=8)
    gains = [mean + noise for mean in means for noise in (-0.3, 0.1, 0.2, 0.0)]
    texts = [f"prompt {number}" for number in range(8) for _ in range(4)]
    found, of_means = compared(gains, texts), compared(means.tolist())

    assert (found.low, found.high) == pytest.approx((of_means.low, of_means.high))
    assert (found.num_prompts, found.num_texts) == (32, 8)
    assert standard_error(gains, texts) == pytest.approx(statistics.stdev(means) / 8**0.5)


def test_unequal_prompts_keep_the_mean_over_pictures_and_its_cluster_robust_error():
    gains, texts = [1.0, 3.0, 2.0, 0.0, -1.0, 4.0], ["a", "a", "b", "c", "c", "c"]
    mean = statistics.fmean(gains)
    # CR1: G / (G - 1) times the sum over prompts of (sum of residuals)^2, over N^2.
    sums = [4 - 2 * mean, 2 - mean, 3 - 3 * mean]
    cr1 = 3 / 2 * sum(each**2 for each in sums) / 6**2

    assert by_prompt(gains, texts).mean() == pytest.approx(mean)
    assert standard_error(gains, texts) ** 2 == pytest.approx(cr1)


@pytest.mark.parametrize("num_texts", [2, 4])
def test_fewer_than_five_prompts_have_figures_and_no_verdict(num_texts):
    gains = [0.5 + number / 100 for number in range(64)]
    found = compared(gains, [f"prompt {number % num_texts}" for number in range(64)])

    assert (found.verdict, found.low, found.high) == ("no verdict", None, None)
    assert found.difference == pytest.approx(statistics.fmean(gains))
    assert "interval" not in found.summary
    assert found.note == f"A verdict takes 5 prompts, and there are {num_texts}."


def test_the_noises_of_one_prompt_are_a_sample_of_it_alone():
    found = compared([0.5, 0.4, 0.6, 0.5, 0.3], ["a cat, asleep"] * 5, searched={"a cat, asleep"})

    assert found.verdict == "better"
    assert found.sample == 'fresh noise of the same prompt, "a cat, asleep" (5 pictures)'
    few = compared([0.5, 0.4, 0.6, 0.5], ["a cat"] * 4, searched={"a cat"})
    assert few.note == "A verdict takes 5 noises, and there are 4."


@pytest.mark.parametrize("gain", [0.0, -0.3, 0.3])
@pytest.mark.parametrize("count", [2, 64])
def test_equal_differences_have_no_interval(gain, count):
    rewards = [0.1 * number + gain for number in range(count)]
    dense = [0.1 * number for number in range(count)]
    found = compare(rewards, dense, [f"prompt {number}" for number in range(count)])

    assert (found.verdict, found.low) == ("no verdict", None)
    assert found.note


def test_skewness_moves_the_end_that_it_makes_too_sure():
    """Rare gains: few of them were drawn where the mean looks too low."""
    gains = [1.0] * 2 + [0.0] * 23
    low, high = interval(np.array(gains))
    half = 2.0639 * statistics.stdev(gains) / 5

    assert low == pytest.approx(statistics.fmean(gains) - half, rel=1e-3)
    assert high > statistics.fmean(gains) + 1.3 * half
    mirrored = interval(-np.array(gains))
    assert mirrored == pytest.approx((-high, -low))


def test_verdicts_are_false_as_rarely_as_promised():
    rates = [verdicts.simulate(data, 16, 1000) for data in verdicts.SIMULATED if data.is_held]

    # Twice the standard error of 1,000 trials above what 10,000 keep.
    assert max(each.false for each in rates) <= verdicts.MOST + 1.4
    for num_texts in range(16, 65):
        assert verdicts.worst(verdicts.two_valued(num_texts, verdicts.SHARES)).false <= 6.0


# --- its words -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "sample"),
    [
        (compared([1.0, 0.9] * 8), "16 fresh prompts"),
        (compared([1.0, 0.9] * 8, list("abcdefgh") * 2), "8 fresh prompts (16 pictures)"),
        (
            compared([1.0, 0.9] * 8, list("abcdefgh") * 2, searched={"a"}),
            "fresh noise of the same 8 prompts (16 pictures)",
        ),
    ],
)
def test_fresh_prompts_are_those_that_were_not_searched_with(found, sample):
    assert found.sample == sample


def test_a_prompt_is_named_in_one_short_printable_line():
    text = "a \x1b[2J\ncat " + 99 * "very "
    named = compared([0.1, 0.2], [text] * 2, searched={text}).sample

    assert "\x1b" not in named
    assert "\n" not in named
    assert len(named) < 130


def said_everywhere(plan, tmp_path):
    """The verdict with its figures as console, report, MLflow, JSON and list have it."""
    outcome = SimpleNamespace(
        winner=plan.search.winner,
        dense=plan.search.of("dense"),
        comparison=validated(plan),
        ratios_file=write_ratios(plan),
        **dict.fromkeys(("report", "ended_by", "off_path", "tracker")),
        **dict.fromkeys(("num_drawn", "num_steps", "num_lost", "num_warm"), 0),
        num_reranked=3,
        reranked_on=plan.freshness("rerank"),
        is_weight_searched=False,
    )
    raw = json.loads((plan.folder / "best_ratios.json").local.read_text())
    return {
        "console": "\n".join(_summary(outcome)),
        "report": text_of(page_of(plan)),
        "MLflow": note_of(plan).replace("\\", ""),
        "JSON": json.dumps(raw["provenance"]["validation"], ensure_ascii=False).replace("\\", ""),
    }


@pytest.mark.parametrize(
    ("arguments", "sample"),
    [
        ((), "9 fresh prompts"),
        (("prompts.text=two red squares",), 'fresh noise of the same prompt, "two red squares"'),
        (("prompts=reference", "prompts.validation=9"), "fresh noise of the same 2 prompts (9"),
    ],
    ids=["prompts", "text", "reference"],
)
def test_all_places_say_the_same(tmp_path, arguments, sample, any_prompt):
    plan = searched(tmp_path, *arguments, "budget.steps=3")
    found = validated(plan)

    for place, said in said_everywhere(plan, tmp_path).items():
        assert found.figures in said, place
        assert sample in said, place
        assert found.note in said, place
        assert ("fresh prompts" in said) == (not arguments), place
    assert found.verdict == ("no verdict" if "prompts=reference" in arguments else "better")


@pytest.fixture
def any_prompt(monkeypatch):
    from crdiff_core.rewards.shapes import ShapesReward

    monkeypatch.setattr(ShapesReward, "check", lambda self, prompts: None)


# --- looking again ---------------------------------------------------------------------------


def test_a_second_validation_on_the_same_prompts_is_said_to_be_one(tmp_path):
    def rewards(ratios, prompt):
        return ratios.up + prompt.seed % 7 / 100 * (not ratios.is_dense)

    first = searched(tmp_path, "budget.steps=2", rewards=rewards)
    assert validated(first).num_earlier == 0
    second = searched(tmp_path, "budget.steps=12", rewards=rewards)

    assert second.search.winner.ratios != first.search.winner.ratios
    assert validated(second).num_earlier == 1
    assert "validated on the same prompts before (1)" in validated(second).note
    # What came later changes nothing in what was said of the first.
    again = searched(tmp_path, "budget.steps=2", rewards=rewards)
    assert again.search.winner.ratios == first.search.winner.ratios
    assert validated(again).num_earlier == 0


def test_the_same_winner_again_is_no_second_validation(tmp_path):
    for _ in range(2):
        plan = searched(tmp_path, "budget.steps=3")

    assert validated(plan).num_earlier == 0


def test_a_grid_says_that_it_holds_several_verdicts(tmp_path):
    rows = [
        Row("", f"shapes_{res}/annealing-seed0", "finished", found=found_with(comparison))
        for res, comparison in (
            ("24x40", Comparison(0.1, 0.05, 0.15, num_prompts=64, num_texts=64)),
            ("48x48", Comparison(0.1, -0.05, 0.25, 64, 64, num_earlier=1)),
            ("64x64", Comparison(0.2, None, None, 64, 2, is_fresh=False)),
        )
    ]
    write_grid(Storage.at(tmp_path), rows, "")
    text = (tmp_path / "grid.md").read_text()
    page = (tmp_path / "grid_report.html").read_text()

    for said in (text, page):
        assert "This table holds 2 verdicts, each from a 95% interval of its own" in said
        assert "Other ratios were validated on the same prompts before (1)" in said
        assert "A verdict takes 5 prompts, and there are 2." in said
    assert "| shapes | 64x64 | no verdict |" in text
    assert "| none | fresh noise of the same 2 prompts (64 pictures) |" in text
    cells = json.loads((tmp_path / "grid.json").read_text())["cells"]
    assert [cell["comparison"]["low"] for cell in cells] == [0.05, -0.05, None]


def found_with(comparison):
    return Found(BlockRatios(0.4, 0.3, 0.2), 1.5, "shapes", 0.7, 0.8, comparison)


def test_one_verdict_needs_no_note_on_many(tmp_path):
    comparison = Comparison(0.1, 0.05, 0.15, num_prompts=64, num_texts=64)
    row = Row("", "shapes_24x40/annealing-seed0", "finished", found=found_with(comparison))
    write_grid(Storage.at(tmp_path), [row], "")

    assert "verdicts" not in (tmp_path / "grid.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("prompts=reference",), "it takes 5 validation prompts (of one prompt, noises), and"),
        (("prompts.text=two red squares", "prompts.validation=4"), "these settings give 4"),
        (("prompts.text=two red squares", "prompts.validation=5"), None),
        (("prompts.validation=5",), None),
    ],
)
def test_the_dry_run_says_when_there_will_be_no_verdict(tmp_path, any_prompt, arguments, line):
    plan = Plan.make(composed(f"output={tmp_path}", *arguments))
    figures = {field.name: 1 for field in fields(Estimate)} | {"plan": plan, "timing": TIMING}
    told = [each for each in Estimate(**figures).lines() if each.startswith("verdict")]

    assert len(told) == (line is not None)
    assert all(line in each for each in told)
