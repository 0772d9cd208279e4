"""EvaluationSearch: the course of a search, as a ray.tune searcher of prompt batches."""

from __future__ import annotations

import logging
import math
import time
from bisect import bisect_right, insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher

from crdiff_core.prompts import PromptSet
from crdiff_core.ratios import BlockRatios
from search.batching import Batch, batch_length
from search.budget import Budget, Use
from search.comparison import telling
from search.evaluations import SHOWN, Evaluation, Evaluations, Kind, OpenEvaluation
from search.ledger import DRAWN_BY, Ledger, Recipe
from search.logs import LOG_FILE
from search.pictures import Pictures
from search.racing import Expectation, Race
from search.searchers import AnnealingSearch
from search.space import Candidate, Space
from search.storage import StorageError

METRIC = "reward"
# Failed evaluations of its own after which a search that has seen no success gives up.
_HOPELESS = 3
_DIED = f"its worker died or could not start: {LOG_FILE} beside the results has Ray's reason"
_RETRY = ": mend that and run again with trial.retry_failed=true"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """A step of the search: the same for any number of workers.

    chain, number: of the annealing chain, from 0, and the step in it, from 1.
    reward:        that the searcher took; an estimate if the race was lost; None if it failed.
    lost_race:     so that it cannot be the best, even where all its prompts were drawn.
    event:         seed, accept, reject, jump or fail; temperature: after it. Annealing's only.
    """

    chain: int
    number: int
    evaluation: Evaluation
    reward: float | None
    lost_race: bool
    event: str | None = None
    temperature: float | None = None


