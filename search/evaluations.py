"""EvaluationSearch: any searcher's ratios, split into prompt batches, answered by the ledger."""

from __future__ import annotations

import math
import statistics
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ray.tune.search import Searcher

from crdiff_core.prompts import PromptSet
from crdiff_core.ratios import GROUPS, BlockRatios, Group
from search.annealing import DECIMALS
from search.ledger import Ledger, LedgerError, Recipe

if TYPE_CHECKING:
    from crdiff_core.evaluation import Measurement

# The numbers of the prompts that one trial draws.
Batch = tuple[int, ...]
Kind = Literal["dense", "search", "rerank", "validation", "dense validation"]

METRIC = "reward"
# Failed evaluations after which a search that has seen no success gives up.
_HOPELESS = 3
_RETRY = ": mend that and run again with trial.retry_failed=true"


@dataclass(frozen=True)
class Evaluation:
    """A complete evaluation: one ratio triple on one prompt set.

    index:        order of completion in this run, from 0.
    key:          the ledger's.
    rewards:      one for each prompt, in their order; empty if it failed.
    failure:      why it failed, in one line.
    seconds:      GPU or CPU time of its pictures, whenever they were drawn.
    num_rendered: pictures drawn for it in this run; 0 if the ledger knew it all.
    """

    index: int
    kind: Kind
    key: str
    ratios: BlockRatios
    prompts: PromptSet
    rewards: tuple[float, ...]
    failure: str | None
    sparsity: Mapping[Group, float]
    seconds: float
    num_rendered: int

    @property
    def mean(self) -> float:
        """Mean reward; NaN if it failed."""
        return statistics.fmean(self.rewards) if self.rewards else math.nan

    @property
    def standard_error(self) -> float:
        """Standard error of the mean over prompts; NaN for fewer than two."""
        if len(self.rewards) < 2:
            return math.nan
        return statistics.stdev(self.rewards) / math.sqrt(len(self.rewards))


@dataclass
class _Open:
    """An evaluation under way."""

    kind: Kind
    ratios: BlockRatios
    prompts: PromptSet
    searcher_id: str | None = None
    # Numbers of prompts: without a reward yet, and of those the ones that no trial draws yet.
    missing: set[int] = field(default_factory=set)
    todo: deque[int] = field(default_factory=deque)
    num_failures: Counter[int] = field(default_factory=Counter)
    failure: str | None = None
    num_rendered: int = 0


@dataclass(frozen=True)
class Budget:
    """How much to evaluate.

    max_evaluations: ratio triples that the searcher may have evaluated.
    rerank_top:      how many of the best are compared again on fresh prompts.
    max_failures:    how often one prompt batch is tried again before its evaluation fails.
    """

    max_evaluations: int
    rerank_top: int = 3
    max_failures: int = 2


