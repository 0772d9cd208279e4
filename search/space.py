"""What is searched: the dimensions a searcher sees, and the candidate that they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from crdiff_core.ratios import GROUPS, BlockRatios
from search.annealing import DECIMALS

POA_WEIGHT = "poa_weight"
RATIO = "ratio"


@dataclass(frozen=True)
class Candidate:
    """What one evaluation draws with: the ratios, and the weight k of POA (equation 2).

    drawn_at: the HEIGHTxWIDTH of the pictures before they are resized; requested: the result's.
    """

    ratios: BlockRatios
    poa_weight: float
    drawn_at: str = "requested"


@dataclass(frozen=True)
class Space:
    """The box that is searched.

    bounds:     (low, high) of each dimension: down, mid and up, or one shared `ratio` (uniform
                pruning, the paper's ablation); and of `poa_weight`, if that is searched too.
    poa_weight: k, if it is not.
    """

    bounds: Mapping[str, tuple[float, float]]
    poa_weight: float

    @property
    def is_uniform(self) -> bool:
        """Whether all groups share one ratio."""
        return RATIO in self.bounds

    def candidate(self, suggested: Mapping[str, float]) -> Candidate:
        """Return what a searcher's suggestion stands for."""
        values = {name: round(float(suggested[name]), DECIMALS) for name in self.bounds}
        ratios = BlockRatios(
            **{group: values[RATIO if self.is_uniform else group] for group in GROUPS}
        )
        return Candidate(ratios, values.get(POA_WEIGHT, self.poa_weight))

    def suggestion(self, candidate: Candidate) -> dict[str, float] | None:
        """Return the suggestion that stands for a candidate; None if none in this space does."""
        if candidate.drawn_at != "requested":
            return None
        ratios = candidate.ratios
        values = {str(group): ratios[group] for group in GROUPS}
        if self.is_uniform:
            if len(set(values.values())) > 1:
                return None
            values = {RATIO: ratios.down}
        if POA_WEIGHT in self.bounds:
            values[POA_WEIGHT] = candidate.poa_weight
        elif candidate.poa_weight != self.poa_weight:
            return None
        inside = all(low <= values[name] <= high for name, (low, high) in self.bounds.items())
        return values if inside else None

    def describe(self, candidate: Candidate) -> str:
        """Say which point a candidate is, to a person."""
        weight = f", k {candidate.poa_weight:.3f}" if POA_WEIGHT in self.bounds else ""
        return f"{candidate.ratios}{weight}"

    def start(self, ratios: Sequence[float]) -> dict[str, float]:
        """Return the suggestion next to (down, mid, up), as a starting point."""
        values = dict(zip(GROUPS, ratios, strict=True))
        start = {RATIO: sum(ratios) / len(ratios)} if self.is_uniform else {**values}
        start |= {POA_WEIGHT: self.poa_weight} if POA_WEIGHT in self.bounds else {}
        return {
            name: min(max(start[name], low), high) for name, (low, high) in self.bounds.items()
        }
