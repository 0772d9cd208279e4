"""Evaluations: candidates on prompt sets, drawn batch by batch, as far as the ledger has them."""

from __future__ import annotations

import logging
import math
import statistics
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from crdiff_core.prompts import PromptSet
from crdiff_core.ratios import BlockRatios, Group
from search.batching import Batch, batch_length, batches, filled
from search.comparison import standard_error
from search.ledger import STAGES, Ledger, Recipe
from search.pictures import Pictures
from search.space import Candidate

if TYPE_CHECKING:
    from crdiff_core.evaluation import Measurement

log = logging.getLogger(__name__)

Kind = Literal[
    "dense", "search", "rerank", "validation", "dense validation", "pruned alone", "resized"
]

SHOWN: tuple[Kind, ...] = ("pruned alone", "resized")
"""What is drawn for a report's pictures; no decision depends on it."""
NUM_KEPT = 4
"""Of the search prompts so many, the first ones, have their pictures kept."""


@dataclass(frozen=True)
class Evaluation:
    """One candidate on one prompt set, as far as the search went with it.

    index:        order of completion in this run, from 0.
    key:          the ledger's; of one candidate another for prompt sets that are drawn in
                  batches of another length.
    rewards:      one for each prompt, in their order; fewer if it was stopped, none if it failed.
    failure:      why it failed, in one line.
    is_stopped:   whether it was left unfinished: it had lost its race, or was no longer needed.
    estimate:     of the mean reward, where a race was lost; for the searcher alone.
    seconds:      GPU or CPU time of its pictures, whenever they were drawn; stages: of it, each
                  stage's, where that is known.
    memory_gib:   the peak of a GPU that drew it; None: not measured.
    measured_at:  when the last of them was, in seconds since 1970; 0 if none was.
    drawn_by:     pairs of a name of DRAWN_BY and its value, as far as they were written.
    num_rendered: pictures drawn for it in this run; 0 if the ledger knew it all.
    """

    index: int
    kind: Kind
    key: str
    candidate: Candidate
    prompts: PromptSet
    rewards: tuple[float, ...]
    failure: str | None
    is_stopped: bool
    estimate: float | None
    sparsity: Mapping[Group, float]
    seconds: float
    stages: Mapping[str, float]
    memory_gib: float | None
    measured_at: float
    drawn_by: frozenset[tuple[str, str]]
    num_rendered: int

    @property
    def ratios(self) -> BlockRatios:
        """The candidate's ratios."""
        return self.candidate.ratios

    @property
    def is_complete(self) -> bool:
        """Whether every prompt has its reward."""
        return len(self.rewards) == len(self.prompts)

    @property
    def mean(self) -> float:
        """Mean reward over all prompts; NaN if it failed or was stopped."""
        return statistics.fmean(self.rewards) if self.is_complete else math.nan

    @property
    def standard_error(self) -> float:
        """Standard error of the mean over prompts; NaN for fewer than two."""
        if not self.is_complete:
            return math.nan
        return standard_error(self.rewards, self.prompts.texts)


@dataclass(eq=False)
class OpenEvaluation:
    """An evaluation under way.

    recipe:       that its rewards are of.
    numbers:      of its prompts in the prompt set that they are from.
    length:       pictures in one forward pass.
    searcher_id:  by which the searcher knows it; None: it does not.
    missing:      of its prompts those without a reward yet, counted from 0.
    todo:         of its batches those that miss a reward and that no trial draws yet.
    num_failures: how often each batch failed.
    """

    kind: Kind
    candidate: Candidate
    recipe: Recipe
    key: str
    prompts: PromptSet
    numbers: tuple[int, ...]
    length: int
    searcher_id: str | None = None
    missing: set[int] = field(default_factory=set)
    todo: deque[Batch] = field(default_factory=deque)
    num_failures: Counter[Batch] = field(default_factory=Counter)
    failure: str | None = None
    num_rendered: int = 0

    @property
    def num_first(self) -> int:
        """How many prompts from the first on have their reward, without a gap."""
        return min(self.missing, default=len(self.prompts))

    @property
    def num_waiting(self) -> int:
        """How many of the missing prompts no trial draws yet."""
        return sum(number in self.missing for batch in self.todo for number in batch)

    def trial(self, batch: Batch, keep: bool) -> dict[str, Any]:
        """Return the configuration of the trial that draws a batch of it.

        keep: whether pictures are kept at all.
        """
        kept = [place for place, number in enumerate(batch) if number in self.missing]
        if self.kind == "rerank" or not keep:
            kept = []
        elif self.kind in {"dense", "search"}:
            kept = [place for place in kept if batch[place] < NUM_KEPT]
        return {
            "ratios": self.candidate.ratios.as_dict(),
            "poa_weight": self.candidate.poa_weight,
            "drawn_at": self.candidate.drawn_at,
            "prompts": self.prompts.name,
            "batch": [self.numbers[each] for each in filled(batch, self.length)],
            "keep": kept,
        }