class EvaluationSearch(Searcher):  # type: ignore[misc]
    """Evaluates what a searcher suggests, one trial for each prompt batch.

    The dense baseline, the search, the re-ranking of the best few on fresh prompts and the
    validation of the winner are evaluations of one Tuner run, on the same loaded replicas. What
    the ledger knows is not drawn again, so running a search again replays it. The wrapped
    searcher sees only ratios and mean rewards. All prompt batches are handed out in order.

    batch_size: prompts of one trial; must be set before Ray asks for one. A worker without the
                memory for as many draws them in parts and says so, which lowers it for the rest.
    """

    def __init__(
        self,
        searcher: Searcher,
        *,
        prompt_sets: Mapping[str, PromptSet],
        recipe: Recipe,
        ledger: Ledger,
        budget: Budget,
        batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.evaluations: list[Evaluation] = []
        self.failure: str | None = None
        self.winner: Evaluation | None = None
        self.batch_size = batch_size
        self.on_evaluation: Callable[[Evaluation], None] = lambda _: None
        self._searcher = searcher
        self._prompt_sets = prompt_sets
        self._recipe = recipe
        self._ledger = ledger
        self._budget = budget
        self._open: list[_Open] = []
        self._trials: dict[str, tuple[_Open, Batch]] = {}
        self._num_suggested = 0
        self._num_named = 0
        self._exhausted = False
        self._begin("dense", BlockRatios(), "search")

    # --- what Ray asks -----------------------------------------------------------------------

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the next prompt batch to draw; None if there is none just now."""
        assert self.batch_size is not None
        while not self.finished:
            for evaluation in self._open:
                if evaluation.todo:
                    # Of equal size, since compiled models compile for each size anew.
                    num_batches = math.ceil(len(evaluation.todo) / self.batch_size)
                    size = math.ceil(len(evaluation.todo) / num_batches)
                    batch = tuple(evaluation.todo.popleft() for _ in range(size))
                    self._trials[trial_id] = (evaluation, batch)
                    return {
                        "ratios": evaluation.ratios.as_dict(),
                        "prompts": evaluation.prompts.name,
                        "batch": list(batch),
                    }
            if not self._begin_next():
                return None
        return str(Searcher.FINISHED)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Write a batch's rewards to the ledger, then tell the searcher if that completes one.

        A batch that failed is handed out again, up to budget.max_failures times. A ledger that
        cannot be written ends the search: what is not recorded would be paid for twice.
        """
        if trial_id not in self._trials:
            return
        try:
            self._settle(*self._trials.pop(trial_id), result, error)
        except LedgerError as broken:
            self.failure = str(broken)

    def _settle(
        self, evaluation: _Open, batch: Batch, result: dict[str, Any] | None, error: bool
    ) -> None:
        if result is None and not error:  # Ended by Ray before it began: not its fault.
            evaluation.todo.extendleft(reversed(batch))
            return
        failure: str | None = (result or {}).get("failure")
        if result is None:
            failure = "its worker died again and again, or could not start: see the ray log"
        if failure is None:
            assert result is not None
            measured: Measurement = result["measured"]
            self._record(evaluation, batch, measured)
            evaluation.num_rendered += len(measured.rewards)
            evaluation.missing.difference_update(batch)
            if measured.batch_size < len(batch):
                assert self.batch_size is not None
                self.batch_size = min(self.batch_size, measured.batch_size)
        elif (
            result is not None
            and result.get("transient")
            and max(evaluation.num_failures[number] for number in batch)
            < self._budget.max_failures
        ):
            # By prompt: the next try may be cut into other batches.
            evaluation.num_failures.update(batch)
            evaluation.todo.extendleft(reversed(batch))
        else:
            self._record(evaluation, batch, failure)
            evaluation.failure = failure
        self._complete_if_done(evaluation)

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

    # --- the course of a search --------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to evaluate."""
        return self.failure is not None or len(self._of("validation", "dense validation")) == 2

    @property
    def num_expected(self) -> int:
        """How many evaluations the whole run will have, as far as is known now."""
        searched = len(self._of("search")) if self._exhausted else self._budget.max_evaluations
        return 1 + searched + self._budget.rerank_top + 2

    @property
    def num_known(self) -> int:
        """How many pictures of the evaluations so far have their reward."""
        partly = sum(len(e.prompts) - len(e.missing) for e in self._open)
        return sum(len(e.prompts) for e in self.evaluations) + partly

    def replay(self) -> bool:
        """Go as far as the ledger reaches; return whether that is the end."""
        while not self.finished and not any(evaluation.todo for evaluation in self._open):
            if not self._begin_next():
                break
        return self.finished

    def of(self, kind: Kind) -> Evaluation | None:
        """Return the first complete evaluation of a kind."""
        return next(iter(self._of(kind)), None)

    def _of(self, *kinds: Kind) -> list[Evaluation]:
        return [evaluation for evaluation in self.evaluations if evaluation.kind in kinds]

    def _begin_next(self) -> bool:
        """Begin the next evaluation, if what it depends on is known."""
        if self._begin_suggested():
            return True
        searching = any(evaluation.kind in {"search", "dense"} for evaluation in self._open)
        return self._exhausted and not searching and self.winner is None and self._rerank()

    def _begin_suggested(self) -> bool:
        if self._exhausted:
            return False
        if self._num_suggested >= self._budget.max_evaluations:
            self._exhausted = True
            return False
        searcher_id = f"evaluation{self._num_named}"
        suggested = self._searcher.suggest(searcher_id)
        if suggested is None:
            return False
        if suggested == Searcher.FINISHED:
            self._exhausted = True
            return False
        self._num_named += 1
        self._num_suggested += 1
        ratios = BlockRatios(**{group: round(suggested[group], DECIMALS) for group in GROUPS})
        self._begin("search", ratios, "search", searcher_id)
        return True

    def _rerank(self) -> bool:
        """Compare the best few on fresh prompts, then validate the winner on others again."""
        best: dict[str, Evaluation] = {}
        for evaluation in sorted(self._of("search"), key=_by_mean):
            best.setdefault(evaluation.key, evaluation)
        candidates = [e for e in best.values() if e.failure is None][: self._budget.rerank_top]
        if not candidates:
            self.failure = f"every evaluation failed; the last: {self._of('search')[-1].failure}"
            self.failure += _RETRY
            return True
        reranking = any(evaluation.kind == "rerank" for evaluation in self._open)
        if reranking:
            return False
        if len(candidates) > 1 and not self._of("rerank"):
            for candidate in candidates:
                self._begin("rerank", candidate.ratios, "rerank")
            return True
        reranked = sorted(self._of("rerank"), key=_by_mean)
        ratios = next((e.ratios for e in reranked if e.failure is None), candidates[0].ratios)
        self.winner = next(e for e in candidates if e.ratios == ratios)
        self._begin("dense validation", BlockRatios(), "validation")
        self._begin("validation", ratios, "validation")
        return True

    # --- one evaluation ----------------------------------------------------------------------

    def _begin(
        self, kind: Kind, ratios: BlockRatios, prompts: str, searcher_id: str | None = None
    ) -> None:
        prompt_set = self._prompt_sets[prompts]
        evaluation = _Open(kind, ratios, prompt_set, searcher_id)
        key = self._recipe.key(ratios)
        for number, prompt in enumerate(prompt_set.prompts):
            known = self._ledger.get(key, prompt)
            if known is None:
                evaluation.missing.add(number)
                evaluation.todo.append(number)
            elif known.failure is not None:
                evaluation.failure = evaluation.failure or known.failure
        self._open.append(evaluation)
        self._complete_if_done(evaluation)

    def _record(self, evaluation: _Open, batch: Batch, outcome: Measurement | str) -> None:
        prompts = [evaluation.prompts.prompts[number] for number in batch]
        self._ledger.append(self._recipe, evaluation.ratios, prompts, outcome)

    def _complete_if_done(self, evaluation: _Open) -> None:
        if evaluation not in self._open or (evaluation.missing and evaluation.failure is None):
            return
        self._open.remove(evaluation)
        key = self._recipe.key(evaluation.ratios)
        known = [self._ledger.get(key, prompt) for prompt in evaluation.prompts.prompts]
        entries = [entry for entry in known if entry is not None]
        failed = evaluation.failure is not None
        rewards = [entry.reward for entry in entries if entry.reward is not None]
        complete = Evaluation(
            index=len(self.evaluations),
            kind=evaluation.kind,
            key=key,
            ratios=evaluation.ratios,
            prompts=evaluation.prompts,
            rewards=() if failed else tuple(rewards),
            failure=evaluation.failure,
            sparsity=next((entry.sparsity for entry in entries if entry.reward is not None), {}),
            seconds=sum(entry.seconds for entry in entries),
            num_rendered=evaluation.num_rendered,
        )
        self.evaluations.append(complete)
        if evaluation.searcher_id is not None:
            result = None if failed else {METRIC: complete.mean}
            self._searcher.on_trial_complete(evaluation.searcher_id, result, error=failed)
        self._stop_if_hopeless(complete)
        self.on_evaluation(complete)

    def _stop_if_hopeless(self, last: Evaluation) -> None:
        searched = self._of("search")
        if last.kind == "dense" and last.failure is not None:
            self.failure = f"the dense model cannot be evaluated: {last.failure}{_RETRY}"
        elif len(searched) == _HOPELESS and all(e.failure is not None for e in searched):
            self.failure = f"the first {_HOPELESS} evaluations failed: {last.failure}{_RETRY}"


def _by_mean(evaluation: Evaluation) -> float:
    """Sort best first, failures last; equal means keep their order."""
    return math.inf if evaluation.failure is not None else -evaluation.mean


@dataclass(frozen=True)
class Comparison:
    """A paired comparison of two evaluations on the same prompts.

    difference: mean over prompts of (pruned - dense).
    low, high:  its 95% confidence interval, by the t distribution.
    """

    difference: float
    low: float
    high: float
    num_prompts: int

    @property
    def verdict(self) -> Literal["better", "no difference shown", "worse"]:
        """What the interval says in words."""
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "no difference shown"


def compare(rewards: Sequence[float], baseline: Sequence[float]) -> Comparison:
    """Compare two evaluations, prompt by prompt; at least two prompts."""
    from scipy import stats

    differences = [a - b for a, b in zip(rewards, baseline, strict=True)]
    mean = statistics.fmean(differences)
    if len(set(differences)) == 1:  # No spread: the interval is a point.
        return Comparison(mean, mean, mean, len(differences))
    interval = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    return Comparison(mean, float(interval.low), float(interval.high), len(differences))
