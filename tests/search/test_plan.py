"""A plan: which prompts, seeds and options the settings come to."""

import pytest

from crdiff_core.ratios import GROUPS
from search.plan import Plan, choose_prompts
from tests.conf.test_config import composed

SIZES = ("prompts.search=4", "prompts.rerank=3", "prompts.validation=5")


def plan(tmp_path, *overrides):
    return Plan.make(composed(f"output={tmp_path}", *SIZES, *overrides))


def prompts_of(*overrides):
    return choose_prompts(composed(*SIZES, *overrides))


def pairs(prompt_set):
    return {(prompt.text, prompt.seed) for prompt in prompt_set.prompts}


@pytest.mark.parametrize(
    "overrides",
    [
        ("prompts=shapes",),
        ("prompts=everyday",),
        ("prompts=reference",),
        ("prompts.text='a cat, in a hat'",),
        ("prompts.path=PATH",),
        ("prompts.path=PATH", "prompts.repeat=true"),
    ],
    ids=" ".join,
)
def test_search_rerank_and_validation_prompts_are_disjoint(tmp_path, overrides):
    (tmp_path / "mine.txt").write_text("\n".join(f"prompt {i}" for i in range(12)))
    given = [part.replace("PATH", str(tmp_path / "mine.txt")) for part in overrides]
    sets = prompts_of(*given)

    assert {name: len(each) for name, each in sets.items()} == {
        "search": 4,
        "rerank": 3,
        "validation": 5,
    }
    assert len(set.union(*map(pairs, sets.values()))) == 12


def test_one_prompt_is_drawn_with_many_seeds():
    sets = prompts_of("prompts.text='a cat, in a hat'")

    assert {prompt.text for each in sets.values() for prompt in each.prompts} == {
        "a cat, in a hat"
    }


def test_prompts_of_a_file_may_be_repeated(tmp_path):
    (tmp_path / "mine.txt").write_text("a cat\na dog\n")
    sets = prompts_of(f"prompts.path={tmp_path / 'mine.txt'}", "prompts.repeat=true")

    assert (
        sorted(prompt.text for prompt in sets["search"].prompts) == ["a cat"] * 2 + ["a dog"] * 2
    )


def starts(searcher, number):
    """The first suggestions of a searcher that is told the same of each."""
    found = []
    for index in range(number):
        found.append(searcher.suggest(str(index)))
        searcher.on_trial_complete(str(index), {"reward": 0.0})
    return [tuple(each[group] for group in GROUPS) for each in found]


def test_annealing_starts_from_the_papers_ratios_too_where_it_has_some(tmp_path, sdxl_folder):
    overrides = ("model=sdxl", f"model.path='{sdxl_folder}'", "reward=shapes", "prompts=shapes")
    here = plan(tmp_path, *overrides, "res=480x360")
    other = plan(tmp_path, *overrides, "res=480x368")
    without = plan(tmp_path, *overrides, "res=480x360", "searcher.start_from_paper=false")

    assert starts(here.searcher, 2) == [(0.3, 0.3, 0.3), (0.434, 0.428, 0.355)]
    assert starts(other.searcher, 2)[1] != (0.434, 0.428, 0.355)
    assert starts(without.searcher, 2)[1] != (0.434, 0.428, 0.355)


def test_the_size_that_sdxl_is_told_is_part_of_the_recipe(tmp_path, sdxl_folder):
    overrides = ("model=sdxl", f"model.path='{sdxl_folder}'", "res=16x24")
    overrides += ("reward=shapes", "prompts=shapes")
    requested = plan(tmp_path, *overrides)
    native = plan(tmp_path, *overrides, "render.size_conditioning=native")

    assert (requested.recipe.size_conditioning, native.recipe.size_conditioning) == (
        "requested",
        "1024x1024",
    )
    assert requested.key != native.key


def test_a_plan_writes_nothing_but_an_empty_ledger(tmp_path):
    plan(tmp_path)

    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
