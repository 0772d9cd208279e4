"""Evaluations: prompts cut into batches, settled, tried again, and closed with what is known."""

import math
import statistics
from dataclasses import replace

import pytest

from crdiff_core.prompts import PromptSet
from crdiff_core.ratios import BlockRatios
from search.evaluations import NUM_KEPT, Evaluations
from search.ledger import Ledger
from search.pictures import Pictures
from search.space import Candidate
from search.storage import Storage, StorageError
from tests.search.landscapes import PROMPTS, RECIPE, measure, reward_of

CANDIDATE = Candidate(BlockRatios(0.5, 0.2, 0.4), RECIPE.poa_weight)
OTHER = Candidate(BlockRatios(0.1, 0.6, 0.3), RECIPE.poa_weight)
DENSE = Candidate(BlockRatios(), RECIPE.poa_weight)
NUM_SEARCH = len(PROMPTS["search"])


def opened(folder, size=3, max_failures=2, retry_failed=False, prompt_sets=PROMPTS, **arguments):
    """Evaluations of a session that has just begun."""
    ledger = Ledger(folder / "ledger", run="this", retry_failed=retry_failed)
    return Evaluations(ledger, RECIPE, prompt_sets, size, max_failures=max_failures, **arguments)


@pytest.fixture
def work(tmp_path):
    return opened(tmp_path)


def measured(evaluation, batch, **changes):
    """What a trial reports that drew a batch."""
    prompts = [evaluation.prompts.prompts[number] for number in batch]
    return {"measured": replace(measure(evaluation.candidate.ratios, prompts), **changes)}


def failed(reason="lost", transient=True):
    return {"failure": reason, "transient": transient}


def take(evaluation):
    """The next batch that is to be drawn."""
    return evaluation.todo.popleft()


def take_all(evaluation):
    batches = []
    while evaluation.todo:
        batches.append(take(evaluation))
    return batches


def left(evaluation):
    """The prompts that no trial draws yet."""
    waiting = [number for batch in evaluation.todo for number in batch]
    return [number for number in waiting if number in evaluation.missing]


def draw(work, evaluation, **changes):
    """Draw whatever is missing, and close the evaluation."""
    for batch in take_all(evaluation):
        work.settle(evaluation, batch, measured(evaluation, batch, **changes))
    return work.close(evaluation)


def drawn(work, kind="search", candidate=CANDIDATE, prompts="search", **changes):
    return draw(work, work.begin(kind, candidate, prompts), **changes)


# --- batches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, NUM_SEARCH, 100])
def test_batches_cover_every_prompt_once_in_order(tmp_path, size):
    work = opened(tmp_path, size)
    batches = take_all(work.begin("search", CANDIDATE, "search"))

    assert sum(batches, ()) == tuple(range(NUM_SEARCH))
    assert max(len(batch) for batch in batches) == min(size, NUM_SEARCH)


def test_a_trial_names_the_prompts_by_their_place_in_the_whole_set(work):
    candidate = replace(OTHER, poa_weight=1.0, drawn_at="48x80")
    evaluation = work.begin("resized", candidate, "validation", numbers=[2, 5, 9])
    batches = take_all(evaluation)
    trials = [evaluation.trial(batch, keep=True) for batch in batches]

    assert [number for trial in trials for number in trial["batch"]] == [2, 5, 9]
    for trial in trials:
        assert trial["ratios"] == OTHER.ratios.as_dict()
        assert (trial["poa_weight"], trial["drawn_at"]) == (1.0, "48x80")
        assert trial["prompts"] == "validation"
    assert evaluation.prompts.prompts == tuple(
        PROMPTS["validation"].prompts[number] for number in (2, 5, 9)
    )


