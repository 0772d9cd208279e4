"""Speculation: which future proposals of an annealing chain are worth evaluating now.

The chain is a path through a tree of states: at each, one proposal is accepted or rejected. The
tree is walked ahead of the chain, the likeliest states first, and what they propose is evaluated
by workers that are free. The chain itself only ever moves along known outcomes, in the order of
its steps, so its decisions are those of a single worker.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from search.annealing import Chain, ChainState, Point

# Moves by which acceptance is judged; older ones were made at other temperatures.
_MEMORY = 32
# A known reward decides a step only as far as the current reward is known and not a guess.
_TRUST = 0.9


@dataclass(frozen=True)
class Outcome:
    """What came of a proposal: its reward, None if it failed.

    stopped: it lost its race, and the reward is an estimate; error: its standard error.
    """

    reward: float | None
    stopped: bool = False
    error: float = 0.0


@dataclass(frozen=True)
class Commit:
    """A step of the chain: what was proposed, what came of it, and the state after it."""

    chain: int
    point: Point
    outcome: Outcome
    state: ChainState


@dataclass(eq=False)
class Node:
    """A state that the chain may come to, and the proposal it would make there.

    point:      None if there is none: the chain ends there, or too little is known yet.
    is_certain: whether the current reward is no guess, if the chain comes there.
    needed:     gain for each unit of distance above which the proposal is accepted.
    known:      the node after it once its outcome is known; accepted and rejected: until then.
    """

    state: ChainState
    point: Point | None
    is_certain: bool = True
    needed: float | None = None
    known: Node | None = None
    accepted: Node | None = None
    rejected: Node | None = None


class Speculation:
    """One chain, and the tree of what it may do next.

    outcome: what is known of a proposal made in a state; None: nothing yet.
    """

    def __init__(
        self,
        chain: Chain,
        outcome: Callable[[Chain, ChainState, Point], Outcome | None],
        number: int = 0,
    ) -> None:
        self._chain = chain
        self._outcome = outcome
        self._number = number
        self._head = self._node(chain.start())
        # Gain for each unit of distance, of the latest moves: in order of time, and of size.
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []

    @property
    def state(self) -> ChainState:
        """The state that the chain is in."""
        return self._head.state

    def commit(self) -> Iterator[Commit]:
        """Move the chain along every outcome that is known, one step after the other."""
        while self._head.point is not None:
            before, point = self.state, self._head.point
            outcome = self._outcome(self._chain, before, point)
            if outcome is None:
                return
            self._learn(before, point, outcome.reward)
            self._head = self._after(self._head, outcome)
            yield Commit(self._number, point, outcome, self.state)

    def walk(self) -> Iterator[tuple[float, Point]]:
        """Yield proposals that are not evaluated, the likeliest to be needed first.

        The likelihood of the chain's own next proposal is 1.
        """
        heap = [(-1.0, 0, self._head)]
        num_pushed = 1
        while heap:
            negative, _, node = heapq.heappop(heap)
            if node.point is None:
                continue
            outcome = self._outcome(self._chain, node.state, node.point)
            if outcome is None:
                yield -negative, node.point
            for share, child in self._children(node, outcome):
                heapq.heappush(heap, (share * negative, num_pushed, child))
                num_pushed += 1

    def _children(self, node: Node, outcome: Outcome | None) -> Iterator[tuple[float, Node]]:
        if outcome is not None and node.is_certain:
            yield 1.0, self._after(node, outcome)
            return
        state, chain = node.state, self._chain
        assert node.point is not None
        is_seed = chain.is_seed(state)
        if node.accepted is None or node.rejected is None:
            accepted = chain.suppose(state, node.point, accepted=True)
            rejected = chain.suppose(state, node.point, accepted=False)
            node.accepted = self._node(accepted, is_certain=False)
            node.rejected = self._node(rejected, node.is_certain and not is_seed)
        share = self._acceptance(node, outcome)
        if chain.is_seed(node.accepted.state):
            # The next starting point comes whatever this one gives.
            yield 1.0, node.accepted if state.current is None else node.rejected
            return
        yield share, node.accepted
        yield 1 - share, node.rejected

    def _after(self, node: Node, outcome: Outcome) -> Node:
        if node.known is None:
            assert node.point is not None
            state = self._chain.advance(node.state, node.point, outcome.reward, outcome.error)
            node.known = self._node(state)
        return node.known

    def _acceptance(self, node: Node, outcome: Outcome | None) -> float:
        """Return how likely a proposal is to be accepted, from the chain's own history."""
        if outcome is not None:
            if outcome.reward is None:
                return 0.0
            return _TRUST if self._chain.accepts(node.state, outcome.reward) else 1 - _TRUST
        if node.state.current is None:
            return _TRUST
        if node.needed is None:
            assert node.point is not None
            distance = math.dist(node.point, node.state.current)
            gain = self._chain.min_gain(node.state)
            node.needed = gain / distance if distance > 0 else -math.inf
        # The share of recent moves that would have gained enough, had they been as long.
        num_enough = len(self._sorted) - bisect_right(self._sorted, node.needed)
        return (num_enough + 1) / (len(self._sorted) + 2)

    def _learn(self, state: ChainState, point: Point, reward: float | None) -> None:
        if reward is None or state.current is None or self._chain.is_seed(state):
            return
        distance = math.dist(point, state.current)
        if distance == 0:
            return
        rate = (reward - state.current_reward) / distance
        self._recent.append(rate)
        insort(self._sorted, rate)
        if len(self._recent) > _MEMORY:
            self._sorted.remove(self._recent.popleft())

    def _node(self, state: ChainState, is_certain: bool = True) -> Node:
        is_open = not state.finished and self._chain.can_propose(state)
        return Node(state, self._chain.propose(state) if is_open else None, is_certain)
