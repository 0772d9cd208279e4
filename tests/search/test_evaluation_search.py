import math
import pickle
import statistics
from collections import Counter

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.tune.search import Searcher

from crdiff_core.ratios import BlockRatios
from search.annealing import REFERENCE
from search.batching import batches, filled
from search.ledger import Ledger
from search.pictures import Pictures
from search.racing import Race
from search.space import Candidate
from search.storage import Storage
from tests.search.landscapes import PROMPTS, RECIPE, course, make_search, measure, reward_of, work

BATCHES = {"search": 3, "rerank": 3, "validation": 4}


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


@settings(max_examples=10)
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


def parts_drawn(folder, num_workers=1, seed=0, **arguments):
    """The trials of a search as the workers see them, with the prompts' numbers."""
    drawn = []

    def outcome(ratios, prompts):
        drawn.append((ratios, tuple(prompt.text for prompt in prompts)))
        return {"measured": measure(ratios, prompts)}

    search = make_search(folder, **arguments)
    work(search, num_workers, outcome, seed=seed)
    return drawn


@pytest.mark.parametrize("racing", [False, True])
def test_a_prompt_always_has_the_same_neighbours_and_the_same_place(tmp_path, racing):
    race = Race(alpha=0.3, stride=3) if racing else None
    allowed = {
        tuple(prompts.prompts[number].text for number in filled(batch, 3))
        for prompts in PROMPTS.values()
        for batch in batches(len(prompts), 3)
    }
    for num_workers in (1, 5):
        drawn = parts_drawn(tmp_path / str(num_workers), num_workers, 7, race=race)
        assert {texts for _, texts in drawn} <= allowed


def test_what_fills_a_batch_up_is_dropped(tmp_path):
    work(make_search(tmp_path))
    rows = Ledger(tmp_path).table().to_pylist()

    # Dense and 20 steps on 7 prompts in batches of 3; three on 8 and two on 10.
    assert len(rows) == 21 * 7 + 3 * 8 + 2 * 10
    assert len({(row["key"], row["prompt"], row["seed"]) for row in rows}) == len(rows)


def test_a_batch_that_lacks_one_reward_is_drawn_as_a_whole_and_only_that_one_is_taken(tmp_path):
    work(make_search(tmp_path, steps=1))
    lost = PROMPTS["search"].prompts[4]
    for file in tmp_path.glob("*.parquet"):
        table = pq.read_table(file)
        gone = pc.and_(pc.equal(table["prompt"], lost.text), pc.equal(table["down"], 0.0))
        pq.write_table(table.filter(pc.invert(gone)), file)
    before = Ledger(tmp_path).table().num_rows
    drawn = parts_drawn(tmp_path, steps=1)

    ((ratios, texts),) = drawn
    assert ratios.is_dense
    assert texts == tuple(PROMPTS["search"].prompts[number].text for number in (3, 4, 5))
    assert Ledger(tmp_path).table().num_rows == before + 1


def test_rewards_of_another_batch_size_are_not_taken(tmp_path):
    work(make_search(tmp_path, steps=4, batch_size=3))
    other = make_search(tmp_path, steps=4, batch_size=2)
    work(other)

    assert other.num_drawn == 5 * 7 + 3 * 8 + 2 * 10
    again = make_search(tmp_path, steps=4, batch_size=3)
    assert again.replay()


def test_a_chosen_few_are_drawn_singly(tmp_path):
    sizes = Counter()

    def outcome(ratios, prompts):
        sizes[len(prompts)] += 1
        return {"measured": measure(ratios, prompts)}

    pictures = Pictures(Storage.at(tmp_path / "pictures"))
    search = make_search(tmp_path, steps=2, pictures=pictures, num_shown=4)
    work(search, outcome=outcome)
    num_shown = len(search.of("pruned alone").prompts)

    assert 2 <= num_shown <= 4
    assert sizes == {1: num_shown, 3: 3 * 3 + 2 * 3 + 2 * 4}


# --- workers with too little memory --------------------------------------------------------------


def too_small(search, trial_id, num_fit):
    search.on_trial_result(trial_id, {"num_fit": num_fit, "device": "a small GPU"})


def test_the_first_worker_decides_how_small_batches_are(tmp_path):
    search = make_search(tmp_path, batch_size=4, shrinks=True)
    search.suggest("a")
    too_small(search, "a", 2)

    assert search.smaller_batch == 2
    assert search.suggest("b") == Searcher.FINISHED
    assert search.failure is None


