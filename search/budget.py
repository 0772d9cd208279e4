"""Budgets: when a search has taken enough."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Use:
    """What a search has taken, in all its sessions together.

    evaluations: candidates that were evaluated, whether the search came by them or not.
    pictures:    drawn, the baseline's, the re-ranking's and the validation's included.
    gpu_hours:   of drawing and scoring, over all GPUs; of workers, where there are no GPUs.
    wall_hours:  from the first trial of a session to its end.
    """

    evaluations: int
    pictures: int
    gpu_hours: float
    wall_hours: float


@dataclass(frozen=True)
class Budget:
    """What a search may take; None is no limit. `Use` says what is counted.

    steps: that the searcher takes; for others than annealing, evaluations that it asks for.
    """

    steps: int
    evaluations: int | None = None
    pictures: int | None = None
    gpu_hours: float | None = None
    wall_hours: float | None = None

    def exceeded(self, use: Use) -> str | None:
        """Name the first limit that this use would exceed, and what it would come to."""
        for name in ("evaluations", "pictures", "gpu_hours", "wall_hours"):
            limit, value = getattr(self, name), getattr(use, name)
            if limit is not None and value > limit:
                end = "" if name == "evaluations" else ", re-ranking and validation included"
                shown = f"{value:.6g}" if isinstance(value, float) else f"{value}"
                return f"budget.{name}={limit:.12g} (going on would come to {shown}{end})"
        return None
