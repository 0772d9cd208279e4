"""Equal bits from equal arithmetic on a CPU."""

from __future__ import annotations

import os


def make_reproducible() -> None:
    """Make MKL's results independent of where arrays lie in memory.

    MKL otherwise chooses its code by the alignment of arrays, and on some processors the choice
    changes the last digits: two runs of one drawing then differ. Call this before torch computes
    anything, because MKL reads the environment at its first call and never again. A value that
    the user has set stays. The setting costs no measurable time.
    Source: oneMKL developer guide, Conditional Numerical Reproducibility.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO")
