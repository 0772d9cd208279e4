"""The gallery: which prompts are shown, in which columns, with which notes and pictures."""

import base64
from dataclasses import replace

import pytest

from search.comparison import telling
from search.evaluations import NUM_KEPT
from search.gallery import groups
from tests.search.test_report import make_plan, picture, searched

NUM_SHOWN = 6
COLUMNS = ["Dense", "Pruned alone", "CR-Diff, k = 1.5", "Dense at 32x32, resized"]
AS_THEY_COME, GAINED, LOST = "As they come", "Where it gained most", "Where it lost most"


def won_and_lost(ratios, prompt):
    """Dense is at 0.5; pruned, prompts are better or worse, by an amount of their own."""
    return 0.5 if ratios.is_dense else prompt.seed % 1000 / 1000


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished search at a size that is not the model's own."""
    plan = searched(
        tmp_path_factory.mktemp("gallery"),
        "res=48x48",
        "budget.steps=3",
        "prompts.validation=24",
        rewards=won_and_lost,
    )
    assert plan.search.finished
    return plan


def by_title(plan):
    return {group.title: group for group in groups(plan)}


def prompts_of(group):
    return [prompt for prompt, _ in group.rows]


def cells_of(plan):
    return [cell for group in groups(plan) for _, row in group.rows for cell in row]


def data_of(cell):
    head, _, data = cell.uri.partition(",")
    assert head == "data:image/png;base64"
    return base64.b64decode(data)


def test_a_finished_search_shows_the_first_prompts_and_the_most_telling_ones(finished):
    winner, dense = finished.search.of("validation"), finished.search.of("dense validation")
    gains = [a - b for a, b in zip(winner.rewards, dense.rewards, strict=True)]
    told = telling(gains, NUM_SHOWN)
    found = by_title(finished)
    shown = [prompt for group in found.values() for prompt in prompts_of(group)]

    assert list(found) == [AS_THEY_COME, GAINED, LOST]
    for title, numbers in zip(found, told, strict=True):
        assert prompts_of(found[title]) == [winner.prompts.prompts[n] for n in numbers]
    assert len(shown) == len(set(shown)) == NUM_SHOWN
    assert found[LOST].note == "The largest losses of the other 21 validation prompts."
    assert found[GAINED].note == "The largest gains of the other 21 validation prompts."


def test_each_row_has_the_pictures_that_a_user_would_compare(finished):
    for group in groups(finished):
        for prompt, cells in group.rows:
            titles = [cell.title for cell in cells]

            assert titles == COLUMNS
            assert [cell.alt for cell in cells] == [f"{each}: {prompt.text}" for each in titles]
            # The picture of each is of the colour of its reward.
            pruned = picture(won_and_lost(finished.search.winner.ratios, prompt))
            assert [data_of(cell) for cell in cells] == [
                picture(0.5),
                pruned,
                pruned,
                picture(0.5),
            ]


def test_a_note_is_the_reward_and_its_gain_over_the_dense_model(finished):
    for group in groups(finished):
        for prompt, cells in group.rows:
            reward = won_and_lost(finished.search.winner.ratios, prompt)
            pruned = f"{reward:.4f} ({reward - 0.5:+.4f})"

            assert [cell.note for cell in cells] == ["0.5000", pruned, pruned, "0.5000 (+0.0000)"]


def test_the_first_prompts_come_with_their_mean_rewards(finished):
    group = by_title(finished)[AS_THEY_COME]
    rewards = [won_and_lost(finished.search.winner.ratios, each) for each in prompts_of(group)]
    mean = sum(rewards) / 3

    assert group.note == (
        "The first validation prompts. Mean rewards of these 3: Dense 0.5000; "
        f"Pruned alone {mean:.4f}; CR-Diff, k = 1.5 {mean:.4f}; Dense at 32x32, resized 0.5000."
    )


def test_nothing_is_shown_as_lost_where_nothing_was(tmp_path):
    plan = searched(tmp_path, "budget.steps=3")  # Better than dense on every prompt.

    assert list(by_title(plan)) == [AS_THEY_COME, GAINED]


def test_only_small_pictures_are_enlarged(finished):
    large = replace(finished, recipe=replace(finished.recipe, height=128, width=256))

    assert {cell.is_small for cell in cells_of(finished)} == {True}
    assert {cell.is_small for cell in cells_of(large)} == {False}


def test_a_search_that_is_under_way_shows_the_best_so_far_on_search_prompts(tmp_path):
    plan = searched(tmp_path, "prompts.search=6", most=5)
    (group,) = groups(plan)
    dense, best = plan.search.of("dense"), plan.search.candidates[0]

    assert plan.search.of("validation") is None
    assert (group.title, group.note) == (
        AS_THEY_COME,
        "The first of the prompts that it searches with.",
    )
    assert prompts_of(group) == list(plan.prompt_sets["search"].prompts[:NUM_KEPT])
    for number, (_, cells) in enumerate(group.rows):
        assert [cell.title for cell in cells] == ["Dense", "CR-Diff, best so far"]
        assert [data_of(cell) for cell in cells] == [
            picture(dense.rewards[number]),
            picture(best.rewards[number]),
        ]
        gain = best.rewards[number] - dense.rewards[number]
        assert cells[1].note == f"{best.rewards[number]:.4f} ({gain:+.4f})"


def test_before_the_first_step_the_dense_model_stands_alone(tmp_path):
    (group,) = groups(searched(tmp_path, most=1))

    assert [[cell.title for cell in cells] for _, cells in group.rows] == [["Dense"]] * NUM_KEPT


def test_before_anything_is_drawn_nothing_is_shown(tmp_path):
    assert groups(make_plan(tmp_path)) == []


@pytest.mark.parametrize("most", [3, 999], ids=["under way", "finished"])
def test_a_search_that_keeps_no_pictures_shows_none(tmp_path, most):
    plan = searched(tmp_path, "budget.steps=2", "report.pictures=0", most=most)

    assert plan.search.evaluations
    assert groups(plan) == []


def test_a_picture_that_was_lost_leaves_its_reward(tmp_path):
    plan = searched(tmp_path, "budget.steps=2")
    shown = cells_of(plan)
    for file in (plan.folder.local.parent / "pictures").iterdir():
        file.unlink()
    cells = cells_of(plan)

    assert {(cell.uri, cell.missing) for cell in cells} == {(None, "not kept")}
    assert [cell.note for cell in cells] == [cell.note for cell in shown]


def test_a_column_that_failed_says_why_and_has_no_rewards(tmp_path):
    # All but the last trial, which draws the pruned model alone.
    plan = searched(tmp_path, "budget.steps=2", most=9)
    last = plan.search.suggest("last")
    assert last["poa_weight"] == 1
    plan.search.on_trial_complete("last", {"failure": "black pictures", "transient": False})
    assert plan.search.finished
    found = by_title(plan)

    assert found[AS_THEY_COME].note.count(";") == 1
    assert "Pruned alone" not in found[AS_THEY_COME].note
    for group in found.values():
        for _, (dense, alone, winner) in group.rows:
            assert (alone.uri, alone.missing, alone.note) == (None, "failed: black pictures", "")
            assert dense.uri is not None
            assert winner.uri is not None


def test_a_search_whose_validation_failed_shows_the_search_prompts(tmp_path):
    plan = searched(tmp_path, "budget.steps=2", fails_on="validation")
    (group,) = groups(plan)

    assert plan.search.finished
    assert prompts_of(group) == list(plan.prompt_sets["search"].prompts[:NUM_KEPT])
    assert [cell.title for cell in group.rows[0][1]] == ["Dense", "CR-Diff, best so far"]
