"""Search for the best pruning ratios: `python -m search.run`, with --help for all settings."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from crdiff_core.errors import CRDiffError
from search.cluster import prepare_environment
from search.config import NO_SUCH_SETTING, Config, ConfigError
from search.logs import one_line, to_console

if TYPE_CHECKING:
    from search.driver import Outcome

# In a wheel conf/ lies inside the package; in a checkout, beside it.
_HERE = Path(__file__).parent
CONF = next(folder for folder in (_HERE / "conf", _HERE.parent / "conf") if folder.is_dir())

_VERBOSE = "-v"
_GRID = {"-m", "--multirun"}
# As a res: each of the paper's for the model.
_PAPER = "paper"

# Of Hydra's options those that only show something: others read or run files of anybody's.
_SHOWING = {"--help", "-h", "--cfg", "-c", "--resolve", "--package", "-p", "--info", "-i"}


@dataclass(frozen=True)
class _Composed:
    """A search that the command line asks for.

    arguments: that ask for it alone.
    """

    config: Config
    arguments: list[str]


def _compose(is_grid: bool) -> list[_Composed]:
    """Read the command line; raises HydraException, OmegaConfBaseException, ConfigError.

    Hydra only composes: run by it, a search would make its log files and report failures twice,
    and a configuration could name callbacks, which are code.
    """
    arguments = sys.argv[1:]
    for argument in arguments:
        _check_argument(argument)
    # What is written down is the same for whoever reads it, and no secret.
    OmegaConf.register_new_resolver("oc.env", _no_environment, replace=True)
    try:
        if any(argument.startswith("-") for argument in arguments):
            show = hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
            show(lambda _: None)()
            sys.exit(0)
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            return list(_expanded(arguments, [])) if is_grid else [_alone(arguments)]
    except (HydraException, OmegaConfBaseException, CRDiffError):
        raise
    except Exception as error:  # Of malformed arguments Hydra raises anything.
        raise ConfigError(
            f"{_shown(' '.join(arguments))}: {error}: write KEY=VALUE, and for a group the name "
            "of one of its choices, as in racing=on"
        ) from error


def _alone(arguments: list[str]) -> _Composed:
    composed = hydra.compose("config", arguments, return_hydra_config=True)
    if more := _more(composed, arguments):
        raise ConfigError(
            f"these settings are a search for each of {' '.join(more)}: add -m to run them all, "
            "or choose one of each"
        )
    return _Composed(_parse(composed), arguments)


def _expanded(arguments: list[str], swept: list[str]) -> Iterator[_Composed]:
    """Expand sweeps, KEY=A,B or as the experiment says, into one search for each combination.

    swept: the choices made so far, which name a search in an error.
    """
    overrides = _overrides(arguments)
    choices = [_choices(override) for override in overrides]
    for each in map(list, itertools.product(*choices)):
        chosen = [a for a, override in zip(each, overrides, strict=True) if _is_swept(override)]
        label = [*swept, *chosen]
        try:
            for argument in each:
                _check_argument(argument)
            composed = hydra.compose("config", each, return_hydra_config=True)
            more = _more(composed, each)
            if not more:
                yield _Composed(_parse(composed), each)
                continue
            keys = {_key(override) for override in _overrides(more)}
            kept = [a for a, o in zip(each, overrides, strict=True) if _key(o) not in keys]
        except (HydraException, OmegaConfBaseException, CRDiffError) as error:
            if not label:
                raise
            raise ConfigError(f"{_shown(' '.join(label))}: {_one_line(error)}") from error
        yield from _expanded([*kept, *more], [a for a in label if a in kept])


def _more(composed: DictConfig, arguments: list[str]) -> list[str]:
    """Return the sweeps of the composed settings that the arguments leave open."""
    given = {_key(override) for override in _overrides(arguments)}
    params = composed.hydra.sweeper.params or {}
    if more := [f"{key}={value}" for key, value in params.items() if key not in given]:
        return more
    if composed.get("res") != _PAPER:
        return []
    sizes = list(composed.model.paper_ratios)
    if not sizes:
        raise ConfigError(
            f"res={_PAPER}: the paper has no sizes for {composed.model.name}: give HEIGHTxWIDTH"
        )
    return [f"res={','.join(sizes)}"]


def _overrides(arguments: list[str]) -> list[Override]:
    loader = GlobalHydra.instance().config_loader()
    return OverridesParser.create(config_loader=loader).parse_overrides(arguments)


def _key(override: Override) -> str:
    return str(override.key_or_group)


def _is_swept(override: Override) -> bool:
    return bool(override.is_sweep_override())


def _choices(override: Override) -> list[str]:
    if not _is_swept(override):
        return [str(override.input_line)]
    if not override.is_discrete_sweep():
        raise ConfigError(
            f"{_shown(str(override.input_line))}: it has no end: list the values, as in seed=0,1,2"
        )
    return [f"{override.get_key_element()}={v}" for v in override.sweep_string_iterator()]


def _parse(composed: DictConfig) -> Config:
    ours = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    raw = OmegaConf.to_container(ours, resolve=True)
    assert isinstance(raw, dict)
    return Config.parse({str(key): value for key, value in raw.items()})


def _check_argument(argument: str) -> None:
    """Raise ConfigError for what would let Hydra read files or run code that are not ours."""
    key, _, value = argument.partition("=")
    if argument.startswith("-") and key not in _SHOWING:
        raise ConfigError(f"{_shown(key)}: no such option: write KEY=VALUE; --help shows them all")
    name, *packages = re.split("[@:]", key.lstrip("+~"))
    if "_target_" in argument or any(re.match(r"hydra\b", each) for each in (name, *packages)):
        raise ConfigError(
            f"{_shown(argument)}: a setting of Hydra's own can run code: leave it out; --help "
            "shows all settings"
        )
    if "/" in value and os.path.isdir(CONF / name):
        raise ConfigError(
            f"{_shown(argument)}: {name} is chosen by name, not by a path: --help shows the names"
        )


def _no_environment(*_: object) -> NoReturn:
    raise ConfigError("settings do not read the environment, because they are written down")


def _summary(outcome: Outcome) -> list[str]:
    """Say what was found, verdict first."""
    winner, dense, comparison = outcome.winner, outcome.dense, outcome.comparison
    if comparison is None:
        verdict = "not validated: a validation evaluation failed; see the ledger"
    else:
        verdict = f"{comparison.verdict}: {comparison.summary}"
    drawn = (
        f"{outcome.num_drawn} pictures drawn in this run"
        if outcome.num_drawn
        else "nothing was drawn: the ledger had every reward"
    )
    lines = [
        "",
        f"against dense   {verdict}",
        *([f"                {comparison.note}"] if comparison and comparison.note else []),
        f"best ratios     {winner.ratios}  (down / mid / up){_weight(outcome)}{_chosen(outcome)}",
        f"search prompts  {winner.mean:.4f}, dense {dense.mean:.4f}, on {len(winner.prompts)}",
        f"steps           {_steps(outcome)}",
        f"pictures        {drawn}",
        f"ratios file     {outcome.ratios_file}",
        *([f"report          {outcome.report}"] if outcome.report is not None else []),
    ]
    if outcome.ended_by is not None:
        lines.insert(1, f"ended by        {outcome.ended_by}: run again with more to go on")
    if outcome.off_path is not None:
        off = outcome.off_path
        lines.append(
            f"also seen       {off.mean:.4f} on the search prompts at {off.ratios}, evaluated "
            "ahead but not on the search's way: rerank.off_path=true would let it win"
        )
    tracker = outcome.tracker
    if tracker is not None and tracker.error is not None:
        lines.append(
            f"MLflow          not filled ({tracker.error}): python -m search.sync "
            f"{shlex.quote(str(outcome.ratios_file.parent))} does it"
        )
    elif tracker is not None:
        lines.append(f"dashboard       {tracker.dashboard_command}")
    return lines


def _steps(outcome: Outcome) -> str:
    """Say how far the search went, and from where."""
    parts = [str(outcome.num_steps)]
    if outcome.num_lost:
        parts.append(f"{outcome.num_lost} of them stopped early by racing")
    if outcome.num_warm:
        parts.append(f"after {outcome.num_warm} evaluations that other searches had made")
    return ", ".join(parts)


def _weight(outcome: Outcome) -> str:
    """Name the weight of POA where the search chose it."""
    if not outcome.is_weight_searched:
        return ""
    return f" with poa_weight {outcome.winner.candidate.poa_weight:.3f}"


def _chosen(outcome: Outcome) -> str:
    """Say why the winner is not the best of the search, where it is not."""
    if outcome.num_reranked < 2:
        return ""
    return f", the best of {outcome.num_reranked} on {outcome.reranked_on}"


def _search(config: Config, console: Console) -> list[str]:
    # Ray, MLflow and Optuna take seconds to import: not for --help or a misspelt key.
    from search.driver import run
    from search.progress import Progress

    console.print(f"{config.model.name} at {config.res}, {config.searcher.name}: starting")
    progress = Progress(console, gpu_hour_price=config.cluster.gpu_hour_price)
    return _summary(run(config, _command(sys.argv[1:]), progress))


def _estimate(config: Config) -> list[str]:
    from search.estimate import estimate
    from search.plan import Plan

    print("loading the model and timing a trial ...", file=sys.stderr, flush=True)
    return estimate(Plan.make(config)).lines()


def _grid(searches: list[_Composed], console: Console, is_verbose: bool) -> int:
    """Run a search for each cell, or estimate each; return the exit code."""
    from search.grid import check, run_grid

    cells = check([(each.config, _command(each.arguments)) for each in searches])
    if not any(each.config.dry_run for each in searches):
        return run_grid(cells, _command(["-m", *sys.argv[1:]]), console, is_verbose)
    for cell in cells:
        console.print(f"{cell.name}:")
        for line in _estimate(cell.config):
            console.print(f"  {line}", markup=False)
    return 0


def _command(arguments: list[str]) -> str:
    """Return the command line that starts this search, for whoever goes on with it."""
    return shlex.join(["python", "-m", "search.run", *arguments])


def _one_line(error: Exception) -> str:
    """Say in one line what was wrong; Hydra's own messages take many."""
    return one_line(str(error) if isinstance(error, CRDiffError) else _of_hydra(error))


