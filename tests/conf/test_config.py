from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

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
    assert getattr(composed(f"{group}={name}"), group).name == name


def test_the_defaults_of_annealing_are_the_reference_implementations():
    searcher = composed("searcher.max_evaluations=120").searcher

    assert searcher.seeds == ((0.3, 0.3, 0.3),)
    assert (searcher.initial_temperature, searcher.cooling, searcher.max_evaluations) == (
        0.1,
        0.95,
        120,
    )
    assert (searcher.step_size, searcher.min_step_size, searcher.patience) == (0.10, 0.005, 24)
    assert (searcher.reheat_above, searcher.reheat_factor, searcher.max_reheats) == (0.8, 1.5, 3)
    assert (searcher.restart_step_factor, searcher.max_restarts) == (3.0, 2)


def test_conf_has_the_chains_own_defaults():
    from search.annealing import Annealing

    defaults = Annealing(bounds=(), seeds=())
    searcher = composed().searcher.model_dump()
    shared = set(searcher) & set(vars(defaults)) - {"bounds", "seeds"}

    assert len(shared) == 11
    assert {name: searcher[name] for name in shared} == {
        name: getattr(defaults, name) for name in shared
    }


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


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("searcher.bounds.up=[0.1,1.0]", "searcher.bounds.up.1: input should be less than 1"),
        ("searcher.bounds.up=[-0.1,0.5]", "searcher.bounds.up.0: input should be greater than"),
        ("searcher.bounds.up=[0.5,0.2]", "searcher.bounds: up is [0.5, 0.2]: give low < high"),
        ("searcher.cooling=2", "searcher.cooling: input should be less than or equal to 1"),
        ("searcher.seeds=[]", "searcher.seeds: tuple should have at least 1 item"),
        ("poa_weight=nan", "poa_weight: input should be a finite number"),
        ("res=24", "res: resolution 24 is not HEIGHTxWIDTH: write it as 480x360"),
        ("+foo=1", "foo: there is no such setting"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_the_setting(override, message):
    with pytest.raises(ConfigError) as raised:
        composed(override)

    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)
