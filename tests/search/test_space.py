import pytest
from hypothesis import given
from hypothesis import strategies as st

from crdiff_core.ratios import BlockRatios
from search.space import Candidate, Space

BLOCKS = {"down": (0.1, 0.8), "mid": (0.1, 0.8), "up": (0.2, 0.8)}
ratio = st.floats(0.2, 0.8).map(lambda value: round(value, 6))
weight = st.floats(1.0, 2.0).map(lambda value: round(value, 6))


@given(down=ratio, mid=ratio, up=ratio, k=weight)
def test_a_suggestion_and_its_candidate_stand_for_each_other(down, mid, up, k):
    space = Space({**BLOCKS, "poa_weight": (1.0, 2.0)}, poa_weight=1.5)
    suggested = {"down": down, "mid": mid, "up": up, "poa_weight": k}
    candidate = space.candidate(suggested)

    assert candidate == Candidate(BlockRatios(down, mid, up), k)
    assert space.suggestion(candidate) == suggested


def test_a_weight_that_is_not_searched_is_the_spaces():
    candidate = Space(BLOCKS, 1.2).candidate({"down": 0.3, "mid": 0.4, "up": 0.5})

    assert candidate.poa_weight == 1.2


def test_uniform_pruning_is_one_ratio_for_all_groups():
    space = Space({"ratio": (0.1, 0.8)}, 1.5)
    candidate = space.candidate({"ratio": 0.4})

    assert space.is_uniform
    assert candidate.ratios == BlockRatios(0.4, 0.4, 0.4)
    assert space.suggestion(candidate) == {"ratio": 0.4}
    assert space.suggestion(Candidate(BlockRatios(0.4, 0.4, 0.3), 1.5)) is None


@pytest.mark.parametrize(
    "candidate",
    [
        Candidate(BlockRatios(0.3, 0.3, 0.1), 1.5),
        Candidate(BlockRatios(0.3, 0.3, 0.3), 1.0),
        Candidate(BlockRatios(), 1.5),
    ],
    ids=["outside", "another weight", "dense"],
)
def test_what_does_not_lie_in_the_space_has_no_suggestion(candidate):
    assert Space(BLOCKS, 1.5).suggestion(candidate) is None


def test_starting_points_are_moved_into_the_space():
    assert Space(BLOCKS, 1.5).start((0.05, 0.9, 0.3)) == {"down": 0.1, "mid": 0.8, "up": 0.3}
    assert Space({"ratio": (0.1, 0.8)}, 1.5).start((0.1, 0.2, 0.6)) == pytest.approx(
        {"ratio": 0.3}
    )
    weighted = Space({**BLOCKS, "poa_weight": (1.0, 2.0)}, 1.5)
    assert weighted.start((0.3, 0.3, 0.3))["poa_weight"] == 1.5


def test_a_weight_is_said_where_it_is_searched():
    candidate = Candidate(BlockRatios(0.3, 0.2, 0.1), 1.25)

    assert Space(BLOCKS, 1.5).describe(candidate) == "0.300 / 0.200 / 0.100"
    weighted = Space({**BLOCKS, "poa_weight": (1.0, 2.0)}, 1.5)
    assert weighted.describe(candidate) == "0.300 / 0.200 / 0.100, k 1.250"