def test_a_number_that_was_asked_for_and_does_not_fit_is_an_error_that_names_it(tmp_path):
    search = make_search(tmp_path, batch_size=4)
    search.suggest("a")
    too_small(search, "a", 2)

    assert search.failure == (
        "render.batch_size=4: 4 pictures at once do not fit into the memory of a small GPU, 2 do: "
        "set it to 2, or to auto"
    )


def test_once_a_batch_has_fitted_a_smaller_worker_is_not_used(tmp_path, caplog):
    search = make_search(tmp_path, shrinks=True)
    search.max_trials = 2
    first = search.suggest("a")
    lost = search.suggest("b")
    work_off(search, "a", first)
    too_small(search, "b", 1)

    assert caplog.messages == [
        "a worker is not used: 3 pictures at once do not fit into the memory of a small GPU, 1 do"
    ]
    assert search.suggest("c") == lost
    assert search.suggest("d") is None  # The other one has no room.
    assert (search.smaller_batch, search.failure) == (None, None)


def work_off(search, trial_id, config):
    prompts = PROMPTS[config["prompts"]].prompts
    batch = [prompts[number] for number in config["batch"]]
    measured = measure(BlockRatios(**config["ratios"]), batch)
    search.on_trial_complete(trial_id, {"measured": measured})


def test_a_recorded_batch_size_does_not_shrink_and_with_no_other_worker_that_is_an_error(tmp_path):
    search = make_search(tmp_path, shrinks=True, num_fit=3)
    search.max_trials = 1
    search.suggest("a")
    too_small(search, "a", 2)

    assert search.failure == (
        "no worker can be used: 3 pictures at once do not fit into the memory of a small GPU, 2 "
        "do: use a larger GPU, or begin anew with render.batch_size=2"
    )


def test_a_batch_size_is_settled_once_the_largest_batch_was_drawn(tmp_path):
    search = make_search(tmp_path, batch_size=8)  # 7 prompts, 8, and 10 in two batches.
    config = search.suggest("a")
    work_off(search, "a", config)

    assert len(config["batch"]) == 7
    assert search.settled_batch_size is None
    work(search)
    assert search.settled_batch_size == 8


def test_workers_that_differ_in_what_moves_digits_are_said_to(tmp_path):
    devices = iter(["A100", "A100", "H100"])

    def outcome(ratios, prompts):
        drawn_by = (("device", next(devices, "A100")), ("torch", "2.9"))
        return {"measured": measure(ratios, prompts), "drawn_by": drawn_by}

    search = make_search(tmp_path)
    assert search.mixed is None
    work(search, outcome=outcome)

    expected = "Its rewards were drawn with device A100 and H100, so last digits differ."
    assert search.mixed == expected
    assert _replayed(tmp_path).mixed == expected


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
    search = make_search(tmp_path, max_failures=0)
    search.suggest("a")
    search.on_trial_complete("a", None, error=True)

    assert "worker" in search.evaluations[0].failure


def test_the_batch_of_a_dead_worker_is_handed_out_again(tmp_path):
    search = make_search(tmp_path, max_failures=1)
    config = search.suggest("a")
    search.on_trial_complete("a", None, error=True)

    assert search.suggest("b") == config
    assert search.evaluations == []


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


def test_a_batch_that_always_fails_is_tried_as_often_as_asked(tmp_path):
    tries = Counter()

    def one_fails(ratios, prompts):
        if ratios.is_dense:  # If it failed, that would be the end.
            return {"measured": measure(ratios, prompts)}
        if PROMPTS["search"].prompts[0] in prompts:
            tries[ratios] += 1
            return {"failure": "lost", "transient": True}
        return {"measured": measure(ratios, prompts)}

    search = make_search(tmp_path, steps=1, max_failures=2)
    work(search, num_workers=2, outcome=one_fails, seed=3)

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


# --- many workers --------------------------------------------------------------------------------


