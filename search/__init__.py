"""Distributed search for CR-Diff's pruning ratios, on Ray Tune."""
