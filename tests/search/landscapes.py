"""Analytic rewards and a plain worker loop, to drive an EvaluationSearch without drawing."""

import hashlib
import math
import random
from collections import deque

from ray.tune.search import Searcher

from crdiff_core.evaluation import Measurement
from crdiff_core.prompts import split_prompts
from crdiff_core.ratios import GROUPS, BlockRatios
from search.baselines import baseline
from search.budget import Budget
from search.evaluation_search import EvaluationSearch
from search.ledger import Ledger, Recipe
from search.searchers import AnnealingSearch
from search.space import Space

SPACE = {group: (0.1, 0.8) for group in GROUPS}
SEEDS = [dict.fromkeys(GROUPS, 0.3)]
RECIPE = Recipe(
    model="analytic",
    revision="1",
    height=24,
    width=40,
    dtype="float32",
    scheduler="none",
    num_steps=1,
    guidance_scale=1.0,
    poa_weight=1.5,
    reward="analytic",
    reward_version="1",
)
PROMPTS = split_prompts(
    [f"prompt {i}" for i in range(30)], {"search": 7, "rerank": 8, "validation": 10}, 0, "here"
)


def reward_of(ratios, prompt):
    """A smooth optimum at (.6, .3, .4), plus noise that is each prompt's own; dense is at 0."""
    at = tuple(ratios[group] for group in GROUPS)
    distance = sum((x - y) ** 2 for x, y in zip(at, (0.6, 0.3, 0.4), strict=True))
    word = hashlib.sha256(f"{at} {prompt.text}".encode()).digest()
    return math.exp(-distance / 0.1) + 0.05 * (word[0] / 255 - 0.5)


def measure(ratios, prompts):
    """Stand in for a trial's drawing and scoring."""
    rewards = tuple(reward_of(ratios, prompt) for prompt in prompts)
    seconds = {"prune": 0.0, "render": float(len(prompts)), "score": 0.0}
    return Measurement(rewards, ratios.as_dict(), seconds, len(prompts))


def make_search(
    folder,
    searcher="annealing",
    steps=20,
    retry_failed=False,
    race=None,
    budget=None,
    annealing=None,
    batch_size=3,
    run="this",
    recipe=RECIPE,
    **arguments,
):
    """A search over `reward_of`; annealing: arguments of AnnealingSearch."""
    if searcher == "annealing":
        given = {"seed": 3, "seeds": SEEDS, "race": race} | (annealing or {})
        inner = AnnealingSearch(SPACE, max_steps=steps, **given)
    else:
        inner = baseline(searcher, SPACE, 3, num_evaluations=steps)
    return EvaluationSearch(
        inner,
        space=Space(SPACE, recipe.poa_weight),
        prompt_sets=PROMPTS,
        recipe=recipe,
        ledger=Ledger(folder, run=run, retry_failed=retry_failed),
        batch_size=batch_size,
        race=race,
        budget=Budget(steps, **(budget or {})),
        **{"ahead": 4, **arguments},
    )


def work(search, num_workers=1, outcome=None, max_trials=10_000, seed=0, clock=None):
    """Draw whatever the search hands out, on workers that finish in random order.

    clock:   has its `now` set on as pictures are drawn, a second each.
    outcome: (ratios, prompts) -> what a trial reports; by default it measures.
    Returns the number of trials that ended.
    """
    chance = random.Random(seed)
    running, count = deque(), 0
    while count < max_trials:
        while len(running) < num_workers:
            config = search.suggest(f"trial{count}-{len(running)}-{chance.random()}")
            if config is None or config == Searcher.FINISHED:
                break
            running.append((list(search._trials)[-1], config))
        if not running:
            return count
        running.rotate(chance.randrange(len(running)))
        trial_id, config = running.popleft()
        ratios = BlockRatios(**config["ratios"])
        prompts = PROMPTS[config["prompts"]].prompts
        prompts = tuple(prompts[number] for number in config["batch"])
        if clock is not None:
            clock.now += len(prompts) / num_workers
        reported = {"measured": measure(ratios, prompts)} if outcome is None else None
        search.on_trial_complete(trial_id, reported or outcome(ratios, prompts))
        count += 1
    return count


def course(search):
    """What a search did, without what may differ between runs that must agree."""
    steps = [(s.evaluation.key, s.reward, s.lost_race, s.event) for s in search.steps]
    others = [
        (e.kind, e.key, e.rewards, e.failure) for e in search.evaluations if e.kind != "search"
    ]
    return steps + sorted(others)