@settings(max_examples=10)
@given(
    num_workers=st.integers(2, 12),
    seed=st.integers(0, 1000),
    batch_size=st.sampled_from([1, 3, 7]),
    racing=st.booleans(),
    flaky=st.booleans(),
    chains=st.sampled_from([1, 2]),
)
def test_any_number_of_workers_gives_the_same_course(
    tmp_path_factory, num_workers, seed, batch_size, racing, flaky, chains
):
    given = {
        "race": Race(alpha=0.3, stride=2) if racing else None,
        "annealing": {"chains": chains},
        "batch_size": batch_size,
    }
    one = make_search(tmp_path_factory.mktemp("one"), **given)
    work(one, outcome=failing_at_random(flaky))
    many = make_search(tmp_path_factory.mktemp("many"), **given)
    work(many, num_workers, failing_at_random(flaky), seed=seed)

    assert course(many) == course(one)
    assert many.winner.key == one.winner.key


def failing_at_random(flaky):
    """Some evaluations fail for good, and every third batch at its first try."""
    seen = set()

    def outcome(ratios, prompts):
        word = hash((ratios, prompts)) % 3
        if flaky and word == 0 and (ratios, prompts) not in seen:
            seen.add((ratios, prompts))
            return {"failure": "lost", "transient": True}
        if flaky and not ratios.is_dense and int(1e6 * sum(ratios.as_dict().values())) % 5 == 0:
            return {"failure": "NaN pictures", "transient": False}
        return {"measured": measure(ratios, prompts)}

    return outcome


def test_evaluations_that_the_chain_passed_by_are_stopped_and_keep_their_rewards(tmp_path):
    search = make_search(tmp_path, batch_size=1)
    work(search, num_workers=30)
    stopped = [e for e in search.evaluations if e.is_stopped]
    taken = {step.evaluation.key for step in search.steps}
    ledger = Ledger(tmp_path)

    assert stopped
    assert all(e.key not in taken and math.isnan(e.mean) for e in stopped)
    for evaluation in stopped:
        known = [ledger.get(evaluation.key, prompt) for prompt in evaluation.prompts.prompts]
        assert len(evaluation.rewards) <= sum(entry is not None for entry in known)


def test_a_stopped_evaluation_can_be_completed_later_from_its_rows(tmp_path):
    first = make_search(tmp_path, race=Race(alpha=0.3, stride=2))
    work(first)
    stopped = {e.key: len(e.rewards) for e in first.evaluations if e.is_stopped}
    again = make_search(tmp_path)
    work(again)
    completed = [e for e in again.evaluations if e.key in stopped and e.kind == "search"]

    assert completed
    assert all(e.num_rendered == 7 - stopped[e.key] for e in completed)
    whole = make_search(tmp_path / "whole")
    work(whole)
    assert course(again) == course(whole)


def test_one_evaluations_batches_come_before_speculation(tmp_path):
    search = make_search(tmp_path, batch_size=1)
    work(search, max_trials=7)  # The dense baseline.
    handed_out = [search.suggest(str(i))["ratios"] for i in range(9)]

    assert handed_out[:7] == [dict.fromkeys(("down", "mid", "up"), 0.3)] * 7
    assert handed_out[7] == handed_out[8] != handed_out[0]


def test_a_better_evaluation_off_the_path_is_reported_and_wins_only_if_allowed(tmp_path):
    def lucky(search):
        """Give the best reward to whatever the chain turns out to pass by."""
        work(search, num_workers=12, seed=2)
        return search

    search = lucky(make_search(tmp_path, annealing={"seed": 5, "min_step_size": 0.3}))
    passed = [
        e
        for e in search.evaluations
        if e.kind == "search"
        and e.is_complete
        and e.key not in {s.evaluation.key for s in search.steps}
    ]
    best = max(passed, key=lambda e: e.mean)

    assert passed
    assert search.best_off_path == (best if best.mean > search.candidates[0].mean else None)
    assert not {e.key for e in passed} & {e.key for e in search.candidates}
    allowing = lucky(
        make_search(
            tmp_path / "allowing",
            annealing={"seed": 5, "min_step_size": 0.3},
            rerank_off_path=True,
        )
    )
    assert {e.key for e in passed} <= {e.key for e in allowing.candidates}


