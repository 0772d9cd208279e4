import math
import pickle
import statistics
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crdiff_core.ratios import BlockRatios
from search.comparison import compare
from search.ledger import Ledger
from tests.search.landscapes import PROMPTS, RECIPE, course, make_search, measure, reward_of, work

BATCHES = {"search": 3, "rerank": 3, "validation": 4}


def test_an_evaluation_is_the_mean_over_all_its_prompts(tmp_path):
    search = make_search(tmp_path)
    work(search)

    for evaluation in search.evaluations:
        expected = [reward_of(evaluation.ratios, prompt) for prompt in evaluation.prompts.prompts]
        assert list(evaluation.rewards) == expected
        assert evaluation.mean == pytest.approx(statistics.fmean(expected))


def test_a_run_is_dense_then_search_then_rerank_then_validation(tmp_path):
    search = make_search(tmp_path, steps=20, rerank_top=3)
    num_trials = work(search)
    kinds = [evaluation.kind for evaluation in search.evaluations]

    assert kinds == ["dense", *["search"] * 20, *["rerank"] * 3, "dense validation", "validation"]
    assert num_trials == 21 * 3 + 3 * 3 + 2 * 4
    assert search.finished


def test_the_winner_is_the_best_of_the_top_few_on_fresh_prompts(tmp_path):
    search = make_search(tmp_path, rerank_top=4)
    work(search)
    searched = {e.key: e.mean for e in search.evaluations if e.kind == "search"}
    reranked = {e.key: e.mean for e in search.evaluations if e.kind == "rerank"}

    assert set(reranked) == set(sorted(searched, key=searched.get)[-4:])
    assert search.winner.key == max(reranked, key=reranked.get)
    assert search.of("validation").key == search.winner.key


def test_running_again_draws_nothing_and_gives_the_same(tmp_path):
    first = make_search(tmp_path)
    work(first)
    again = make_search(tmp_path)

    assert again.replay()
    assert course(again) == course(first)
    assert sum(evaluation.num_rendered for evaluation in again.evaluations) == 0


@settings(max_examples=20, deadline=None)
@given(stops=st.lists(st.integers(1, 40), max_size=3))
def test_a_search_cut_off_anywhere_goes_on_to_the_same_end(tmp_path_factory, stops):
    whole = make_search(tmp_path_factory.mktemp("whole"))
    num_trials = work(whole)
    folder = tmp_path_factory.mktemp("cut")
    drawn = 0
    for stop in stops:
        drawn += work(make_search(folder), max_trials=stop)
    last = make_search(folder)
    last.replay()
    drawn += work(last)

    assert course(last) == course(whole)
    assert drawn == num_trials


@pytest.mark.parametrize("searcher", ["annealing", "random"])
def test_the_number_of_workers_does_not_change_the_answer(tmp_path, searcher):
    one = make_search(tmp_path / "1", searcher)
    many = make_search(tmp_path / "5", searcher)
    work(one)
    work(many, num_workers=5, seed=7)

    assert sorted(course(many)) == sorted(course(one))
    assert many.winner.key == one.winner.key


def test_searchers_of_a_cell_share_what_was_drawn(tmp_path):
    work(make_search(tmp_path, "annealing"))
    other = make_search(tmp_path, "random")
    work(other)

    assert other.of("dense").num_rendered == 0
    assert other.of("dense validation").num_rendered == 0


def failing(at, **how):
    """Fail the trials of every ratio triple that `at` names; measure the others."""
    from tests.search.landscapes import measure

    def outcome(ratios, prompts):
        if at(ratios):
            return {"failure": "NaN pictures", "transient": False, **how}
        return {"measured": measure(ratios, prompts)}

    return outcome


def test_a_failed_evaluation_is_recorded_and_never_the_best(tmp_path):
    search = make_search(tmp_path)
    work(search, outcome=failing(lambda ratios: ratios.down > 0.31))
    failed = [e for e in search.evaluations if e.failure is not None]

    assert failed
    assert all(e.failure == "NaN pictures" and math.isnan(e.mean) for e in failed)
    assert search.winner.ratios.down <= 0.31
    assert course(search) == course(_replayed(tmp_path))


def _replayed(folder, **kwargs):
    search = make_search(folder, **kwargs)
    assert search.replay()
    return search


def test_retry_failed_draws_failed_evaluations_again(tmp_path):
    work(make_search(tmp_path), outcome=failing(lambda ratios: ratios.down > 0.31))
    search = make_search(tmp_path, retry_failed=True)
    work(search)

    assert all(evaluation.failure is None for evaluation in search.evaluations)
    whole = make_search(tmp_path.with_name("whole"))
    work(whole)
    assert course(search) == course(whole)


def test_a_transient_failure_is_tried_again_for_just_its_batch(tmp_path):
    seen = set()

    def flaky(ratios, prompts):
        if (ratios, prompts) not in seen:
            seen.add((ratios, prompts))
            return {"failure": "out of memory", "transient": True}
        return {"measured": measure(ratios, prompts)}

    search = make_search(tmp_path, max_failures=1)
    num_trials = work(search, outcome=flaky)
    whole = make_search(tmp_path / "whole")

    assert num_trials == 2 * work(whole)
    assert course(search) == course(whole)


def test_a_worker_with_too_little_memory_lowers_the_batch_size_for_the_rest(tmp_path):
    sizes = []

    def short_of_memory(ratios, prompts):
        sizes.append(len(prompts))
        return {"measured": replace(measure(ratios, prompts), batch_size=min(2, len(prompts)))}

    search = make_search(tmp_path)
    work(search, outcome=short_of_memory)
    whole = make_search(tmp_path / "whole")
    work(whole)

    assert sizes[0] == 3
    assert set(sizes[1:]) == {2, 1}
    assert search.batching.limit == 2
    assert course(search) == course(whole)


