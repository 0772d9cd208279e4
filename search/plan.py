"""A search, checked and ready to run: what is drawn, on which prompts, under which searcher."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
from dataclasses import dataclass
from typing import Any

from ray.tune.search import Searcher

from crdiff_core.errors import ModelError, PromptError
from crdiff_core.models import Model
from crdiff_core.prompts import PromptSet, read_texts, shipped_texts, split_prompts
from crdiff_core.ratios import BlockRatios
from crdiff_core.rewards import Reward, load_reward
from search.annealing import space_filling
from search.baselines import baseline
from search.batching import batch_length
from search.budget import Budget
from search.comparison import freshness
from search.config import AnnealingSettings, Config, ConfigError
from search.evaluation_search import EvaluationSearch
from search.ledger import Ledger, Recipe
from search.pictures import Pictures
from search.racing import Race
from search.runs import read_record
from search.searchers import AnnealingSearch
from search.space import Candidate, Space
from search.storage import Storage

# Where a run's folder keeps its results under other settings.
EARLIER = "earlier"


@dataclass(frozen=True)
class Plan:
    """One search with its folder, model, reward, prompts, ledger and searcher.

    key: names the search: a digest of all that decides its course, but not of where it ends.
    Making a plan checks all that can be checked without loading the model, draws nothing and
    writes nothing but an empty ledger folder.
    """

    config: Config
    folder: Storage
    key: str
    model: Model
    recipe: Recipe
    reward: Reward
    prompt_sets: dict[str, PromptSet]
    ledger: Ledger
    searcher: Searcher
    search: EvaluationSearch

    @classmethod
    def make(cls, config: Config) -> Plan:
        """Raise a CRDiffError, in one line, for whatever would make the search fail later."""
        model = config.model.model()
        model.check()
        model.check_resolution(config.res)
        if config.render.size_conditioning == "native" and not model.is_size_conditioned:
            raise ConfigError(
                f"render.size_conditioning=native: {model.name} is not told a picture's size, "
                "only SDXL is: leave it at requested"
            )
        reward = load_reward(config.reward.name, **reward_options(config))
        recipe = _recipe(config, model, reward)
        prompt_sets = choose_prompts(config)
        reward.check([each.text for prompts in prompt_sets.values() for each in prompts.prompts])
        folder = folder_of(config)
        cell = folder.parent
        key = _key(config, recipe, prompt_sets)
        record = read_record(folder)
        if record.get("key") != key:
            record = {}
        # All searches of a cell share its ledger. Those with batches of one length draw a triple
        # once for all of them.
        ledger = Ledger(
            cell / "ledger",
            run=key,
            retry_failed=config.trial.retry_failed,
            own_batch_size=config.model.batch_size,
        )
        recorded = record.get("batch_size")
        batch_size = _batch_size(config, recorded)
        race = _race(config, batch_size)
        space = Space(config.space.bounds, config.poa_weight)
        searcher = _searcher(config, space, race)
        keeps_pictures = config.report.pictures > 0
        search = EvaluationSearch(
            searcher,
            space=space,
            prompt_sets=prompt_sets,
            recipe=recipe,
            ledger=ledger,
            budget=Budget(**config.budget.model_dump()),
            batch_size=batch_size,
            num_fit=recorded or 0 if record.get("is_batch_settled") else 0,
            shrinks=config.render.batch_size == "auto",
            race=race,
            rerank_top=config.rerank.top,
            rerank_off_path=config.rerank.off_path,
            max_failures=config.trial.max_failures,
            ahead=record.get("ahead"),
            warm_start=_warm_start(config, ledger, record),
            pictures=Pictures(cell / "pictures") if keeps_pictures else None,
            num_shown=config.report.pictures,
            native=_native(config, model),
            gpus_per_trial=config.cluster.gpus_per_trial,
            earlier_wall_s=record.get("wall_s", 0.0),
        )
        return cls(
            config, folder, key, model, recipe, reward, prompt_sets, ledger, searcher, search
        )

    def freshness(self, name: str) -> str:
        """Say what the prompts of a set are to those that are searched with."""
        return freshness(self.prompt_sets[name].texts, self.prompt_sets["search"].texts)


def _native(config: Config, model: Model) -> str | None:
    """Return the size of the model's own area that a user would draw at and resize; None: none."""
    size = config.res.scaled_to(config.model.native_res)
    try:
        model.check_resolution(size)
    except ModelError:
        return None
    return None if size == config.res else str(size)


def _recipe(config: Config, model: Model, reward: Reward) -> Recipe:
    is_native = config.render.size_conditioning == "native"
    return Recipe(
        model=model.name,
        revision=model.revision,
        height=config.res.height,
        width=config.res.width,
        dtype=model.dtype,
        scheduler=model.scheduler,
        num_steps=config.render.num_steps,
        guidance_scale=config.render.guidance_scale,
        poa_weight=config.poa_weight,
        reward=reward.name,
        reward_version=reward.version,
        size_conditioning=str(config.model.native_res) if is_native else "requested",
        negative_prompt=config.render.negative_prompt,
    )


def _batch_size(config: Config, recorded: int | None) -> int:
    """Return how many prompts are drawn at once; recorded: what auto came to in this search."""
    asked_for = config.render.batch_size
    return asked_for if asked_for != "auto" else recorded or _auto_batch_size(config)


def _auto_batch_size(config: Config) -> int:
    """Return what auto comes to where there is memory enough."""
    own, racing = config.model.batch_size, config.racing
    return min(own, racing.stride) if racing.name == "on" else own