class Evaluations:
    """The evaluations of one search. What the ledger knows of them is not drawn again.

    A batch of which a single reward is missing is drawn as a whole, since its prompts' digits
    depend on one another; what was known is dropped.

    batch_size:   prompts drawn at once, at most.
    max_failures: how often one prompt batch is tried again before its evaluation fails.
    pictures:     where they are kept; None: nowhere.
    """

    def __init__(
        self,
        ledger: Ledger,
        recipe: Recipe,
        prompt_sets: Mapping[str, PromptSet],
        batch_size: int,
        max_failures: int,
        pictures: Pictures | None = None,
    ) -> None:
        self.done: list[Evaluation] = []
        """What is complete, failed or stopped, in that order."""
        self.last: dict[str, Evaluation] = {}
        """Of those the search's, the last of each candidate by its key."""
        self.open: list[OpenEvaluation] = []
        self._ledger = ledger
        self._recipe = recipe
        self._prompt_sets = prompt_sets
        self._batch_size = batch_size
        self._max_failures = max_failures
        self._pictures = pictures
        self._keys: dict[tuple[Candidate, int], str] = {}

    def of(self, *kinds: Kind) -> list[Evaluation]:
        """Return those of these kinds that are done."""
        return [evaluation for evaluation in self.done if evaluation.kind in kinds]

    def key(self, candidate: Candidate) -> str:
        """Return the ledger's key of a candidate on the search prompts."""
        length = batch_length(len(self._prompt_sets["search"]), self._batch_size)
        return self._key_of(candidate, length)

    def missing(self, candidate: Candidate) -> list[int]:
        """Return the numbers of the search prompts that the ledger knows nothing of."""
        key = self.key(candidate)
        prompts = self._prompt_sets["search"].prompts
        return [n for n, prompt in enumerate(prompts) if self._ledger.get(key, prompt) is None]

    def rewards(self, evaluation: OpenEvaluation) -> list[float]:
        """Return the rewards that are known, in the order of the prompts."""
        known = (self._ledger.get(evaluation.key, each) for each in evaluation.prompts.prompts)
        return [entry.reward for entry in known if entry is not None and entry.reward is not None]

    # --- the life of one ---------------------------------------------------------------------

    def begin(
        self,
        kind: Kind,
        candidate: Candidate,
        prompts: str,
        searcher_id: str | None = None,
        numbers: Sequence[int] | None = None,
    ) -> OpenEvaluation:
        """Open an evaluation on the prompt set of this name; numbers: on these of it alone."""
        evaluation = self._open(kind, candidate, prompts, searcher_id, numbers)
        self.open.append(evaluation)
        return evaluation

    def settle(
        self, evaluation: OpenEvaluation, batch: Batch, result: Mapping[str, Any] | None
    ) -> None:
        """Write what a trial brought to the ledger, or hand its batch out again.

        result: None: nothing came of it that counts.
        Raises StorageError if it cannot be written.
        """
        if result is None:
            evaluation.todo.appendleft(batch)
            return
        failure: str | None = result.get("failure")
        if failure is None:
            measured: Measurement = result["measured"]
            evaluation.num_rendered += self._record(
                evaluation,
                batch,
                measured,
                drawn_by=dict(result.get("drawn_by", ())),
                redrawn=result.get("redrawn", False),
            )
            self._keep(evaluation, batch, measured.pictures)
            # Ray Tune holds every trial's result to the end, and writes it into its own files.
            measured.pictures.clear()
            evaluation.missing.difference_update(batch)
        elif result.get("transient") and evaluation.num_failures[batch] < self._max_failures:
            log.info("%s is tried again: %s", evaluation.candidate.ratios, failure)
            evaluation.num_failures[batch] += 1
            evaluation.todo.appendleft(batch)
        else:
            self._record(evaluation, batch, failure)
            evaluation.failure = failure

    def close(
        self,
        evaluation: OpenEvaluation,
        is_stopped: bool = False,
        estimate: float | None = None,
    ) -> Evaluation:
        """End an evaluation with what is known of it."""
        self.open.remove(evaluation)
        closed = self._as_it_is(evaluation, is_stopped, estimate)
        self.done.append(closed)
        if closed.kind == "search":
            self.last[closed.key] = closed
        return closed

    def known(self, candidate: Candidate) -> Evaluation:
        """Return what the ledger has of a candidate on the search prompts."""
        return self._as_it_is(self._open("search", candidate, "search"))

    def _open(
        self,
        kind: Kind,
        candidate: Candidate,
        prompts: str,
        searcher_id: str | None = None,
        numbers: Sequence[int] | None = None,
    ) -> OpenEvaluation:
        prompt_set, size = self._prompt_sets[prompts], self._batch_size
        if numbers is None:
            numbers = range(len(prompt_set))
        else:
            size = 1  # Which are chosen depends on what was found: they have no neighbours.
            chosen = tuple(prompt_set.prompts[number] for number in numbers)
            prompt_set = PromptSet(prompt_set.name, chosen)
        length = batch_length(len(prompt_set), size)
        evaluation = OpenEvaluation(
            kind,
            candidate,
            self._recipe_of(candidate, length),
            self._key_of(candidate, length),
            prompt_set,
            tuple(numbers),
            length,
            searcher_id,
        )
        for number, prompt in enumerate(prompt_set.prompts):
            entry = self._ledger.get(evaluation.key, prompt)
            if entry is None:
                evaluation.missing.add(number)
            elif entry.failure is not None:
                evaluation.failure = evaluation.failure or entry.failure
        for batch in batches(len(prompt_set), size):
            if not evaluation.missing.isdisjoint(batch):
                evaluation.todo.append(batch)
        return evaluation

    def _as_it_is(
        self,
        evaluation: OpenEvaluation,
        is_stopped: bool = False,
        estimate: float | None = None,
    ) -> Evaluation:
        known = [self._ledger.get(evaluation.key, p) for p in evaluation.prompts.prompts]
        entries = [entry for entry in known if entry is not None]
        has_failed = evaluation.failure is not None
        return Evaluation(
            index=len(self.done),
            kind=evaluation.kind,
            key=evaluation.key,
            candidate=evaluation.candidate,
            prompts=evaluation.prompts,
            rewards=() if has_failed else tuple(self.rewards(evaluation)),
            failure=evaluation.failure,
            is_stopped=is_stopped,
            estimate=estimate,
            sparsity=next((entry.sparsity for entry in entries if entry.reward is not None), {}),
            seconds=sum(entry.seconds for entry in entries),
            stages={
                stage: sum(entry.stages[stage] for entry in entries if stage in entry.stages)
                for stage in STAGES
                if any(stage in entry.stages for entry in entries)
            },
            memory_gib=max(
                (entry.memory_gib for entry in entries if entry.memory_gib is not None),
                default=None,
            ),
            measured_at=max((entry.measured_at for entry in entries), default=0.0),
            drawn_by=frozenset(pair for entry in entries for pair in entry.drawn_by.items()),
            num_rendered=evaluation.num_rendered,
        )

    def _record(
        self,
        evaluation: OpenEvaluation,
        batch: Batch,
        outcome: Measurement | str,
        *,
        drawn_by: Mapping[str, str] | None = None,
        redrawn: bool = False,
    ) -> int:
        """Write a batch's rows; return how many are new."""
        return self._ledger.append(
            evaluation.recipe,
            evaluation.candidate.ratios,
            [evaluation.prompts.prompts[number] for number in batch],
            outcome,
            drawn_by=drawn_by,
            redrawn=redrawn,
        )

    def _keep(
        self, evaluation: OpenEvaluation, batch: Batch, pictures: Mapping[int, bytes]
    ) -> None:
        if self._pictures is not None:
            prompts = [evaluation.prompts.prompts[number] for number in batch]
            self._pictures.add(evaluation.key, prompts, pictures)

    def _key_of(self, candidate: Candidate, length: int) -> str:
        if (candidate, length) not in self._keys:
            recipe = self._recipe_of(candidate, length)
            self._keys[candidate, length] = recipe.key(candidate.ratios)
        return self._keys[candidate, length]

    def _recipe_of(self, candidate: Candidate, length: int) -> Recipe:
        is_own = length == self._ledger.own_batch_size
        return replace(
            self._recipe,
            poa_weight=candidate.poa_weight,
            drawn_at=candidate.drawn_at,
            batch_size=None if is_own else length,
        )
