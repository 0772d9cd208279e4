import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.batching import batch_length, batches, filled


@pytest.mark.parametrize(
    ("num_prompts", "size", "expected"),
    [
        (7, 3, [(0, 1, 2), (3, 4, 5), (6,)]),
        (10, 4, [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]),
        (17, 16, [tuple(range(9)), tuple(range(9, 17))]),
        (4, 16, [(0, 1, 2, 3)]),
        (3, 1, [(0,), (1,), (2,)]),
    ],
)
def test_prompts_are_parted_by_their_numbers(num_prompts, size, expected):
    assert batches(num_prompts, size) == expected


@given(num_prompts=st.integers(1, 300), size=st.integers(1, 40))
def test_there_are_as_few_batches_as_can_be_and_none_is_larger_than_it_has_to_be(
    num_prompts, size
):
    parts = batches(num_prompts, size)
    length = batch_length(num_prompts, size)

    assert [number for batch in parts for number in batch] == list(range(num_prompts))
    assert len(parts) == -(-num_prompts // size)
    assert {len(batch) for batch in parts[:-1]} <= {length}
    assert len(parts[-1]) <= length <= size
    assert (length - 1) * len(parts) < num_prompts
    assert {len(filled(batch, length)) for batch in parts} == {length}


def test_a_batch_is_filled_up_with_what_it_has():
    assert filled((3, 4), 4) == (3, 4, 4, 4)
    assert filled((3, 4), 2) == (3, 4)