def _race(config: Config, batch_size: int) -> Race | None:
    racing, num_prompts = config.racing, config.prompts.search
    if racing.name == "off":
        return None
    length = batch_length(num_prompts, batch_size)
    stride = math.ceil(racing.stride / length) * length
    if stride >= num_prompts:
        raise ConfigError(
            f"racing.stride={racing.stride}: an evaluation of prompts.search={num_prompts}, "
            f"{length} drawn at once, is over before it is looked at: lower the stride or "
            "render.batch_size, or raise prompts.search"
        )
    return Race(racing.alpha, stride)


def _warm_start(config: Config, ledger: Ledger, record: dict[str, Any]) -> tuple[Candidate, ...]:
    if not config.searcher.warm_start:
        return ()
    known = record.get("warm_start")
    if known is None:
        return tuple(dict.fromkeys(ledger.candidates.values()))
    # What there was when the search began: what came later would change its course.
    return tuple(Candidate(BlockRatios(*ratios), weight) for *ratios, weight in known)


def reward_options(config: Config) -> dict[str, Any]:
    """Return the options of the reward's own."""
    return config.reward.model_dump(exclude={"name"})


def choose_prompts(config: Config) -> dict[str, PromptSet]:
    """Return the disjoint search, rerank and validation sets. Raises PromptError."""
    prompts = config.prompts
    sizes = {name: getattr(prompts, name) for name in ("search", "rerank", "validation")}
    repeat = prompts.repeat or bool(prompts.text)
    if prompts.name == "coco" and not os.path.isfile(prompts.path) and not prompts.text:
        raise PromptError(
            f"{prompts.path or 'prompts.path'} is not there: make it with python -m "
            "crdiff_core.prompts coco --captions captions_val2014.json, and set prompts.path to it"
        )
    if prompts.text:
        texts, source = [prompts.text], "prompts.text"
    elif prompts.path:
        texts, source = sorted(set(read_texts(prompts.path))), prompts.path
        random.Random(prompts.seed).shuffle(texts)
    elif prompts.name == "shapes":
        from crdiff_core.shapes.grammar import captions, scenes_of

        num_held_out = len(scenes_of(held_out=True))
        texts = captions(min(sum(sizes.values()), num_held_out), prompts.seed)
        source = "the shapes grammar"
    else:
        texts, source = shipped_texts(prompts.name), f"the list {prompts.name}"
        random.Random(prompts.seed).shuffle(texts)
    return split_prompts(texts, sizes, prompts.seed, source, repeat, prompts.shared_noise)


def _key(config: Config, recipe: Recipe, prompt_sets: dict[str, PromptSet]) -> str:
    # How far ahead of its steps annealing evaluates changes none of them.
    parts: dict[str, Any] = {
        # It was part of the search's key from the first.
        "recipe": recipe.parts | {"size_conditioning": recipe.size_conditioning},
        "searcher": config.searcher.model_dump(mode="json", exclude={"speculation"}),
        "space": config.space.bounds,
        # Which bound, too: another one stops other evaluations.
        "racing": {**config.racing.model_dump(mode="json"), "bound": "betting"}
        if config.racing.name == "on"
        else None,
        "seed": config.seed,
        "prompts": {name: prompts.digest for name, prompts in prompt_sets.items()},
        "rerank": config.rerank.model_dump(mode="json"),
    }
    # What auto comes to for want of memory makes no other search of it.
    parts["batch_size"] = [config.render.batch_size, _auto_batch_size(config)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def folder_of(config: Config) -> Storage:
    """Return the folder of a search, within that of its cell: a model at a resolution."""
    cell = Storage.at(config.output) / f"{config.model.name}_{config.res}"
    return cell / _folder_name(config)


def _folder_name(config: Config) -> str:
    """Name a search by its searcher and seed, and what else makes it a search of its own."""
    parts: list[str] = [config.searcher.name]
    parts += ["uniform"] if config.space.name == "uniform" else []
    parts += ["poa"] if config.space.poa_weight is not None else []
    parts += ["racing"] if config.racing.name == "on" else []
    parts += ["warm"] if config.searcher.warm_start else []
    chains = getattr(config.searcher, "chains", 1)
    parts += [f"{chains}chains"] if chains > 1 else []
    return "-".join([*parts, f"seed{config.seed}"])


def _searcher(config: Config, space: Space, race: Race | None) -> Searcher:
    settings, num_steps = config.searcher, config.budget.steps
    if not isinstance(settings, AnnealingSettings):
        if settings.name == "grid" and num_steps < 2 ** len(space.bounds):
            raise ConfigError(
                f"budget.steps={num_steps}: a grid has {2 ** len(space.bounds)} corners: raise it"
            )
        return baseline(settings.name, space.bounds, config.seed, num_evaluations=num_steps)
    seeds = list(settings.seeds)
    of_paper = config.model.paper_ratios.get(str(config.res))
    if settings.start_from_paper and of_paper is not None and of_paper not in seeds:
        seeds.append(of_paper)
    starts = [space.start(seed) for seed in seeds]
    fill = space_filling(tuple(space.bounds.values()), settings.space_filling)
    starts += [dict(zip(space.bounds, point, strict=True)) for point in fill]
    own = {"name", "warm_start", "speculation", "chains"}
    own |= {"seeds", "space_filling", "start_from_paper"}
    return AnnealingSearch(
        space.bounds,
        seed=config.seed,
        max_steps=num_steps,
        seeds=starts[:num_steps],
        speculation=settings.speculation,
        chains=settings.chains,
        race=race,
        **settings.model_dump(exclude=own),
    )
