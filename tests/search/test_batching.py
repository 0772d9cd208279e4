import pytest

from search.batching import MAX_BATCH, Batching


def measured(num_workers, fixed_s, each_s, gain=0.6, num_prompts=32):
    """Batching after it has seen trials that take fixed_s + each_s for each prompt."""
    batching = Batching(parallel_gain=gain)
    batching.num_workers = num_workers
    for _ in range(8):
        size = batching.size(num_prompts)
        batching.record(size, fixed_s + each_s * size, MAX_BATCH)
    return batching


def test_a_size_that_was_asked_for_is_kept():
    batching = Batching(fixed=5)
    batching.num_workers = 64
    for _ in range(8):
        batching.record(batching.size(32), 1.0, MAX_BATCH)

    assert batching.size(32) == 5
    assert batching.size(3) == 3


def test_before_anything_is_measured_an_evaluation_is_spread_over_the_workers():
    batching = Batching()
    sizes = []
    for batching.num_workers in (1, 2, 4, 8, 100):
        sizes.append(batching.size(32))

    assert sizes == [16, 16, 8, 4, 1]


def test_a_resumed_search_begins_with_the_size_it_had():
    assert Batching(first=6).size(32) == 6


def test_a_worker_with_too_little_memory_lowers_it_for_good():
    batching = Batching(fixed=8)
    batching.record(8, 1.0, 4)

    assert batching.size(32) == 4


def test_two_sizes_are_tried_before_one_is_chosen():
    batching = Batching()
    batching.num_workers = 4
    sizes = []
    for _ in range(6):
        sizes.append(batching.size(32))
        batching.record(sizes[-1], 1.0, MAX_BATCH)

    assert sizes == [8, 8, 8, 4, 4, 4]


def test_where_a_picture_costs_the_same_in_any_batch_evaluations_are_spread_thin():
    assert measured(8, fixed_s=0.0, each_s=1.0).size(32) == 4


def test_where_a_batch_costs_the_same_with_any_number_of_pictures_batches_are_large():
    assert measured(8, fixed_s=1.0, each_s=0.0).size(32) == MAX_BATCH


def test_more_workers_than_prompts_leave_the_rest_to_other_evaluations():
    assert measured(64, fixed_s=0.0, each_s=1.0).size(32) == 1


def test_searchers_that_waste_nothing_keep_their_batches_larger():
    annealing = measured(8, fixed_s=0.3, each_s=0.1, gain=0.6).size(32)
    random = measured(8, fixed_s=0.3, each_s=0.1, gain=1.0).size(32)

    assert annealing < random == MAX_BATCH


@pytest.mark.parametrize("num_workers", [1, 3, 8, 64])
@pytest.mark.parametrize("fixed_s", [0.0, 0.5, 10.0])
def test_the_size_is_always_possible(num_workers, fixed_s):
    batching = measured(num_workers, fixed_s, 0.2)

    assert 1 <= batching.size(32) <= MAX_BATCH
    assert batching.size(3) <= 3