# --- racing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("searcher", ["annealing", "random", "tpe"])
def test_racing_draws_less_and_only_complete_evaluations_win(tmp_path, searcher):
    full = make_search(tmp_path / "full", searcher, steps=30)
    work(full)
    raced = make_search(tmp_path / "raced", searcher, steps=30, race=Race(alpha=0.3, stride=2))
    work(raced)

    assert raced.num_drawn < full.num_drawn
    assert any(step.lost_race for step in raced.steps)
    assert all(e.is_complete for e in raced.candidates)
    assert raced.winner.mean == pytest.approx(
        statistics.fmean(reward_of(raced.winner.ratios, p) for p in PROMPTS["search"].prompts)
    )
    assert len(raced.steps) == 30


def test_one_worker_that_races_draws_nothing_but_the_chains_own_steps(tmp_path):
    search = make_search(tmp_path, steps=30, race=Race(alpha=0.3, stride=2))
    work(search)
    taken = {step.evaluation.key for step in search.steps}

    assert {e.key for e in search.evaluations if e.kind == "search"} == taken


def test_a_raced_search_replays_to_the_same(tmp_path):
    first = make_search(tmp_path, race=Race(alpha=0.3, stride=2))
    work(first)
    again = make_search(tmp_path, race=Race(alpha=0.3, stride=2))

    assert again.replay()
    assert course(again) == course(first)
    assert again.num_drawn == 0


# --- budgets -----------------------------------------------------------------------------------

LAST = 3 * 8 + 2 * 10  # Pictures of re-ranking and validation.


@pytest.mark.parametrize("searcher", ["annealing", "random"])
@pytest.mark.parametrize("num_workers", [1, 6])
@pytest.mark.parametrize(
    "budget",
    [{"pictures": 100}, {"evaluations": 6}, {"gpu_hours": 0.03}, {"wall_hours": 0.03}],
    ids=lambda budget: next(iter(budget)),
)
def test_a_budget_ends_the_search_cleanly_and_a_larger_one_extends_it(
    tmp_path, searcher, num_workers, budget
):
    if "wall_hours" in budget:
        budget = {"wall_hours": budget["wall_hours"] / num_workers}

    def run(budget, clock):
        search = make_search(
            tmp_path,
            searcher,
            budget=budget,
            clock=clock,
            earlier_wall_s=run.wall_s,
            batch_size=7,
        )
        search.max_trials = num_workers
        if not search.replay():
            work(search, num_workers, seed=1, clock=clock)
        run.wall_s = search.wall_s
        return search

    run.wall_s = 0.0
    short = run(budget, Clock())
    again = run(budget, Clock())
    longer = run({name: 2 * value for name, value in budget.items()}, Clock())
    whole = make_search(tmp_path.with_name(tmp_path.name + "whole"), searcher, batch_size=7)
    work(whole)

    ((name, limit),) = budget.items()
    assert short.winner is not None
    assert 0 < len(short.steps) < 20
    assert short.ended_by.startswith(f"budget.{name}={limit:g} (going on would come to ")
    assert getattr(short.use, name) <= limit * 1.001
    # With the next evaluation it would have been too much.
    assert getattr(short.use, name) > limit * 0.6
    assert again.num_drawn == 0
    assert again.winner.key == short.winner.key
    assert len(short.steps) < len(longer.steps)
    if searcher == "annealing":
        taken = [step.evaluation.key for step in whole.steps]
        assert [s.evaluation.key for s in longer.steps] == taken[: len(longer.steps)]


