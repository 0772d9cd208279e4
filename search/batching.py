"""The batches of a prompt set: a function of their size alone, so that a reward has one value."""

from __future__ import annotations

import math

# The numbers of the prompts that one trial draws.
Batch = tuple[int, ...]


def batch_length(num_prompts: int, size: int) -> int:
    """Return how many pictures of a prompt set are drawn in one forward pass, at most `size`.

    The fewest that part the set into ceil(num_prompts / size) batches.
    """
    return math.ceil(num_prompts / math.ceil(num_prompts / size))


def batches(num_prompts: int, size: int) -> list[Batch]:
    """Part a set's prompts, counted from 0, into ceil(num_prompts / size) batches.

    Each has `batch_length` prompts, the last one what remains; `filled` makes up its length. So a
    prompt always has the same place and the same neighbours, on which its last digits depend.
    """
    length = batch_length(num_prompts, size)
    return [
        tuple(range(first, min(first + length, num_prompts)))
        for first in range(0, num_prompts, length)
    ]


def filled(batch: Batch, length: int) -> Batch:
    """Repeat a batch's last prompt up to a length; what is drawn for the repeats is dropped."""
    return batch + batch[-1:] * (length - len(batch))