def _of_hydra(error: Exception) -> str:
    text = str(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return f"{group}={name} is unknown: choose one of {', '.join(error.options)}"
    ambiguous = re.search(r"Ambiguous value for argument '(.+?)'", text)
    override = ambiguous[1] if ambiguous else getattr(error, "override", None)
    if override is not None:
        grid = "add -m for a search of each, or " if ambiguous else ""
        return (
            f"{_shown(override)}: not understood: {grid}put a value with spaces or signs into "
            """both kinds of quotes, as in 'prompts.text="a cat, asleep"'"""
        )
    if match := re.search(r"Could not override '(.+?)'", text):
        return f"{match[1]}: {NO_SUCH_SETTING}"
    text = text.split("full_key")[0].split("resolving interpolation: ")[-1].strip()
    if key := getattr(error, "full_key", None):
        return f"{key}: {text}: give a value, or ${{KEY}} of another setting"
    return text


def _shown(argument: str) -> str:
    return argument if len(argument) <= 200 else f"{argument[:200]}..."


def main() -> int:
    """Run the search that the command line describes; return the exit code."""
    # Hydra then raises what it would else print over many lines.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    is_verbose, is_grid = _VERBOSE in sys.argv, not _GRID.isdisjoint(sys.argv)
    sys.argv[1:] = [each for each in sys.argv[1:] if each not in {_VERBOSE, *_GRID}]
    try:
        searches = _compose(is_grid)
        config = searches[0].config
        to_console(is_verbose)  # Hydra has set up its own.
        prepare_environment(config.cluster)
        console = Console(highlight=False, soft_wrap=True)
        if is_grid:
            return _grid(searches, console, is_verbose)
        for line in _estimate(config) if config.dry_run else _search(config, console):
            console.print(line, markup=False)
    except (HydraException, OmegaConfBaseException, CRDiffError) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        command = _command([*["-m"][: int(is_grid)], *sys.argv[1:]])
        print(f"\nStopped; nothing measured is lost. To go on: {command}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