class Clock:
    """Seconds that pass as pictures are drawn."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_the_use_of_a_search_counts_every_picture_once_over_its_sessions(tmp_path):
    work(make_search(tmp_path, batch_size=1), num_workers=5, max_trials=60)
    search = make_search(tmp_path, batch_size=1)
    work(search, num_workers=3)
    rows = Ledger(tmp_path).table().num_rows

    assert search.use.pictures == rows
    assert search.use.gpu_hours == pytest.approx(rows / 3600)
    assert search.use.evaluations >= len({step.evaluation.key for step in search.steps})


def test_a_budget_too_small_for_one_evaluation_says_so(tmp_path):
    search = make_search(tmp_path, budget={"pictures": LAST})
    work(search)

    assert search.failure == (
        "no evaluation fits into budget.pictures=44 (going on would come to 58, re-ranking and "
        "validation included): raise it"
    )


def test_the_jumps_of_restarts_do_not_count_for_the_budget(tmp_path):
    optimum = {"down": 0.6, "mid": 0.3, "up": 0.4}
    annealing = {**REFERENCE, "seeds": [optimum], "patience": 3, "max_restarts": 9}
    search = make_search(tmp_path, steps=12, annealing=annealing)
    work(search)
    num_jumps = [step.event for step in search.steps].count("jump")

    assert num_jumps > 0
    assert (search.num_steps, len(search.steps)) == (12, 12 + num_jumps)
    assert search.progress[0] == search.progress[1]


def test_more_steps_extend_a_finished_search(tmp_path):
    work(make_search(tmp_path, steps=10))
    longer = make_search(tmp_path, steps=20)
    work(longer)
    whole = make_search(tmp_path / "whole", steps=20)
    work(whole)

    assert course(longer) == course(whole)
    assert longer.num_drawn < whole.num_drawn


# --- warm start ---------------------------------------------------------------------------------


@pytest.mark.parametrize("searcher", ["annealing", "tpe", "cmaes", "qmc", "random", "grid"])
def test_a_search_begins_with_what_others_of_its_cell_measured(tmp_path, searcher):
    first = make_search(tmp_path, "random", steps=30, run="another")
    work(first)
    known = list(Ledger(tmp_path).candidates.values())
    warm = make_search(tmp_path, searcher, steps=9, warm_start=known)
    best = first.candidates[0]

    assert len(warm.warm_start) == 30  # Neither the dense model nor what is not complete.
    assert warm.candidates[0].key == best.key
    assert warm.use.evaluations == 0
    work(warm)
    assert warm.candidates[0].mean >= best.mean
    assert len(warm.steps) == (9 if searcher != "grid" else 8)


@pytest.mark.parametrize("searcher", ["annealing", "random"])
def test_failures_of_other_searches_end_no_search(tmp_path, searcher):
    other = make_search(tmp_path, searcher, steps=3, run="other")
    work(other, outcome=failing(lambda ratios: not ratios.is_dense))
    assert other.failure is not None
    known = list(Ledger(tmp_path).candidates.values())
    warm = make_search(tmp_path, searcher, steps=9, warm_start=known)
    work(warm)

    assert (warm.failure, len(warm.steps)) == (None, 9)
    # It comes by the same ones if it is not told of them.
    cold = make_search(tmp_path, searcher, steps=9, run="cold")
    work(cold)
    assert (cold.failure, len(cold.steps)) == (None, 9)


def test_a_warm_start_with_failures_gives_up_on_three_of_its_own(tmp_path):
    work(make_search(tmp_path, steps=3, run="other"))
    known = list(Ledger(tmp_path).candidates.values())
    warm = make_search(tmp_path, steps=9, warm_start=known)
    work(warm, outcome=failing(lambda ratios: not ratios.is_dense))

    assert "the first 3 evaluations failed: NaN pictures" in warm.failure
    # Looked at again from the ledger alone, it has failed too.
    again = make_search(tmp_path, steps=9, warm_start=known)
    assert again.replay()
    assert again.failure == warm.failure


def test_a_warm_start_takes_only_what_fits_the_space(tmp_path):
    work(make_search(tmp_path, "random", steps=5))
    known = [
        Candidate(BlockRatios(0.9, 0.3, 0.3), 1.5),
        Candidate(BlockRatios(0.3, 0.3, 0.3), 1.0),
    ]

    assert make_search(tmp_path, warm_start=known).warm_start == []


@pytest.mark.parametrize("searcher", ["tpe", "cmaes", "random"])
@pytest.mark.parametrize("num_workers", [1, 5])
def test_a_baseline_replays_what_it_did_with_several_workers(tmp_path, searcher, num_workers):
    first = make_search(tmp_path, searcher, steps=25)
    work(first, num_workers=5, seed=3)
    again = make_search(tmp_path, searcher, steps=25)
    assert again.replay()
    other = make_search(tmp_path / "other", searcher, steps=25)
    work(other, num_workers, seed=4)

    assert again.num_drawn == 0
    for search in (again, other):
        assert {e.key for e in search.evaluations} == {e.key for e in first.evaluations}
        assert search.winner.key == first.winner.key


def test_until_it_is_decided_how_far_ahead_a_baseline_is_asked_for_nothing(tmp_path):
    work(make_search(tmp_path, "tpe"))
    search = make_search(tmp_path, "tpe", ahead=None)

    assert not search.replay()
    assert [e.kind for e in search.evaluations] == ["dense"]
    search.ahead = 4
    assert search.replay()