@pytest.mark.parametrize(
    ("kind", "places"),
    [
        ("dense", [0, 1]),
        ("search", [0, 1]),
        ("rerank", []),
        ("validation", [0, 1, 2]),
        ("dense validation", [0, 1, 2]),
        ("pruned alone", [0, 1, 2]),
        ("resized", [0, 1, 2]),
    ],
)
def test_pictures_are_kept_of_what_a_report_shows(work, kind, places):
    evaluation = work.begin(kind, CANDIDATE, "validation")
    batch = (NUM_KEPT - 2, NUM_KEPT - 1, NUM_KEPT)

    assert evaluation.trial(batch, keep=True)["keep"] == places
    assert evaluation.trial(batch, keep=False)["keep"] == []


def test_a_settled_batch_leaves_its_pictures_in_their_folder_and_not_in_the_result(tmp_path):
    pictures = Pictures(Storage.at(tmp_path / "pictures"))
    work = opened(tmp_path, pictures=pictures)
    evaluation = work.begin("search", CANDIDATE, "search")
    # The second batch comes first.
    batches = take_all(evaluation)
    result = measured(evaluation, batches[1], pictures={0: b"fourth"})
    work.settle(evaluation, batches[1], result)

    found = pictures.get(evaluation.key, PROMPTS["search"].prompts)
    assert [number for number, each in enumerate(found) if each is not None] == [batches[1][0]]
    assert found[batches[1][0]] == b"fourth"
    assert result["measured"].pictures == {}


# --- what is known ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "candidate", "prompts"),
    [
        ("dense", DENSE, "search"),
        ("search", CANDIDATE, "search"),
        ("rerank", CANDIDATE, "rerank"),
        ("validation", CANDIDATE, "validation"),
    ],
)
def test_an_evaluation_is_the_mean_over_all_its_prompts(work, kind, candidate, prompts):
    evaluation = drawn(work, kind, candidate, prompts)
    expected = [reward_of(candidate.ratios, prompt) for prompt in PROMPTS[prompts].prompts]

    assert list(evaluation.rewards) == expected
    assert evaluation.mean == pytest.approx(statistics.fmean(expected))
    assert evaluation.standard_error == pytest.approx(
        statistics.stdev(expected) / len(expected) ** 0.5
    )
    assert evaluation.is_complete


def test_rewards_are_in_the_order_of_the_prompts_whenever_they_came(work):
    evaluation = work.begin("search", CANDIDATE, "search")
    batches = take_all(evaluation)
    first = []
    for batch in reversed(batches):
        work.settle(evaluation, batch, measured(evaluation, batch))
        first.append(evaluation.num_first)

    prompts = PROMPTS["search"].prompts
    assert work.rewards(evaluation) == [reward_of(CANDIDATE.ratios, each) for each in prompts]
    assert first == [0] * (len(batches) - 1) + [NUM_SEARCH]


def test_what_the_ledger_knows_is_not_handed_out_again(tmp_path):
    first = opened(tmp_path)
    begun = first.begin("search", CANDIDATE, "search")
    batch = take(begun)
    first.settle(begun, batch, measured(begun, batch))
    rest = list(range(len(batch), NUM_SEARCH))
    again = opened(tmp_path)

    assert again.missing(CANDIDATE) == rest
    assert again.missing(OTHER) == list(range(NUM_SEARCH))
    evaluation = again.begin("search", CANDIDATE, "search")
    assert left(evaluation) == sorted(evaluation.missing) == rest
    closed = draw(again, evaluation)
    assert closed.num_rendered == len(rest)
    assert closed.rewards == drawn(opened(tmp_path / "whole")).rewards

    known = opened(tmp_path).begin("search", CANDIDATE, "search")
    assert left(known) == []
    assert not known.missing
    assert known.num_first == NUM_SEARCH


def test_asking_what_is_known_begins_nothing(tmp_path):
    drawn(opened(tmp_path))
    work = opened(tmp_path)

    assert work.known(CANDIDATE).is_complete
    assert work.known(OTHER).rewards == ()
    assert work.open == work.done == []


