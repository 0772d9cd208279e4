"""A plan: which prompts, seeds and options the settings come to."""

import hashlib
import json
from dataclasses import replace

import pytest

from crdiff_core.evaluation import Measurement
from crdiff_core.ratios import GROUPS, BlockRatios
from search.config import ConfigError
from search.driver import _begin_folder as begin_folder
from search.ledger import Ledger
from search.plan import Plan, choose_prompts
from search.runs import RUN_FILE
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


@pytest.fixture
def image_reward(tmp_path):
    """Settings of an ImageReward whose files are there: a plan only asks which they are."""
    (tmp_path / "ImageReward.pt").write_bytes(b"weights")
    (tmp_path / "vocab.txt").write_bytes(b"words")
    path, tokenizer = tmp_path / "ImageReward.pt", tmp_path
    return ("reward=image_reward", f"reward.path='{path}'", f"reward.tokenizer='{tokenizer}'")


def test_what_of_a_picture_the_reward_sees_is_part_of_every_key(tmp_path, image_reward):
    squashed = plan(tmp_path, *image_reward)
    cropped = plan(tmp_path, *image_reward, "reward.resize=none")

    assert squashed.key != cropped.key
    keys = {each.recipe.key(BlockRatios(0.1, 0.2, 0.3)) for each in (squashed, cropped)}
    assert len(keys) == 2


def test_without_a_resize_the_reward_is_that_of_ledgers_from_before_there_was_one(
    tmp_path, image_reward
):
    recipe = plan(tmp_path, *image_reward, "reward.resize=none").recipe
    weights, words = (hashlib.sha256(each).hexdigest() for each in (b"weights", b"words"))

    assert (recipe.reward, recipe.reward_version) == (
        "image_reward",
        f"v1.0-{weights[:12]}-{words[:8]}",
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


def test_the_negative_prompt_is_part_of_the_recipe(tmp_path):
    own, empty = plan(tmp_path), plan(tmp_path, "render.negative_prompt=''")

    assert (own.recipe.negative_prompt, empty.recipe.negative_prompt) == (None, "")
    assert own.key != empty.key


def test_the_references_prompts_are_drawn_from_one_noise():
    prompts = choose_prompts(composed("prompts=reference"))["search"].prompts

    assert [prompt.seed for prompt in prompts] == [24432, 24432]
    assert len({prompt.text for prompt in prompts}) == 2


def test_a_plan_writes_nothing_but_an_empty_ledger(tmp_path):
    plan(tmp_path)

    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ((), "annealing-seed0"),
        (("searcher=gp", "seed=3"), "gp-seed3"),
        (("racing=on", "racing.stride=2", "space=uniform"), "annealing-uniform-racing-seed0"),
        (("space.poa_weight=[1,2]", "searcher.warm_start=true"), "annealing-poa-warm-seed0"),
    ],
)
def test_searches_that_differ_in_more_than_where_they_end_have_folders_of_their_own(
    tmp_path, overrides, name
):
    assert plan(tmp_path, *overrides).folder.name == name


@pytest.mark.parametrize(
    "override", ["budget.steps=70", "budget.pictures=9000", "searcher.speculation=off"]
)
def test_where_a_search_ends_and_how_far_it_looks_ahead_do_not_change_its_key(tmp_path, override):
    assert plan(tmp_path, override).key == plan(tmp_path).key


@pytest.mark.parametrize(
    "override",
    ["searcher.lag=2", "racing=on racing.stride=2", "space.up=[0.1,0.5]", "searcher.chains=2"],
)
def test_what_changes_the_course_of_a_search_changes_its_key(tmp_path, override):
    assert plan(tmp_path, *override.split()).key != plan(tmp_path).key


def test_a_race_that_would_never_be_looked_at_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"racing\.stride=4: .* raise prompts\.search"):
        plan(tmp_path, "racing=on", "racing.stride=4")


def test_a_warm_start_is_what_there_was_when_the_search_began(tmp_path):
    cold = plan(tmp_path, "searcher=random", "budget.steps=4")
    prompts = cold.prompt_sets["search"].prompts

    def evaluate(down):
        ratios = BlockRatios(down, 0.3, 0.3)
        measured = Measurement((0.5,) * 4, ratios.as_dict(), {"render": 1.0}, 4)
        recipe = replace(cold.recipe, batch_size=4)
        Ledger(cold.folder.parent / "ledger").append(recipe, ratios, prompts, measured)

    warm = ("searcher=tpe", "searcher.warm_start=true")
    evaluate(0.4)
    first = plan(tmp_path, *warm)
    first.folder.make()
    begin_folder(first, "command")
    evaluate(0.5)
    again = plan(tmp_path, *warm)

    assert [each.ratios.down for each in first.search.warm_start] == [0.4]
    assert again.search.warm_start == first.search.warm_start


# --- the batch size ------------------------------------------------------------------------------


def recorded(made, batch_size):
    made.folder.make()
    made.folder.write(RUN_FILE, json.dumps({"key": made.key, "batch_size": batch_size}).encode())


def test_a_model_has_its_own_batch_size(tmp_path, sdxl_folder):
    sdxl = ("model=sdxl", f"model.path='{sdxl_folder}'", "reward=shapes", "prompts=shapes")

    assert plan(tmp_path).search.batch_size == 16
    assert plan(tmp_path, *sdxl, "res=16x24").search.batch_size == 4


def test_what_auto_came_to_is_kept_for_the_search_and_no_other_search_by_it(tmp_path):
    first = plan(tmp_path)
    recorded(first, 2)

    assert plan(tmp_path).search.batch_size == 2
    assert plan(tmp_path).key == first.key
    assert plan(tmp_path, "render.batch_size=3").search.batch_size == 3
    assert plan(tmp_path, "seed=1").search.batch_size == 16


def test_a_batch_size_that_is_asked_for_is_another_search(tmp_path):
    """Even the one that auto begins with: auto may come to fewer."""
    asked = ((), ("render.batch_size=16",), ("render.batch_size=8",), ("model.batch_size=8",))

    assert len({plan(tmp_path, *overrides).key for overrides in asked}) == len(asked)


@pytest.mark.parametrize(
    ("overrides", "batch_size", "stride"),
    [
        ((), 8, 8),
        (("racing.stride=3",), 3, 3),
        (("render.batch_size=5",), 5, 10),
        # 12 in a batch of the 24.
        (("render.batch_size=16",), 16, 12),
    ],
)
def test_a_race_is_looked_at_after_whole_batches(tmp_path, overrides, batch_size, stride):
    made = plan(tmp_path, "racing=on", "prompts.search=24", *overrides)

    assert made.search.batch_size == batch_size
    assert made.searcher.race.stride == stride


def test_a_race_of_one_batch_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"prompts\.search=24, 24 drawn at once, is over before"):
        plan(tmp_path, "racing=on", "prompts.search=24", "render.batch_size=32")
