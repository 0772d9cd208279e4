"""Charts: what each figure draws of a search over an analytic reward."""

import html
import json
import math
import re
from dataclasses import replace

import pytest

from crdiff_core.ratios import GROUPS
from search import charts
from search.charts import gains, history, maps, parallel
from search.comparison import Comparison
from search.racing import Race
from search.space import Space
from tests.search.landscapes import SPACE, make_search, measure, work

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
POINTS = Space(SPACE, 1.5)


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    """A finished search whose steps were taken, raced and lost, or failed."""

    def outcome(ratios, prompts):
        if 0.4 < ratios.mid < 0.5:
            return {"failure": HOSTILE, "transient": False}
        return {"measured": measure(ratios, prompts)}

    made = make_search(tmp_path_factory.mktemp("charts"), steps=30, race=Race(alpha=0.3, stride=2))
    work(made, outcome=outcome)
    assert made.finished
    return made


@pytest.fixture(scope="module")
def evaluations(search):
    """Complete, failed and stopped ones."""
    found = search.known_evaluations
    assert {(e.is_complete, e.is_stopped, e.failure is None) for e in found} == {
        (True, False, True),
        (False, True, True),
        (False, False, False),
    }
    return found


def complete_of(evaluations):
    return sorted((e for e in evaluations if e.is_complete), key=lambda e: e.mean)


def drawn(figure):
    """The figure as a browser reads it."""
    return json.loads(figure.to_json())


def named(figure, name):
    return next((trace for trace in figure.data if trace.name == name), None)


# --- gains -----------------------------------------------------------------------------------

COMPARISON = Comparison(0.04, -0.2, 0.3, num_prompts=5, num_texts=5)
DIFFERENCES = [("a", 0.2), ("b", -0.1), ("c", 0.0), ("d", 0.4), ("e", -0.3)]


def test_gains_are_sorted_and_keep_their_prompts():
    (bars,) = gains(COMPARISON, DIFFERENCES).data

    assert list(bars.y) == [-0.3, -0.1, 0.0, 0.2, 0.4]
    assert list(bars.x) == [1, 2, 3, 4, 5]
    assert list(bars.customdata) == ["e", "b", "c", "a", "d"]


def test_losses_have_a_colour_of_their_own():
    (bars,) = gains(COMPARISON, DIFFERENCES).data
    colours = bars.marker.color

    assert len(set(colours[:2])) == len(set(colours[2:])) == 1
    assert colours[0] != colours[2]


def test_gains_show_their_mean_and_its_interval():
    figure = gains(COMPARISON, DIFFERENCES)
    spans = [(shape.type, shape.y0, shape.y1) for shape in figure.layout.shapes]

    assert spans == [("rect", -0.2, 0.3), ("line", 0.04, 0.04)]


# --- history ---------------------------------------------------------------------------------


def test_history_draws_complete_steps_with_the_best_so_far_and_the_dense_level(search):
    figure = history(search.steps, search.of("dense").mean)
    points, best = named(figure, "step, with standard error"), named(figure, "best so far")
    taken = {
        number: step.evaluation
        for number, step in enumerate(search.steps, 1)
        if step.evaluation.is_complete and not step.lost_race
    }
    means = [evaluation.mean for evaluation in taken.values()]

    assert list(points.x) == list(best.x) == list(taken)
    assert list(points.y) == means
    assert list(points.error_y.array) == [e.standard_error for e in taken.values()]
    assert list(points.customdata) == [str(e.ratios) for e in taken.values()]
    assert list(best.y) == [max(means[: count + 1]) for count in range(len(means))]
    assert list(named(figure, "dense").y) == [search.of("dense").mean] * 2
    assert list(named(figure, "dense").x) == [1, 30]


def test_history_draws_lost_races_at_their_estimates_and_not_among_the_best(search):
    figure = history(search.steps, search.of("dense").mean)
    lost = {number: s.reward for number, s in enumerate(search.steps, 1) if s.lost_race}

    assert lost
    assert list(named(figure, "lost its race").x) == list(lost)
    assert list(named(figure, "lost its race").y) == list(lost.values())
    assert set(lost).isdisjoint(named(figure, "best so far").x)


def test_a_race_that_was_lost_with_every_prompt_drawn_is_a_lost_one(search):
    whole = next(step for step in search.steps if step.evaluation.is_complete)
    figure = history([replace(whole, lost_race=True, reward=9.0)], None)

    assert list(named(figure, "lost its race").y) == [9.0]
    assert list(named(figure, "best so far").y) == []


@pytest.mark.parametrize("dense", [-1.0, None, 9.0])
def test_history_draws_failures_at_the_bottom(search, dense):
    failed = named(history(search.steps, dense), "failed")
    numbers = [n for n, step in enumerate(search.steps, 1) if step.evaluation.failure]
    levels = [step.reward for step in search.steps if step.reward is not None]

    assert numbers
    assert list(failed.x) == numbers
    assert list(failed.y) == [min([*levels, *([] if dense is None else [dense])])] * len(numbers)