def test_candidates_that_draw_other_pictures_have_other_keys(work):
    variants = [
        CANDIDATE,
        OTHER,
        replace(CANDIDATE, poa_weight=1.0),
        replace(CANDIDATE, drawn_at="48x80"),
        replace(DENSE, drawn_at="48x80"),
        DENSE,
    ]

    assert len({work.key(candidate) for candidate in variants}) == len(variants)
    assert work.key(replace(DENSE, poa_weight=1.0)) == work.key(DENSE)


def test_the_ledger_says_which_candidate_a_row_is_of(tmp_path):
    candidate = replace(OTHER, poa_weight=1.2, drawn_at="48x80")
    closed = drawn(opened(tmp_path), candidate=candidate)

    assert Ledger(tmp_path / "ledger").candidates == {closed.key: candidate}


# --- failures --------------------------------------------------------------------------------


def test_a_trial_that_ended_before_it_began_gives_its_batch_back(work):
    evaluation = work.begin("search", CANDIDATE, "search")
    batch = take(evaluation)
    work.settle(evaluation, batch, None)

    assert take(evaluation) == batch
    assert evaluation.num_failures.total() == 0


@pytest.mark.parametrize("max_failures", [0, 1, 3])
def test_a_transient_failure_that_stays_fails_the_evaluation(tmp_path, max_failures):
    work = opened(tmp_path, max_failures=max_failures)
    evaluation = work.begin("search", CANDIDATE, "search")
    first = take(evaluation)
    for _ in range(max_failures):
        work.settle(evaluation, first, failed())
        assert evaluation.failure is None
        assert take(evaluation) == first
    work.settle(evaluation, first, failed())

    assert evaluation.failure == "lost"
    assert set(left(evaluation)).isdisjoint(first)


def test_a_failure_that_is_not_transient_is_not_tried_again(work):
    evaluation = work.begin("search", CANDIDATE, "search")
    batch = take(evaluation)
    work.settle(evaluation, batch, failed("NaN pictures", transient=False))

    assert evaluation.failure == "NaN pictures"
    assert set(left(evaluation)).isdisjoint(batch)


def test_each_batch_may_fail_as_often_as_allowed(tmp_path):
    work = opened(tmp_path, max_failures=1)
    evaluation = work.begin("search", CANDIDATE, "search")
    while evaluation.todo:
        batch = take(evaluation)
        work.settle(evaluation, batch, failed())
        assert take(evaluation) == batch
        work.settle(evaluation, batch, measured(evaluation, batch))

    assert work.close(evaluation).is_complete


def test_a_failed_evaluation_has_its_reason_and_no_reward(work):
    evaluation = work.begin("search", CANDIDATE, "search")
    good, bad = take(evaluation), take(evaluation)
    work.settle(evaluation, good, measured(evaluation, good))
    work.settle(evaluation, bad, failed("NaN pictures", transient=False))
    closed = work.close(evaluation)

    assert closed.failure == "NaN pictures"
    assert closed.rewards == ()
    assert math.isnan(closed.mean)
    assert math.isnan(closed.standard_error)
    assert not closed.is_complete
    assert not closed.is_stopped
    assert closed.num_rendered == len(good)


def test_a_recorded_failure_is_tried_again_only_if_asked_for(tmp_path):
    work = opened(tmp_path)
    evaluation = work.begin("search", CANDIDATE, "search")
    batch = take(evaluation)
    work.settle(evaluation, batch, failed("NaN pictures", transient=False))
    again = opened(tmp_path).begin("search", CANDIDATE, "search")
    asked = opened(tmp_path, retry_failed=True).begin("search", CANDIDATE, "search")

    assert again.failure == "NaN pictures"
    assert set(left(again)).isdisjoint(batch)
    assert asked.failure is None
    assert asked.missing == set(range(NUM_SEARCH))


