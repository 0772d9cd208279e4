"""How many prompts a trial draws: few, to spread an evaluation over workers, or many at once."""

from __future__ import annotations

import math
from collections import defaultdict

# More pictures at once gain nothing further.
MAX_BATCH = 16
# Trials of a size by which its time is judged.
_ENOUGH = 3


class Batching:
    """Chooses the prompts of a trial from what trials were measured to take.

    A trial of b prompts takes about a + c * b seconds. Of two ways to keep the workers busy,
    spreading an evaluation's batches over them wastes nothing but a, and evaluating several
    candidates at once wastes those that the search turns out not to need. The choice minimises the
    expected time for each step that the search takes.

    fixed:         the size to use; None: chosen here.
    limit:         prompts that fit into a worker's memory, as far as is known.
    parallel_gain: candidates evaluated abreast speed the search up by their number to this power:
                   1 if none is ever in vain, 0 if only one at a time is of use.
    """

    def __init__(
        self, fixed: int | None = None, parallel_gain: float = 1.0, first: int | None = None
    ) -> None:
        self.fixed = fixed
        self.num_workers = 1
        self.limit = MAX_BATCH if fixed is None else fixed
        self._parallel_gain = parallel_gain
        self._first = first
        self._seconds: dict[int, list[float]] = defaultdict(list)

    def record(self, size: int, seconds: float, limit: int) -> None:
        """Learn from a finished trial. limit: prompts that its worker has the memory for."""
        self._seconds[size].append(seconds)
        if limit < size:
            self.limit = min(self.limit, limit)

    def size(self, num_prompts: int) -> int:
        """Return how many of an evaluation's prompts a trial should draw."""
        most = min(self.limit, num_prompts)
        if self.fixed is not None:
            return most
        spread = min(most, self._first or math.ceil(num_prompts / self.num_workers))
        times = self._times()
        if times is not None:
            return self._best(num_prompts, most, *times)
        if self.num_workers > 1 and spread > 1 and len(self._seconds[spread]) >= _ENOUGH:
            return math.ceil(spread / 2)  # Another size, so that there is something to compare.
        return spread

    def _best(self, num_prompts: int, most: int, fixed_s: float, each_s: float) -> int:
        def step_s(num_batches: int) -> float:
            rounds = math.ceil(num_batches / self.num_workers)
            abreast = max(1.0, self.num_workers / num_batches)
            trial_s = fixed_s + each_s * math.ceil(num_prompts / num_batches)
            return float(rounds * trial_s / abreast**self._parallel_gain)

        fewest = math.ceil(num_prompts / most)
        return math.ceil(num_prompts / min(range(fewest, num_prompts + 1), key=step_s))

    def _times(self) -> tuple[float, float] | None:
        """Return (a, c) by the two sizes that lie furthest apart; None: not enough is measured."""
        # The least of several: a worker's first trial compiles and warms up.
        least = {n: min(times) for n, times in self._seconds.items() if len(times) >= _ENOUGH}
        if len(least) < 2:
            return None
        small, large = min(least), max(least)
        each_s = max(0.0, (least[large] - least[small]) / (large - small))
        return max(0.0, least[small] - each_s * small), each_s
