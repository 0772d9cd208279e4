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
from functools import cached_property, partial

from search.annealing import Chain, ChainState
from search.surrogate import Observation, Point

# Moves by which acceptance is judged; older ones were made at other temperatures.
_MEMORY = 32
# A known reward decides a step only as far as the current reward is known and not a guess.
_TRUST = 0.9


@dataclass(frozen=True)
class Commit:
    """A step of the chain: what came of its proposal, and the state after it."""

    chain: int
    seen: Observation
    state: ChainState


class Node:
    """A state that the chain may come to, and the proposal it would make there.

    become:     makes the state; only asked if the walk comes there.
    is_certain: whether the current reward is no guess, if the chain comes there.
    needed:     gain for each unit of distance above which the proposal is accepted.
    known:      the node after it once its outcome is known; accepted and rejected: until then.
    children:   what may follow and how likely, and what is known (`basis`) as they were found.
    """

    def __init__(self, chain: Chain, become: Callable[[], ChainState], is_certain: bool) -> None:
        self._chain = chain
        self._become = become
        self.is_certain = is_certain
        self.needed: float | None = None
        self.known: Node | None = None
        self.accepted: Node | None = None
        self.rejected: Node | None = None
        self.children: list[tuple[float, Node]] = []
        self.basis: tuple[int, Observation | None] | None = None

    @cached_property
    def state(self) -> ChainState:
        """Where the chain would be."""
        return self._become()

    @cached_property
    def point(self) -> Point | None:
        """What it proposes; None: the chain ends there, or too little is known yet."""
        if self.state.finished or not self._chain.can_propose(self.state):
            return None
        return self._chain.propose(self.state)


class Speculation:
    """One chain, and the tree of what it may do next.

    observe: what is known of a proposal made in a state; None: nothing yet.
    """

    def __init__(
        self,
        chain: Chain,
        observe: Callable[[Chain, ChainState, Point], Observation | None],
        number: int = 0,
    ) -> None:
        self._chain = chain
        self._observe = observe
        self._number = number
        self._head = Node(chain, chain.start, is_certain=True)
        # Gain for each unit of distance, of the latest moves: in order of time, and of size.
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []
        self._num_learnt = 0

    @property
    def state(self) -> ChainState:
        """The state that the chain is in."""
        return self._head.state

    def commit(self) -> Iterator[Commit]:
        """Move the chain along every outcome that is known, one step after the other."""
        while self._head.point is not None:
            seen = self._observe(self._chain, self.state, self._head.point)
            if seen is None:
                return
            self._learn(self.state, seen)
            self._head = self._after(self._head, seen)
            yield Commit(self._number, seen, self.state)

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
            seen = self._observe(self._chain, node.state, node.point)
            if seen is None:
                yield -negative, node.point
            for share, child in self._children(node, seen):
                heapq.heappush(heap, (share * negative, num_pushed, child))
                num_pushed += 1

    def _children(self, node: Node, seen: Observation | None) -> list[tuple[float, Node]]:
        """Return what may follow a node and how likely, as of the last walk if nothing is new."""
        basis = self._num_learnt, seen
        if node.basis != basis:
            node.children, node.basis = self._branch(node, seen), basis
        return node.children

    def _branch(self, node: Node, seen: Observation | None) -> list[tuple[float, Node]]:
        if seen is not None and node.is_certain:
            return [(1.0, self._after(node, seen))]
        state, chain = node.state, self._chain
        assert node.point is not None
        is_seed = chain.is_seed(state)
        if node.accepted is None or node.rejected is None:
            suppose = partial(chain.suppose, state, node.point)
            node.accepted = Node(chain, partial(suppose, accepted=True), is_certain=False)
            node.rejected = Node(
                chain, partial(suppose, accepted=False), node.is_certain and not is_seed
            )
        if is_seed and chain.is_seed(node.accepted.state):
            # The next starting point comes whatever this one gives.
            return [(1.0, node.accepted if state.current is None else node.rejected)]
        share = self._acceptance(node, seen)
        both = [(share, node.accepted), (1 - share, node.rejected)]
        return [(likelihood, child) for likelihood, child in both if likelihood > 0]

    def _after(self, node: Node, seen: Observation) -> Node:
        if node.known is None:
            advance = partial(self._chain.advance, node.state, seen)
            node.known = Node(self._chain, advance, is_certain=True)
        return node.known

    def _acceptance(self, node: Node, seen: Observation | None) -> float:
        """Return how likely a proposal is to be accepted, from the chain's own history."""
        if seen is not None and seen.reward is None:
            return 0.0
        if node.state.is_jump:
            return 1.0
        if seen is not None and seen.reward is not None:
            return _TRUST if self._chain.accepts(node.state, seen.reward) else 1 - _TRUST
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

    def _learn(self, state: ChainState, seen: Observation) -> None:
        if seen.reward is None or state.current is None or self._chain.is_seed(state):
            return
        distance = math.dist(seen.point, state.current)
        if distance == 0:
            return
        rate = (seen.reward - state.current_reward) / distance
        self._num_learnt += 1
        self._recent.append(rate)
        insort(self._sorted, rate)
        if len(self._recent) > _MEMORY:
            self._sorted.remove(self._recent.popleft())