def test_the_last_batch_of_a_set_lowers_nothing(tmp_path):
    search = make_search(tmp_path)
    work(search)

    assert search.batching.limit == 3


def test_the_batch_size_changes_no_reward(tmp_path):
    courses = []
    for size in (1, 4, 100):
        search = make_search(tmp_path / str(size))
        search.batching.fixed = search.batching.limit = size
        work(search)
        courses.append(course(search))

    assert courses[0] == courses[1] == courses[2]


def test_a_transient_failure_that_stays_fails_the_evaluation(tmp_path):
    search = make_search(tmp_path, max_failures=2)
    outcome = failing(lambda ratios: ratios.down > 0.31, transient=True)
    work(search, outcome=outcome)

    assert any(evaluation.failure == "NaN pictures" for evaluation in search.evaluations)


def test_a_dense_model_that_cannot_be_evaluated_ends_the_search(tmp_path):
    search = make_search(tmp_path)
    num_trials = work(search, outcome=failing(lambda ratios: ratios.is_dense))

    assert "the dense model cannot be evaluated: NaN pictures" in search.failure
    assert num_trials == 1


def test_three_failures_at_the_start_end_the_search(tmp_path):
    search = make_search(tmp_path)
    work(search, outcome=failing(lambda ratios: not ratios.is_dense))

    assert (
        "the first 3 evaluations failed: NaN pictures: mend that and run again" in search.failure
    )


def test_a_dead_worker_fails_the_evaluation_with_a_reason(tmp_path):
    search = make_search(tmp_path)
    search.suggest("a")
    search.on_trial_complete("a", None, error=True)

    assert "worker" in search.evaluations[0].failure


def test_a_trial_that_ray_ended_before_it_began_is_handed_out_again(tmp_path):
    search = make_search(tmp_path)
    config = search.suggest("a")
    search.on_trial_complete("a", None)

    assert search.suggest("b") == config


def test_results_of_unknown_trials_are_ignored(tmp_path):
    search = make_search(tmp_path)
    search.on_trial_complete("nobody's", {"measured": None})
    work(search)
    before = course(search)
    search.on_trial_complete("trial0", {"measured": None})

    assert course(search) == before


def test_rows_are_durable_before_anyone_hears_of_the_evaluation(tmp_path):
    search = make_search(tmp_path)
    known = []

    def check(evaluation):
        ledger = Ledger(tmp_path)
        known.append(
            all(ledger.get(evaluation.key, prompt) for prompt in evaluation.prompts.prompts)
        )

    search.on_evaluation = check
    work(search)

    assert len(known) == len(search.evaluations)
    assert all(known)


def test_a_ledger_that_cannot_be_written_ends_the_search(tmp_path, monkeypatch):
    search = make_search(tmp_path)
    work(search, max_trials=5)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    work(search)
    monkeypatch.undo()

    assert "No space left on device" in search.failure
    again = make_search(tmp_path)
    assert work(again) == 21 * 3 + 3 * 3 + 2 * 4 - 5


def test_a_prompt_that_always_fails_is_tried_as_often_as_asked_however_batches_are_cut(tmp_path):
    tries = Counter()

    def one_fails(ratios, prompts):
        if ratios.is_dense:  # If it failed, that would be the end.
            return {"measured": measure(ratios, prompts)}
        if "prompt 0" in {prompt.text for prompt in prompts}:
            tries[ratios] += 1
            return {"failure": "lost", "transient": True}
        # The batches of the first evaluation become smaller while its first one is under way.
        return {"measured": replace(measure(ratios, prompts), batch_size=1)}

    search = make_search(tmp_path, steps=1, max_failures=2)
    search.batching.fixed = search.batching.limit = 4
    work(search, num_workers=2, outcome=one_fails, seed=3)

    assert search.batching.limit == 1
    assert list(tries.values()) == [3]


def test_ray_may_pickle_the_searcher_at_any_time(tmp_path):
    search = make_search(tmp_path)
    search.on_evaluation = lambda evaluation: None
    work(search, max_trials=5)

    pickle.loads(pickle.dumps(search))


def test_dense_rewards_do_not_depend_on_the_poa_weight():
    from dataclasses import replace

    other = replace(RECIPE, poa_weight=2.0)
    assert RECIPE.key(BlockRatios()) == other.key(BlockRatios())
    assert RECIPE.key(BlockRatios(0.1)) != other.key(BlockRatios(0.1))


def test_prompt_sets_are_disjoint():
    texts = [prompt.text for prompts in PROMPTS.values() for prompt in prompts.prompts]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(
    ("shift", "verdict"),
    [(0.5, "better"), (0.0, "no difference shown"), (-0.5, "worse")],
)
def test_the_verdict_follows_the_interval(shift, verdict):
    dense = [0.1 * i for i in range(10)]
    noise = [0.1, -0.1] * 5
    comparison = compare([d + shift + n for d, n in zip(dense, noise, strict=True)], dense)

    assert comparison.verdict == verdict
    assert comparison.difference == pytest.approx(shift)
    # t(0.975, 9) = 2.2622 times the standard error of ten alternating +-0.1.
    assert comparison.high - comparison.low == pytest.approx(2 * 2.2622 * 0.1 / 3, rel=1e-3)


def test_equal_rewards_show_no_difference():
    assert compare([0.5, 0.7], [0.5, 0.7]).verdict == "no difference shown"