def test_where_all_steps_failed_there_is_a_level_for_them(search):
    failed = [step for step in search.steps if step.evaluation.failure]

    assert list(named(history(failed, None), "failed").y) == [0.0] * len(failed)


def test_history_leaves_out_what_there_is_none_of(search):
    plain = [step for step in search.steps if step.evaluation.is_complete]

    assert [trace.name for trace in history(plain, None).data] == [
        "step, with standard error",
        "best so far",
    ]
    assert named(history([], 0.5), "dense") is None


def test_one_prompt_has_no_error_bar(search):
    step = next(step for step in search.steps if step.evaluation.is_complete)
    prompts = replace(step.evaluation.prompts, prompts=step.evaluation.prompts.prompts[:1])
    alone = replace(step.evaluation, prompts=prompts, rewards=(0.5,))
    figure = history([replace(step, evaluation=alone)], None)

    assert list(named(figure, "step, with standard error").error_y.array) == [0.0]


# --- maps ------------------------------------------------------------------------------------


def test_there_is_a_map_of_every_two_dimensions(search, evaluations):
    figures = maps(POINTS, evaluations, search.winner)
    assert list(figures) == ["down and mid", "down and up", "mid and up"]

    complete = complete_of(evaluations)
    others = [e for e in evaluations if not e.is_complete]
    for name, figure in figures.items():
        x, y = name.split(" and ")
        assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == (x, y)
        for trace, some in zip(figure.data, (others, complete, [search.winner]), strict=True):
            assert list(trace.x) == [e.ratios[x] for e in some]
            assert list(trace.y) == [e.ratios[y] for e in some]


def test_a_maps_colour_is_the_reward_and_the_best_lies_on_top(search, evaluations):
    hollow, filled, star = maps(POINTS, evaluations, search.winner)["down and up"].data
    means = [e.mean for e in complete_of(evaluations)]

    assert list(filled.marker.color) == means == sorted(means)
    assert (filled.marker.cmin, filled.marker.cmax) == (means[0], means[-1])
    assert hollow.marker.symbol == "circle-open"
    assert star.marker.symbol == "star"


def test_a_maps_points_say_what_became_of_them(search, evaluations):
    hollow, filled, _ = maps(POINTS, evaluations, None)["down and up"].data
    outcomes = {text.partition("<br>")[2] for text in hollow.customdata}
    best = complete_of(evaluations)[-1]

    assert outcomes == {"failed", "stopped early"}
    assert filled.customdata[-1] == f"{best.ratios}<br>reward {best.mean:.4f}"


def test_without_a_winner_a_map_has_no_star(evaluations):
    assert [len(figure.data[2].x) for figure in maps(POINTS, evaluations, None).values()] == [
        0
    ] * 3


def test_maps_show_the_whole_space_with_a_margin(evaluations):
    for figure in maps(POINTS, evaluations, None).values():
        for axis in (figure.layout.xaxis, figure.layout.yaxis):
            assert axis.range == pytest.approx((0.1 - 0.042, 0.8 + 0.042))


def test_a_search_of_failures_alone_has_maps(evaluations):
    failed = [e for e in evaluations if e.failure]
    hollow, filled, _ = maps(POINTS, failed, None)["down and mid"].data

    assert len(hollow.x) == len(failed)
    assert len(filled.x) == 0


def test_the_weight_is_a_dimension_where_it_was_searched(search, evaluations):
    space = Space(SPACE | {"poa_weight": (1.0, 2.0)}, 1.5)
    figures = maps(space, evaluations, search.winner)

    assert list(figures) == [
        *("down and mid", "down and up", "down and poa_weight"),
        *("mid and up", "mid and poa_weight", "up and poa_weight"),
    ]
    assert set(figures["mid and poa_weight"].data[1].y) == {1.5}
    assert ", k 1.500<br>" in figures["mid and poa_weight"].data[1].customdata[0]


def test_one_dimension_is_one_chart_with_the_reward_upwards(tmp_path, evaluations):
    space = Space({"ratio": (0.1, 0.8)}, 1.5)
    uniform = [
        replace(e, candidate=space.candidate({"ratio": e.ratios.down})) for e in evaluations
    ]
    best = complete_of(uniform)[-1]
    ((name, figure),) = maps(space, uniform, best).items()
    points, star = figure.data

    assert name == "reward by ratio"
    assert list(points.x) == [e.ratios.down for e in complete_of(uniform)]
    assert list(points.y) == [e.mean for e in complete_of(uniform)]
    assert (list(star.x), list(star.y)) == ([best.ratios.down], [best.mean])


