"""A search, checked and ready to run: what is drawn, on which prompts, under which searcher."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from ray.tune.search import Searcher

from crdiff_core.models import Model
from crdiff_core.prompts import PromptSet, read_texts, split_prompts
from crdiff_core.ratios import GROUPS
from crdiff_core.rewards import load_reward
from search.config import AnnealingSettings, Config
from search.evaluations import Budget, EvaluationSearch
from search.ledger import Ledger, Recipe
from search.searchers import AnnealingSearch, random_search

RUN_FILE = "run.json"
MAX_AUTO_BATCH = 16


@dataclass(frozen=True)
class Plan:
    """One search with its folder, model, prompts, ledger and searcher.

    Making a plan checks all that can be checked without loading the model, draws nothing and
    writes nothing but an empty ledger folder.
    """

    config: Config
    folder: Path
    model: Model
    recipe: Recipe
    prompt_sets: dict[str, PromptSet]
    batch_size: int
    searcher: Searcher
    search: EvaluationSearch

    @classmethod
    def make(cls, config: Config) -> Plan:
        """Raise a CRDiffError, in one line, for whatever would make the search fail later."""
        model = config.model.model()
        model.check_resolution(config.res)
        reward = load_reward(config.reward.name)
        recipe = Recipe(
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
        )
        prompt_sets = _prompt_sets(config)
        cell = Path(config.output).absolute() / f"{model.name}_{config.res}"
        folder = cell / f"{config.searcher.name}-seed{config.seed}"
        batch_size = _batch_size(config, folder)
        searcher = _searcher(config)
        search = EvaluationSearch(
            searcher,
            prompt_sets=prompt_sets,
            recipe=recipe,
            # All searches of a cell share its ledger: a triple is drawn once for all of them.
            ledger=Ledger(cell / "ledger", retry_failed=config.trial.retry_failed),
            batch_size=batch_size,
            budget=Budget(
                config.searcher.max_evaluations, config.rerank.top, config.trial.max_failures
            ),
        )
        return cls(config, folder, model, recipe, prompt_sets, batch_size, searcher, search)

    @cached_property
    def key(self) -> str:
        """Names the search: a digest of all that decides its course but where it ends."""
        parts = {
            "recipe": asdict(self.recipe),
            "searcher": self.config.searcher.model_dump(mode="json", exclude={"max_evaluations"}),
            "seed": self.config.seed,
            "prompts": {name: prompts.digest for name, prompts in self.prompt_sets.items()},
            "rerank_top": self.config.rerank.top,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _prompt_sets(config: Config) -> dict[str, PromptSet]:
    prompts = config.prompts
    sizes = {name: getattr(prompts, name) for name in ("search", "rerank", "validation")}
    if prompts.path:
        texts = sorted(set(read_texts(prompts.path)))
        random.Random(prompts.seed).shuffle(texts)
        source = prompts.path
    else:
        from crdiff_core.shapes.grammar import captions, scenes_of

        num_held_out = len(scenes_of(held_out=True))
        texts = captions(min(sum(sizes.values()), num_held_out), prompts.seed)
        source = "the shapes grammar"
    return split_prompts(texts, sizes, prompts.seed, source)


def _searcher(config: Config) -> Searcher:
    settings = config.searcher
    space = {str(group): settings.bounds.space[group] for group in GROUPS}
    if not isinstance(settings, AnnealingSettings):
        return random_search(space, config.seed)
    return AnnealingSearch(
        space,
        seed=config.seed,
        max_evaluations=settings.max_evaluations,
        seeds=[dict(zip(GROUPS, seed, strict=True)) for seed in settings.seeds],
        **settings.model_dump(exclude={"name", "bounds", "max_evaluations", "seeds"}),
    )


def _batch_size(config: Config, folder: Path) -> int:
    """Return the batch size given, else the one this run had before, else a new choice."""
    if config.render.batch_size is not None:
        return config.render.batch_size
    try:
        return int(json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))["batch_size"])
    except (OSError, ValueError, KeyError):
        num_workers = max(1, (os.cpu_count() or 1) // config.cluster.cpus_per_trial)
        return min(MAX_AUTO_BATCH, math.ceil(config.prompts.search / num_workers))
