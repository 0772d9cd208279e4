"""The simulations of verdicts and races see what they are there to see, and write it down."""

from __future__ import annotations

import json

import pytest

from tests.benchmarks import races, verdicts


def test_few_noises_of_many_prompts_and_the_reverse_are_one_sample_each():
    data = next(each for each in verdicts.SIMULATED if each.one_more)

    assert data.prompts(4).tolist() == [0, 1, 1, 2, 3, 3]


def test_two_valued_rates_are_exact():
    (rates,) = verdicts.two_valued(16, [0.5])
    # Of 16, 1 gain is too few, 2 are too skewed to tell, and 0 have no spread.
    assert rates.worse == pytest.approx(100 * 16 / 2**16)
    assert rates.better == pytest.approx(rates.worse)


def test_verdicts_are_written_with_their_goals(tmp_path, capsys):
    output = tmp_path / "verdicts.json"
    verdicts.main(["--trials=20", "--sizes", "16", "--output", str(output)])
    raw = json.loads(output.read_text())

    assert "| two-valued, p .2 to .8, the worst p | " in capsys.readouterr().out
    assert len(raw["percent_of_false_verdicts"]) == len(verdicts.SIMULATED) + 1 + 2
    assert raw["goals"][verdicts.TWO_VALUED]["met"] is True


def test_a_bound_that_skewness_breaks_is_seen_to_be_broken():
    rare = next(each for each in races.all_data() if each.name == "1 for 5% of prompts")
    t, betting = races.rates(rare, 64, 200)

    assert t.false_stops > 10
    assert betting.false_stops <= 5
    assert betting.drawn["-0.3"] < 60


def test_races_are_written_with_their_goal(tmp_path, capsys):
    output = tmp_path / "races.json"
    races.main(["--trials=3", "--output", str(output)])

    assert "| landscape 24x24 | 32 | " in capsys.readouterr().out
    assert len(json.loads(output.read_text())["rates"]) == 2 * 2 * len(races.all_data())