# --- parallel coordinates --------------------------------------------------------------------


def lines_of(trace):
    """The heights of each line in a trace, which a gap ends."""
    lines = [[]]
    for name, height in zip(trace.x, trace.y, strict=True):
        if name is None:
            assert height is None
            lines.append([])
        else:
            lines[-1].append((name, height))
    assert lines.pop() == []
    return [dict(line) for line in lines]


def test_each_complete_evaluation_is_a_line_through_its_ratios_to_its_reward(evaluations):
    figure = parallel(POINTS, evaluations, None)
    complete = complete_of(evaluations)
    low, high = complete[0].mean, complete[-1].mean
    found = [line for trace in figure.data for line in lines_of(trace)]

    assert len(found) == len(complete)
    for line, evaluation in zip(found, complete, strict=True):
        expected = {group: (evaluation.ratios[group] - 0.1) / 0.7 for group in GROUPS}
        assert line == pytest.approx(expected | {"reward": (evaluation.mean - low) / (high - low)})


def test_lines_of_like_rewards_share_a_trace_and_a_colour(evaluations):
    many = [
        replace(e, rewards=(number / 99,) * len(e.rewards))
        for number, e in enumerate(complete_of(evaluations)[:1] * 100)
    ]
    figure = parallel(POINTS, many, None)
    rewards = [[line["reward"] for line in lines_of(trace)] for trace in figure.data]

    assert len(figure.data) == len({trace.line.color for trace in figure.data}) == 12
    assert sum(map(len, rewards)) == 100
    assert all(max(group) - min(group) < 1 / 11 for group in rewards)
    assert [min(group) for group in rewards] == sorted(min(group) for group in rewards)


def test_the_winner_is_a_line_of_its_own_over_the_others(search, evaluations):
    plain, won = parallel(POINTS, evaluations, None), parallel(POINTS, evaluations, search.winner)
    (line,) = lines_of(won.data[-1])

    assert len(won.data) == len(plain.data) + 1
    assert line["down"] == pytest.approx((search.winner.ratios.down - 0.1) / 0.7)
    assert won.data[-1].line.width > max(trace.line.width for trace in plain.data)


def test_each_axis_says_where_it_begins_and_ends(evaluations):
    figure = parallel(POINTS, evaluations, None)
    complete = complete_of(evaluations)
    ends = {}
    for note in figure.layout.annotations:
        ends.setdefault(note.x, []).append(note.text)

    assert [(shape.x0, shape.y0, shape.y1) for shape in figure.layout.shapes] == [
        (name, 0, 1) for name in (*GROUPS, "reward")
    ]
    rewards = [f"{complete[0].mean:.3g}", f"{complete[-1].mean:.3g}"]
    assert ends == {group: ["0.1", "0.8"] for group in GROUPS} | {"reward": rewards}


def test_equal_rewards_are_drawn_in_the_middle(evaluations):
    equal = [replace(e, rewards=(0.5,) * len(e.rewards)) for e in complete_of(evaluations)]
    figure = parallel(POINTS, equal, equal[0])

    heights = [line["reward"] for trace in figure.data for line in lines_of(trace)]
    assert set(heights) == {0.5}


# --- all of them -----------------------------------------------------------------------------


def test_no_text_of_anybodys_comes_into_a_chart(search, evaluations):
    failed = next(e for e in evaluations if e.failure)
    assert failed.failure == HOSTILE
    figures = [
        history(search.steps, 0.0),
        parallel(POINTS, evaluations, search.winner),
        *maps(POINTS, evaluations, search.winner).values(),
    ]

    for figure in figures:
        texts = html.unescape(json.dumps(drawn(figure)))
        assert "alert" not in texts
        assert set(re.findall(r"<\W*\w+", texts)) <= {"<br", "<extra", "</extra"}
    # Here it is the caller who escapes.
    (bars,) = gains(COMPARISON, [(html.escape(HOSTILE), 0.1)]).data
    assert bars.customdata[0] == html.escape(HOSTILE)


def test_charts_hold_no_number_that_json_has_not(search, evaluations):
    figures = [
        history(search.steps, None),
        parallel(POINTS, evaluations, search.winner),
        *maps(POINTS, evaluations, search.winner).values(),
    ]

    def refuse(name):
        raise AssertionError(name)

    for figure in figures:
        json.loads(figure.to_json(), parse_constant=refuse)


def test_a_point_outside_of_the_space_is_left_out_of_a_map(search, evaluations):
    narrow = Space({group: (0.1, 0.2) for group in GROUPS}, 1.5)
    outside = [e for e in evaluations if narrow.suggestion(e.candidate) is None]
    hollow, filled, _ = charts.maps(narrow, outside, None)["down and up"].data

    assert outside
    assert all(math.isnan(value) for value in (*hollow.x, *filled.x))
