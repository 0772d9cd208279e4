import json
import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from search.annealing import REFERENCE, Annealing
from search.config import Config, ConfigError
from search.run import CONF

GROUPS = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir())
OPTIONS = sorted((file.parent.name, file.stem) for file in CONF.glob("*/*.yaml"))


def composed(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        raw = compose("config", list(overrides))
    return Config.parse(OmegaConf.to_container(raw, resolve=True))


@pytest.mark.parametrize(("group", "name"), OPTIONS)
def test_every_option_composes(group, name):
    config = composed(f"{group}={name}")
    if group != "experiment":  # An experiment sets others and is none itself.
        assert getattr(config, group).name == name


TABLES = Path(__file__).parent / "paper_cells.json"
CELLS = [
    (cell["model"], f"{cell['height']}x{cell['width']}", tuple(cell["ratios"].values()))
    for cell in json.loads(TABLES.read_text())
]


@pytest.mark.parametrize(("model", "res", "ratios"), CELLS)
def test_every_cell_of_the_paper_is_in_conf_with_its_ratios(model, res, ratios):
    config = composed(f"model={model}", f"res={res}")

    assert str(config.res) == res
    assert config.model.paper_ratios[res] == ratios


def test_conf_has_the_papers_13_cells_and_no_others():
    found = [
        (model, res)
        for model in ("sdxl", "sd15", "sd21")
        for res in composed(f"model={model}").model.paper_ratios
    ]

    assert sorted(found) == sorted((model, res) for model, res, _ in CELLS)
    assert len(found) == 13


@pytest.mark.parametrize("model", ["sdxl", "sd15", "sd21"])
def test_a_real_model_brings_its_reward_and_prompts(model):
    config = composed(f"model={model}", "res=480x360")

    assert (config.reward.name, config.prompts.name) == ("image_reward", "everyday")
    assert (config.render.num_steps, config.render.guidance_scale) == (30, 7.5)


def test_what_a_model_brings_can_be_chosen_otherwise():
    config = composed("model=sdxl", "reward=image_reward_package", "prompts=coco")

    assert (config.reward.name, config.prompts.name) == ("image_reward_package", "coco")


@pytest.mark.parametrize("reward", ["image_reward", "image_reward_package"])
def test_the_reward_sees_the_whole_picture_unless_asked_not_to(reward):
    assert composed(f"reward={reward}").reward.resize == 256
    assert composed(f"reward={reward}", "reward.resize=none").reward.resize == "none"


@pytest.mark.parametrize("reward", ["image_reward", "image_reward_package"])
def test_a_run_recorded_before_the_reward_could_squash_squashed_nothing(reward):
    recorded = composed(f"reward={reward}").model_dump(mode="json")
    del recorded["reward"]["resize"]

    assert Config.parse(recorded).reward.resize == "none"


@pytest.mark.parametrize("model", ["sdxl", "sd15", "sd21"])
def test_a_real_model_is_pinned_to_a_commit(model):
    settings = composed(f"model={model}").model

    assert re.fullmatch(r"[0-9a-f]{40}", settings.hub_revision)
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", settings.hub_id)


def test_the_papers_experiment_is_the_reference_implementations_search():
    config = composed("experiment=paper", "model=sd15", "res=400x560")

    assert config.model.name == "sd15"
    assert (config.reward.name, config.prompts.name) == ("image_reward", "reference")
    assert (config.poa_weight, config.prompts.search, config.prompts.seed) == (1.0, 2, 24432)
    # The starting point and 120 proposals.
    assert (config.budget.steps, config.searcher.start_from_paper) == (121, False)
    assert (config.prompts.shared_noise, config.render.negative_prompt) == (True, "")
    assert config.space.bounds == dict.fromkeys(("down", "mid", "up"), (0.1, 0.8))
    assert config.model.dtype == "float16"


def test_the_jumps_of_restarts_are_evaluations_beside_the_steps():
    assert composed("experiment=paper").most_evaluations == 123
    assert composed("experiment=paper", "budget.steps=30").most_evaluations == 31
    assert composed("budget.steps=30").most_evaluations == 30


def test_the_defaults_of_annealing_are_the_reference_implementations():
    config = composed("searcher=annealing_paper", "budget.steps=120")
    searcher = config.searcher

    assert searcher.seeds == ((0.3, 0.3, 0.3),)
    assert (searcher.initial_temperature, searcher.cooling, config.budget.steps) == (
        0.1,
        0.95,
        120,
    )
    assert (searcher.step_size, searcher.min_step_size, searcher.patience) == (0.10, 0.005, 24)
    assert (searcher.reheat_above, searcher.reheat_factor, searcher.max_reheats) == (0.8, 1.5, 3)
    assert (searcher.restart_jump, searcher.max_restarts) == (0.30, 2)
    assert searcher.min_temperature == 0


@pytest.mark.parametrize(
    ("name", "parameters"), [("annealing", {}), ("annealing_paper", REFERENCE)]
)
def test_conf_has_the_chains_own_defaults(name, parameters):
    chains = vars(Annealing(bounds=(), seeds=(), **parameters))
    settings = composed(f"searcher={name}").searcher.model_dump()
    of_chain = set(chains) - {"bounds", "seeds", "num_steps", "known"}

    assert len(of_chain) == 14
    assert {name: settings[name] for name in of_chain} == {name: chains[name] for name in of_chain}


@pytest.mark.parametrize("file", sorted(CONF.rglob("*.yaml")), ids=lambda file: file.stem)
def test_every_file_says_what_it_is_and_has_no_target(file):
    text = Path(file).read_text()

    assert text.startswith("# ")
    assert "_target_" not in text


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        composed().seed = 3


def test_settings_survive_json():
    config = composed("res=48x32")

    assert Config.parse(config.model_dump(mode="json")) == config


def test_a_batch_size_of_earlier_versions_is_auto():
    raw = composed().model_dump(mode="json")
    raw["render"]["batch_size"] = None
    del raw["model"]["batch_size"], raw["trial"]["load_timeout_s"]

    assert Config.parse(raw).render.batch_size == "auto"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("space.up=[0.1,1.0]", "space.up.1: input should be less than 1"),
        ("space.up=[-0.1,0.5]", "space.up.0: input should be greater than"),
        ("space.up=[0.5,0.2]", "space: up is [0.5, 0.2]: give low < high"),
        ("searcher.cooling=2", "searcher.cooling: input should be less than or equal to 1"),
        ("searcher.seeds=[]", "searcher.seeds: tuple should have at least 1 item"),
        ("poa_weight=nan", "poa_weight: input should be a finite number"),
        ("poa_weight=-1", "poa_weight: input should be greater than or equal to 0"),
        ("space.poa_weight=[1,1e9]", "space.poa_weight.1: input should be less than"),
        ("res=24", "res: resolution 24 is not HEIGHTxWIDTH: write it as 480x360"),
        ("+foo=1", "foo: there is no such setting"),
        ("render.compile=fast", "render.compile: input should be 'none', 'blocks' or 'graphs'"),
        ("render.batch_size=0", "render.batch_size: got 0: give auto or a count from 1 up"),
        ("render.batch_size=true", "render.batch_size: got True: give auto or a count from 1 up"),
        ("render.size_conditioning=big", "render.size_conditioning: input should be 'requested'"),
        ("cluster.gpus_per_trial=1.5", "cluster: gpus_per_trial=1.5: Ray shares out one GPU, or"),
        ("cluster.gpu_hour_price=-1", "cluster.gpu_hour_price: input should be greater than"),
        ("reward=image_reward reward.resize=224", "reward.resize: input should be 256 or 'none'"),
        ("reward=image_reward_package reward.resize=null", "reward.resize: input should be 256"),
        ("+reward.resize=256", "reward.resize: there is no such setting"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_the_setting(override, message):
    with pytest.raises(ConfigError) as raised:
        composed(*override.split())

    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)
