"""CR-Diff: block-wise pruned diffusion UNets with pruned output amplification.

import crdiff_core
crdiff_core.apply(pipe, "best_ratios.json")  # or BlockRatios(down=0.43, mid=0.43, up=0.36)
crdiff_core.remove(pipe)
with crdiff_core.applied(pipe, "best_ratios.json"):  # and without it after the block
    pipe("a cat")
"""

from typing import TYPE_CHECKING, Any

from crdiff_core.errors import CRDiffError
from crdiff_core.ratios import BlockRatios, RatiosFile, Resolution

if TYPE_CHECKING:
    from crdiff_core.poa import applied, apply, remove

__all__ = ["BlockRatios", "CRDiffError", "RatiosFile", "Resolution", "applied", "apply", "remove"]


def __getattr__(name: str) -> Any:
    # torch and diffusers take seconds to import, and who only reads a ratios file needs neither.
    if name in {"applied", "apply", "remove"}:
        from crdiff_core import poa

        return getattr(poa, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
