"""Benchmarks, each a module to run; README.md has their figures."""

from crdiff_core.numerics import make_reproducible

# They compare pictures bit by bit.
make_reproducible()