def test_a_batch_that_cannot_be_recorded_stays_missing(work, monkeypatch):
    evaluation = work.begin("search", CANDIDATE, "search")
    batch = take(evaluation)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        work.settle(evaluation, batch, measured(evaluation, batch))

    assert evaluation.missing == set(range(NUM_SEARCH))
    assert evaluation.num_rendered == 0
    assert work.rewards(evaluation) == []


# --- what is closed --------------------------------------------------------------------------


def test_evaluations_are_listed_in_the_order_of_their_ends(work):
    first = work.begin("search", CANDIDATE, "search")
    second = work.begin("rerank", OTHER, "rerank")
    assert work.open == [first, second]
    ended = [draw(work, second), draw(work, first)]

    assert work.open == []
    assert work.done == ended
    assert [evaluation.index for evaluation in ended] == [0, 1]
    assert work.of("search", "validation") == [ended[1]]
    assert work.of("validation") == []


def test_of_a_candidate_the_last_search_evaluation_counts(work):
    stopped = work.close(work.begin("search", CANDIDATE, "search"), is_stopped=True)
    assert work.last == {stopped.key: stopped}
    complete = drawn(work)
    drawn(work, "rerank", CANDIDATE, "rerank")

    assert work.last == {complete.key: complete}


def test_a_stopped_evaluation_has_the_rewards_so_far_and_its_estimate(work):
    evaluation = work.begin("search", CANDIDATE, "search")
    batch = take(evaluation)
    work.settle(evaluation, batch, measured(evaluation, batch))
    stopped = work.close(evaluation, is_stopped=True, estimate=0.25)

    assert stopped.is_stopped
    assert stopped.estimate == 0.25
    assert stopped.rewards == tuple(work.rewards(evaluation))
    assert len(stopped.rewards) == len(batch)
    assert math.isnan(stopped.mean)
    assert math.isnan(stopped.standard_error)


def test_one_prompt_has_a_mean_and_no_standard_error(tmp_path):
    alone = {"search": PromptSet("search", PROMPTS["search"].prompts[:1])}
    evaluation = drawn(opened(tmp_path, prompt_sets=alone))

    assert evaluation.mean == evaluation.rewards[0]
    assert math.isnan(evaluation.standard_error)


def test_time_is_summed_by_stage_and_memory_is_the_peak(work):
    evaluation = work.begin("search", CANDIDATE, "search")
    batches = take_all(evaluation)
    for number, batch in enumerate(batches):
        seconds = {"prune": 0.5, "render": 2.0 * len(batch), "score": 0.25}
        # The last worker has no GPU.
        peak = None if batch == batches[-1] else 4.0 - number
        result = measured(evaluation, batch, seconds=seconds, memory_gib=peak)
        work.settle(evaluation, batch, result)
    closed = work.close(evaluation)

    num_batches = len(batches)
    assert closed.stages == pytest.approx(
        {"prune": 0.5 * num_batches, "render": 2.0 * NUM_SEARCH, "score": 0.25 * num_batches}
    )
    assert closed.seconds == pytest.approx(sum(closed.stages.values()))
    assert closed.memory_gib == 4.0
    assert closed.measured_at > 0


def test_what_was_not_measured_is_left_out(work):
    closed = drawn(work, seconds={"render": 1.0})

    assert set(closed.stages) == {"render"}
    assert closed.memory_gib is None


def test_the_sparsity_is_of_a_batch_that_was_drawn(work):
    evaluation = work.begin("search", CANDIDATE, "search")
    bad, good = take(evaluation), take(evaluation)
    work.settle(evaluation, bad, failed(transient=False))
    work.settle(evaluation, good, measured(evaluation, good))

    assert work.close(evaluation).sparsity == CANDIDATE.ratios.as_dict()
    nothing = work.close(work.begin("search", OTHER, "search"))
    assert nothing.sparsity == {}
    assert nothing.measured_at == 0.0