class EvaluationSearch(Searcher):  # type: ignore[misc]
    """Evaluates what a searcher suggests, one trial for each prompt batch.

    The dense baseline, the search, the re-ranking of the best few on fresh prompts and the
    validation of the winner are evaluations of one Tuner run, on the same loaded replicas. What
    the ledger knows is not drawn again, so running a search again replays it. The wrapped
    searcher sees only its own dimensions and rewards.

    Batches are handed out in the order of how likely they are to be needed: those of the step
    that annealing takes next, then those of steps that it may take after it. An evaluation that
    has lost its race, or that the chain has passed by, gets no more of them.

    batch_size:      prompts drawn at once, at most; the ledger's keys depend on it.
    num_fit:         so many at once are known to fit into a worker's memory.
    shrinks:         whether the first worker that a batch does not fit lowers the batch size: it
                     ends the search, with what fits in `smaller_batch`. Else that is a failure.
                     After a batch has fitted one worker, workers that it does not fit are left
                     idle.
    rerank_top:      how many of the best are compared again on fresh prompts.
    rerank_off_path: whether evaluations that annealing passed by are among them. Which there are
                     depends on the number of workers, and so would the winner.
    max_failures:    how often one prompt batch is tried again before its evaluation fails.
    ahead:           suggestions that others than annealing are asked for before the first one's
                     result is told, and so on in turn: the same whenever the search is replayed.
                     None: not decided, so that they are asked for none yet.
    warm_start:      candidates that other searches evaluated, for the searcher to know.
    pictures:        where they are kept; None: nowhere, and then none are drawn for a report.
    num_shown:       validation prompts that a report shows: they are drawn once more by the
                     pruned model alone, and by the dense one at the size native.
    native:          HEIGHTxWIDTH at which a user would draw, to resize the picture; None: none
                     but the resolution itself.
    gpus_per_trial:  by which hours of drawing are GPU hours.
    earlier_wall_s:  seconds that earlier sessions of this search took.
    clock:           of seconds.
    """

    def __init__(
        self,
        searcher: Searcher,
        *,
        space: Space,
        prompt_sets: Mapping[str, PromptSet],
        recipe: Recipe,
        ledger: Ledger,
        budget: Budget,
        batch_size: int,
        num_fit: int = 0,
        shrinks: bool = False,
        race: Race | None = None,
        rerank_top: int = 3,
        rerank_off_path: bool = False,
        max_failures: int = 2,
        ahead: int | None = 1,
        warm_start: Sequence[Candidate] = (),
        pictures: Pictures | None = None,
        num_shown: int = 0,
        native: str | None = None,
        gpus_per_trial: float = 1.0,
        earlier_wall_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self.failure: str | None = None
        self.ended_by: str | None = None
        """The limit that ended the search, if it was not the number of steps."""
        self.winner: Evaluation | None = None
        self.batch_size = batch_size
        self.smaller_batch: int | None = None
        """The batch size with which the search has to begin anew: its own fits no worker yet."""
        self.max_trials: float = math.inf
        """How many trials may run at once."""
        self.on_evaluation: Callable[[Evaluation], None] = lambda _: None
        self._searcher = searcher
        self._annealing = searcher if isinstance(searcher, AnnealingSearch) else None
        self.space = space
        self._sizes = {name: len(prompts) for name, prompts in prompt_sets.items()}
        self._ledger = ledger
        self._work = Evaluations(ledger, recipe, prompt_sets, batch_size, max_failures, pictures)
        self._num_fit = num_fit
        # What else moves the last digits of its rewards, by name.
        self._drawn_by: dict[str, set[str]] = {name: set() for name in DRAWN_BY}
        self._shrinks = shrinks
        self._keeps_pictures = pictures is not None
        self._num_shown = num_shown if pictures is not None else 0
        self._native = native
        self._is_shown = False
        self._budget = budget
        self._race = race
        self._rerank_top = rerank_top
        self._rerank_off_path = rerank_off_path
        self._gpus_per_trial = gpus_per_trial
        self._earlier_wall_s = earlier_wall_s
        self._clock = clock
        self._num_drawn_before = ledger.spent.num_pictures
        self._began_s: float | None = None
        self._latest_s = 0.0
        self.ahead = ahead
        # What others than annealing are still to be told, by the number of the suggestion.
        self._results: dict[str, Evaluation] = {}
        self._num_told = 0
        self._trials: dict[str, tuple[OpenEvaluation, Batch]] = {}
        # Trials of workers that are not used.
        self._unfit: set[str] = set()
        self._reasons: dict[str, str] = {}
        # Of every search evaluation, how many prompts were drawn; sorted.
        self._drawn: list[int] = []
        self._num_suggested = 0
        self._exhausted = False
        self._is_stopped = False
        self._dense = Candidate(BlockRatios(), recipe.poa_weight)
        self._begin("dense", self._dense, "search")
        self._warm: list[Evaluation] = []
        for candidate in warm_start:
            self._tell_known(candidate)

    # --- what Ray asks -----------------------------------------------------------------------

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the next prompt batch to draw; None if there is none just now."""
        if self._began_s is None:
            self._began_s = self._latest_s = self._clock()
        while not self.is_ending:
            if len(self._trials) + len(self._unfit) >= self.max_trials:
                return None
            evaluation = self._most_needed()
            if evaluation is not None:
                batch = evaluation.todo.popleft()
                self._trials[trial_id] = (evaluation, batch)
                return evaluation.trial(batch, self._keeps_pictures)
            if not self._begin_next():
                return None
        return str(Searcher.FINISHED)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Write a batch's rewards to the ledger, then tell the searcher what they complete.

        A batch that failed is handed out again, up to max_failures times. A ledger that cannot be
        written ends the search: what is not recorded would be paid for twice.
        """
        self._unfit.discard(trial_id)
        if trial_id not in self._trials:
            return
        self._latest_s = self._clock()
        evaluation, batch = self._trials.pop(trial_id)
        if result is not None and "measured" in result:
            self._num_fit = max(self._num_fit, evaluation.length)
        if error:
            result = {"failure": self._reasons.pop(trial_id, _DIED), "transient": True}
        try:
            self._work.settle(evaluation, batch, result)
        except StorageError as broken:
            self.fail(str(broken))
        else:
            self._tell(evaluation)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Take the report of a worker whose memory a batch does not fit: `num_fit` pictures do.

        Its batch goes to others. It keeps its trial, and so its GPU, and is given no other.
        """
        if "num_fit" not in result or trial_id not in self._trials:
            return
        evaluation, batch = self._trials.pop(trial_id)
        self._work.settle(evaluation, batch, None)
        num_fit, device = result["num_fit"], result["device"]
        reason = f"{evaluation.length} pictures at once do not fit into the memory of {device}"
        reason += f", {num_fit} do" if num_fit else ", nor does a single one"
        if num_fit == 0 or evaluation.length <= self._num_fit:
            self._unfit.add(trial_id)
            log.warning("a worker is not used: %s", reason)
            if len(self._unfit) >= self.max_trials:
                remedy = "a half-precision model.dtype or a smaller res"
                if num_fit:
                    remedy = f"or begin anew with render.batch_size={num_fit}"
                self.fail(f"no worker can be used: {reason}: use a larger GPU, {remedy}")
        elif self._shrinks:
            self.smaller_batch = self.smaller_batch or num_fit
            log.warning("render.batch_size is %d from now on: %s", self.smaller_batch, reason)
        else:
            self.fail(
                f"render.batch_size={self.batch_size}: {reason}: set it to {num_fit}, or to auto"
            )

    def give_up(self, trial_id: str, reason: str) -> None:
        """Note why a trial is about to end with an error."""
        self._reasons[trial_id] = reason

    def fail(self, reason: str) -> None:
        """End the search with what it has; from any thread. The first reason counts."""
        self.failure = self.failure or reason

    def stop(self) -> None:
        """Hand out nothing more; what is being drawn is still taken."""
        self._is_stopped = True

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        """Return True: batches are handed out as workers ask for them, without a limiter."""
        return True

    def save(self, checkpoint_path: str) -> None:
        """Write nothing of value: a search resumes from the ledger alone."""
        Path(checkpoint_path).write_text("resume from the ledger\n", encoding="utf-8")

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: a search resumes from the ledger alone."""

    def __getstate__(self) -> dict[str, Any]:
        # Ray pickles searchers into its own checkpoints, which we never read.
        return {}

    # --- what others read ----------------------------------------------------------------------

    @property
    def evaluations(self) -> list[Evaluation]:
        """What is complete, failed or stopped, in that order."""
        return self._work.done

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to evaluate."""
        is_done = self._is_shown and not any(e.kind in SHOWN for e in self._work.open)
        return is_done or self.failure is not None or self.smaller_batch is not None

    @property
    def is_ending(self) -> bool:
        """Whether nothing more is handed out."""
        return self.finished or self._is_stopped

    @property
    def settled_batch_size(self) -> int | None:
        """The batch size, once a worker has drawn as many pictures at once; None: not yet."""
        largest = max(batch_length(size, self.batch_size) for size in self._sizes.values())
        return self.batch_size if self._num_fit >= largest else None

    @property
    def mixed(self) -> str | None:
        """Say how the workers differ that drew its rewards, in a sentence; None: in nothing."""
        differences = [
            f"{name} {' and '.join(sorted(values))}"
            for name, values in self._drawn_by.items()
            if len(values) > 1
        ]
        if not differences:
            return None
        return f"Its rewards were drawn with {', '.join(differences)}, so last digits differ."

    @property
    def steps(self) -> list[Step]:
        """The steps of the search so far, in their order; annealing's chains take turns."""
        if self._annealing is None:
            return [
                Step(0, number, e, e.estimate if e.is_stopped else _number(e.mean), e.is_stopped)
                for number, e in enumerate(self._work.of("search")[len(self._warm) :], 1)
            ]
        found = []
        for commit in sorted(self._annealing.commits, key=lambda c: (c.state.step, c.chain)):
            point = dict(zip(self.space.bounds, commit.seen.point, strict=True))
            evaluation = self._work.last.get(self._work.key(self.space.candidate(point)))
            if evaluation is None:  # It has just lost its race, and is about to be closed.
                break
            found.append(
                Step(
                    chain=commit.chain,
                    number=commit.state.step,
                    evaluation=evaluation,
                    reward=commit.seen.reward,
                    lost_race=commit.seen.stopped,
                    event=commit.state.event,
                    temperature=commit.state.temperature,
                )
            )
        return found

    @property
    def num_steps(self) -> int:
        """How many steps count for the budget: all but the jumps of annealing's restarts."""
        return sum(step.event != "jump" for step in self.steps)

    @property
    def candidates(self) -> list[Evaluation]:
        """The evaluations that may win, best first, each candidate once."""
        found = {step.evaluation.key: step.evaluation for step in self.steps if not step.lost_race}
        found |= {evaluation.key: evaluation for evaluation in self._warm}
        if self._rerank_off_path:
            found |= {e.key: e for e in self.known_evaluations}
        return sorted((e for e in found.values() if e.is_complete), key=lambda e: -e.mean)

    @property
    def best_off_path(self) -> Evaluation | None:
        """The best evaluation that annealing passed by, if it is better than the best it took."""
        taken = {step.evaluation.key for step in self.steps} | {e.key for e in self._warm}
        passed = [e for e in self.known_evaluations if e.is_complete and e.key not in taken]
        best = max(passed, key=lambda e: e.mean, default=None)
        candidates = self.candidates
        if best is None or (candidates and candidates[0].mean >= best.mean):
            return None
        return best

    @property
    def known_evaluations(self) -> list[Evaluation]:
        """All of the search's evaluations, in earlier sessions too, the last of each candidate."""
        taken = {evaluation.candidate for evaluation in self._work.last.values()}
        others = [
            self._work.known(candidate)
            for candidate in self._spent_on()
            if candidate not in taken and not candidate.ratios.is_dense
        ]
        return [*self._work.last.values(), *(e for e in others if e.rewards)]

    def _spent_on(self) -> list[Candidate]:
        """Return the candidates that this search has paid for, each once, in their order."""
        keys, candidates = self._ledger.spent.keys, self._ledger.candidates
        return list(dict.fromkeys(c for key, c in candidates.items() if key in keys))

    @property
    def use(self) -> Use:
        """What the search has taken so far, in all its sessions."""
        return self._use(0)

    @property
    def wall_s(self) -> float:
        """Seconds from a session's first trial to its latest one's end, over all sessions."""
        session = 0.0 if self._began_s is None else self._latest_s - self._began_s
        return self._earlier_wall_s + session

    @property
    def warm_start(self) -> list[Candidate]:
        """What other searches had evaluated when this one began."""
        return [evaluation.candidate for evaluation in self._warm]

    @property
    def progress(self) -> tuple[int, int]:
        """Steps and other evaluations that are done, and how many there will be."""
        num_steps = self.num_steps
        others = len(self.evaluations) - len(self._work.of("search"))
        validation = self._work.of("validation", "dense validation")
        num_shows = 0 if any(e.failure for e in validation) else self._num_shows
        searched = num_steps + self._num_steps_coming(num_steps)
        return num_steps + others, 1 + searched + self._num_reranked + 2 + num_shows

    @property
    def num_running(self) -> int:
        """How many trials are under way."""
        return len(self._trials)

    @property
    def num_coming(self) -> int:
        """How many pictures are still to be drawn, if the other steps take what these took."""
        if self.finished:
            return 0
        searched, num_steps = self._work.of("search")[len(self._warm) :], self.num_steps
        each = float(self._sizes["search"])
        if num_steps:
            each = sum(len(evaluation.rewards) for evaluation in searched) / num_steps
        others = [e for e in self._work.open if e.kind != "search"]
        coming = round(self._num_steps_coming(num_steps) * each)
        coming += sum(len(evaluation.missing) for evaluation in others)
        if not self._is_shown:
            coming += self.num_for_report
        if self.winner is None:
            coming += 2 * self._sizes["validation"]
            if not self._work.of("rerank") and not any(e.kind == "rerank" for e in others):
                coming += self._num_reranked * self._sizes["rerank"]
        return coming

    def _num_steps_coming(self, num_steps: int) -> int:
        """Return how many steps follow so many, as far as is known."""
        if self._exhausted:
            return sum(evaluation.kind == "search" for evaluation in self._work.open)
        return max(0, self._budget.steps - num_steps)

    @property
    def _num_reranked(self) -> int:
        """How many candidates are compared again, as far as is known; one alone is not."""
        count = min(self._rerank_top, self._budget.steps + len(self._warm))
        if self._exhausted and not any(e.kind == "search" for e in self._work.open):
            count = len(self.candidates[: self._rerank_top])
        return count if count > 1 else 0

    @property
    def num_drawn(self) -> int:
        """How many pictures this session has drawn."""
        return self._ledger.spent.num_pictures - self._num_drawn_before

    @property
    def num_known(self) -> int:
        """How many pictures of the evaluations so far have their reward."""
        partly = sum(len(e.prompts) - len(e.missing) for e in self._work.open)
        return sum(len(e.prompts) for e in self.evaluations) + partly

    @property
    def num_for_report(self) -> int:
        """How many pictures are drawn for the report alone."""
        return self._num_shows * min(self._num_shown, self._sizes["validation"])

    def replay(self) -> bool:
        """Go as far as the ledger reaches; return whether that is the end."""
        while not self.finished and self._most_needed() is None:
            if not self._begin_next():
                break
        return self.finished

    def of(self, kind: Kind) -> Evaluation | None:
        """Return the first complete evaluation of a kind."""
        return next(iter(self._work.of(kind)), None)

    # --- the course of a search --------------------------------------------------------------

    def _most_needed(self) -> OpenEvaluation | None:
        """Return the evaluation whose next batch is the likeliest to be needed."""
        while True:
            waiting = [evaluation for evaluation in self._work.open if evaluation.todo]
            best = max(waiting, key=self._need, default=None)
            if self._annealing is None or self._exhausted or self._dense_is_open:
                return best
            least = 0.0 if best is None else self._need(best)
            if self._annealing.next_likelihood <= least or not self._begin_suggested():
                return best

    @property
    def _dense_is_open(self) -> bool:
        # If it cannot be evaluated there is no search.
        return any(
            evaluation.kind == "dense" and evaluation.todo for evaluation in self._work.open
        )

    def _need(self, evaluation: OpenEvaluation) -> float:
        """Return how likely an evaluation's next batch is to be needed."""
        if evaluation.kind != "search" or self._annealing is None:
            return 1.0
        assert evaluation.searcher_id is not None
        likelihood = self._annealing.likelihood(evaluation.searcher_id)
        if self._race is None:
            return likelihood
        # Of the evaluations that came as far, the share that was still in the race after what is
        # being drawn: a batch is needed for certain if it is the only one.
        num_known = len(evaluation.prompts) - len(evaluation.missing)
        num_handed_out = len(evaluation.prompts) - evaluation.num_waiting
        return (
            likelihood * (self._num_beyond(num_handed_out) + 1) / (self._num_beyond(num_known) + 1)
        )

    def _num_beyond(self, num_prompts: int) -> int:
        """Return how many of the search's evaluations so far went beyond so many prompts."""
        return len(self._drawn) - bisect_right(self._drawn, num_prompts)

    def _begin_next(self) -> bool:
        """Begin the next evaluation, if what it depends on is known."""
        if self._begin_suggested():
            return True
        searching = any(evaluation.kind in {"search", "dense"} for evaluation in self._work.open)
        return self._exhausted and not searching and self.winner is None and self._rerank()

    def _begin_suggested(self) -> bool:
        if self._exhausted:
            return False
        if self._annealing is None and self._num_suggested >= self._budget.steps:
            self._exhausted = True
            return False
        if self._annealing is None and not self._tell_in_turn():
            return False
        searcher_id = f"evaluation{self._num_suggested}"
        suggested = self._searcher.suggest(searcher_id)
        if suggested is None:
            return False
        if suggested == Searcher.FINISHED:
            self._exhausted = True
            return False
        candidate = self.space.candidate(suggested)
        if self._work.missing(candidate) and self._is_over_budget(candidate):
            self._exhausted = True
            if self._annealing is not None:
                self._annealing.drop(searcher_id)
            return False
        self._num_suggested += 1
        self._begin("search", candidate, "search", searcher_id)
        return True

    def _tell_in_turn(self) -> bool:
        """Tell the searcher the results that its next suggestion may depend on, and no others."""
        if self.ahead is None:
            return False
        while self._num_told <= self._num_suggested - self.ahead:
            result = self._results.pop(f"evaluation{self._num_told}", None)
            if result is None:
                return False
            self._tell_result(f"evaluation{self._num_told}", result)
            self._num_told += 1
        return True

    def _is_over_budget(self, candidate: Candidate) -> bool:
        """Note the limit that evaluating this candidate, and the end after it, would exceed."""
        self.ended_by = self._budget.exceeded(
            self._use(len(self._work.missing(candidate)), candidate)
        )
        return self.ended_by is not None

    def _use(self, num_next: int, candidate: Candidate | None = None) -> Use:
        """Return what was taken, or what will be if a candidate is evaluated too."""
        spent = self._ledger.spent
        num_coming = 0
        evaluated = {c for c in self._spent_on() if self.space.suggestion(c) is not None}
        evaluated |= {e.candidate for e in self._work.open}
        evaluated |= {e.candidate for e in self._work.of("search")[len(self._warm) :]}
        if candidate is not None:
            evaluated.add(candidate)
            reranked = self._rerank_top if self._rerank_top > 1 else 0
            begun = sum(len(evaluation.missing) for evaluation in self._work.open)
            # Batches of evaluations that were stopped meanwhile are drawn to their end.
            begun += sum(
                len(batch) for e, batch in self._trials.values() if e not in self._work.open
            )
            last = reranked * self._sizes["rerank"] + 2 * self._sizes["validation"]
            last += self.num_for_report
            num_coming = num_next + begun + last
        each_s = spent.seconds / spent.num_pictures if spent.num_pictures else 0.0
        coming_s = num_coming * each_s
        num_workers = 1.0 if math.isinf(self.max_trials) else self.max_trials
        return Use(
            evaluations=sum(not each.ratios.is_dense for each in evaluated),
            pictures=spent.num_pictures + num_coming,
            gpu_hours=(spent.seconds + coming_s) * self._gpus_per_trial / 3600,
            wall_hours=(self.wall_s + coming_s / num_workers) / 3600,
        )

    def _rerank(self) -> bool:
        """Compare the best few on fresh prompts, then validate the winner on others again."""
        candidates = self.candidates[: self._rerank_top]
        if not candidates:
            searched = self._work.of("search")
            self.failure = (
                f"every evaluation failed; the last: {searched[-1].failure}{_RETRY}"
                if searched
                else f"no evaluation fits into {self.ended_by}: raise it"
            )
            return True
        reranking = any(evaluation.kind == "rerank" for evaluation in self._work.open)
        if reranking:
            return False
        if len(candidates) > 1 and not self._work.of("rerank"):
            for candidate in candidates:
                self._begin("rerank", candidate.candidate, "rerank")
            return True
        reranked = [e for e in self._work.of("rerank") if e.failure is None]
        best = max(reranked, key=lambda e: e.mean, default=candidates[0])
        self.winner = next(e for e in candidates if e.candidate == best.candidate)
        self._begin("dense validation", self._dense, "validation")
        self._begin("validation", self.winner.candidate, "validation")
        return True

    @property
    def _num_shows(self) -> int:
        """How many evaluations are made for their pictures alone."""
        if not self._num_shown:
            return 0
        winner = self.winner.candidate if self.winner else self._dense
        return (winner.poa_weight != 1) + (self._native is not None)

    def _show(self) -> None:
        """Draw, of telling validation prompts, what else a user would compare with."""
        self._is_shown = True
        winner, dense = self.of("validation"), self.of("dense validation")
        assert winner is not None
        assert dense is not None
        if winner.failure or dense.failure or not self._num_shown:
            return
        gains = [a - b for a, b in zip(winner.rewards, dense.rewards, strict=True)]
        shown = telling(gains, self._num_shown)
        numbers = sorted([*shown.first, *shown.gains, *shown.losses])
        if winner.candidate.poa_weight != 1:
            alone = replace(winner.candidate, poa_weight=1.0)
            self._tell(self._work.begin("pruned alone", alone, "validation", numbers=numbers))
        if self._native is not None:
            native = replace(self._dense, drawn_at=self._native)
            self._tell(self._work.begin("resized", native, "validation", numbers=numbers))

    def _tell_known(self, candidate: Candidate) -> None:
        """Give the searcher a result of another search, which the ledger holds."""
        suggestion = self.space.suggestion(candidate)
        if suggestion is None or self._work.missing(candidate):
            return
        self._begin("search", candidate, "search")
        evaluation = self.evaluations[-1]
        self._warm.append(evaluation)
        races = self._annealing is not None and self._race is not None
        self._searcher.add_evaluated_point(
            suggestion,
            evaluation.mean,
            error=evaluation.failure is not None,
            intermediate_values=evaluation.rewards if races else None,
        )

    # --- what the searcher is told -----------------------------------------------------------

    def _begin(
        self, kind: Kind, candidate: Candidate, prompts: str, searcher_id: str | None = None
    ) -> None:
        self._tell(self._work.begin(kind, candidate, prompts, searcher_id))

    def _tell(self, evaluation: OpenEvaluation) -> None:
        """Tell the searcher what is known of an evaluation now, and close what is done with."""
        if evaluation not in self._work.open:
            return
        if evaluation.failure is not None or not evaluation.missing:
            self._close(evaluation)
        elif self._race is not None and evaluation.searcher_id is not None:
            self._run_race(evaluation, evaluation.searcher_id, self._race)
        if self._annealing is not None:
            for each in [e for e in self._work.open if e.kind == "search"]:
                assert each.searcher_id is not None
                if self._annealing.likelihood(each.searcher_id) == 0:
                    self._close(each, is_stopped=True)

    def _run_race(self, evaluation: OpenEvaluation, searcher_id: str, race: Race) -> None:
        """Look whether an unfinished evaluation can still reach what it has to."""
        rewards = self._work.rewards(evaluation)[: evaluation.num_first]
        if self._annealing is not None:
            # It knows what each proposal has to gain over which point.
            self._annealing.on_trial_result(searcher_id, {"rewards": rewards})
            return
        complete = [e for e in self._work.of("search") if e.is_complete]
        best = max(complete, key=lambda e: e.mean, default=None)
        if best is None:
            return
        highest = max(max(evaluation.rewards) for evaluation in complete)
        expectation = replace(Expectation.of_incumbent(best.rewards), highest=highest)
        lost = race.lost(rewards, expectation, best.mean)
        if lost is not None:
            self._close(evaluation, is_stopped=True, estimate=lost.mean)

    def _close(
        self, evaluation: OpenEvaluation, is_stopped: bool = False, estimate: float | None = None
    ) -> None:
        closed = self._work.close(evaluation, is_stopped, estimate)
        for name, value in closed.drawn_by:
            self._drawn_by[name].add(value)
        if closed.kind == "search":
            insort(self._drawn, len(closed.rewards))
        if evaluation.searcher_id is not None:
            self._report(evaluation.searcher_id, closed)
        self._stop_if_hopeless(closed)
        self.on_evaluation(closed)
        if len(self._work.of("validation", "dense validation")) == 2 and not self._is_shown:
            self._show()

    def _report(self, searcher_id: str, closed: Evaluation) -> None:
        if self._annealing is None:
            self._results[searcher_id] = closed
        else:
            self._tell_result(searcher_id, closed)

    def _tell_result(self, searcher_id: str, closed: Evaluation) -> None:
        if closed.is_stopped and self._annealing is not None:
            self._annealing.drop(searcher_id)
        elif closed.is_stopped:
            self._searcher.on_trial_complete(searcher_id, {METRIC: closed.estimate})
        elif closed.failure is not None:
            self._searcher.on_trial_complete(searcher_id, None, error=True)
        else:
            result: dict[str, Any] = {METRIC: closed.mean}
            if self._race is not None and self._annealing is not None:
                result["rewards"] = list(closed.rewards)
            self._searcher.on_trial_complete(searcher_id, result)

    def _stop_if_hopeless(self, last: Evaluation) -> None:
        if last.kind == "dense" and last.failure is not None:
            self.failure = f"the dense model cannot be evaluated: {last.failure}{_RETRY}"
        if last.kind != "search" or last.failure is None:
            return
        # What failed in other searches says nothing of this one, in a warm start or later.
        own = self._work.of("search")[len(self._warm) :]
        failed = [e for e in own if e.failure is not None and e.key in self._ledger.spent.keys]
        if len(failed) == _HOPELESS and not any(e.rewards for e in own):
            self.failure = f"the first {_HOPELESS} evaluations failed: {last.failure}{_RETRY}"


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
