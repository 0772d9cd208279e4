"""A search, checked and ready to run: what is drawn, on which prompts, under which searcher."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from ray.tune.search import Searcher

from crdiff_core.errors import PromptError
from crdiff_core.models import Model
from crdiff_core.prompts import PromptSet, read_texts, shipped_texts, split_prompts
from crdiff_core.ratios import GROUPS
from crdiff_core.rewards import Reward, load_reward
from search.config import AnnealingSettings, Config, ConfigError
from search.evaluations import Budget, EvaluationSearch
from search.ledger import Ledger, Recipe
from search.searchers import AnnealingSearch, random_search

RUN_FILE = "run.json"
# Where a run's folder keeps its results under other settings.
EARLIER = "earlier"
# More pictures at once gain nothing further.
MAX_AUTO_BATCH = 16


@dataclass(frozen=True)
class Plan:
    """One search with its folder, model, reward, prompts, ledger and searcher.

    Making a plan checks all that can be checked without loading the model, draws nothing and
    writes nothing but an empty ledger folder.
    """

    config: Config
    folder: Path
    model: Model
    recipe: Recipe
    reward: Reward
    prompt_sets: dict[str, PromptSet]
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
            size_conditioning=(
                str(config.model.native_res)
                if config.render.size_conditioning == "native"
                else "requested"
            ),
        )
        prompt_sets = choose_prompts(config)
        reward.check([each.text for prompts in prompt_sets.values() for each in prompts.prompts])
        cell = Path(config.output).absolute() / f"{model.name}_{config.res}"
        folder = cell / f"{config.searcher.name}-seed{config.seed}"
        searcher = _searcher(config)
        search = EvaluationSearch(
            searcher,
            prompt_sets=prompt_sets,
            recipe=recipe,
            # All searches of a cell share its ledger: a triple is drawn once for all of them.
            ledger=Ledger(cell / "ledger", retry_failed=config.trial.retry_failed),
            batch_size=config.render.batch_size or _recorded_batch_size(folder),
            budget=Budget(
                config.searcher.max_evaluations, config.rerank.top, config.trial.max_failures
            ),
        )
        return cls(config, folder, model, recipe, reward, prompt_sets, searcher, search)

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


def reward_options(config: Config) -> dict[str, str]:
    """Return the options of the reward's own."""
    return config.reward.model_dump(exclude={"name"})


def choose_prompts(config: Config) -> dict[str, PromptSet]:
    """Return the disjoint search, rerank and validation sets. Raises PromptError."""
    prompts = config.prompts
    sizes = {name: getattr(prompts, name) for name in ("search", "rerank", "validation")}
    repeat = prompts.repeat or bool(prompts.text)
    if prompts.name == "coco" and not Path(prompts.path).is_file() and not prompts.text:
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
    return split_prompts(texts, sizes, prompts.seed, source, repeat)


def _searcher(config: Config) -> Searcher:
    settings = config.searcher
    space = {str(group): settings.bounds.space[group] for group in GROUPS}
    if not isinstance(settings, AnnealingSettings):
        return random_search(space, config.seed)
    seeds = list(settings.seeds)
    of_paper = config.model.paper_ratios.get(str(config.res))
    if settings.start_from_paper and of_paper is not None and of_paper not in seeds:
        seeds.append(of_paper)
    seeds = seeds[: settings.max_evaluations]
    own = {"name", "bounds", "max_evaluations", "seeds", "start_from_paper"}
    return AnnealingSearch(
        space,
        seed=config.seed,
        max_evaluations=settings.max_evaluations,
        seeds=[dict(zip(GROUPS, seed, strict=True)) for seed in seeds],
        **settings.model_dump(exclude=own),
    )


def _recorded_batch_size(folder: Path) -> int | None:
    """Return the batch size that this run had before, if it is recorded."""
    try:
        recorded = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))["batch_size"]
        return None if recorded is None else max(1, int(recorded))
    except (OSError, ValueError, KeyError, TypeError):
        return None
