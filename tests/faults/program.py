"""`python -m search.run` with rewards by a formula: what drawing costs is no subject here."""

import hashlib
import json
import math
import os
import signal
import sys
import time
from types import SimpleNamespace

from ray import cloudpickle

from search.trial import RatioTrial


def reward_of(ratios, prompt):
    """A smooth optimum, plus noise: dense is at 0, and no two rewards are equal."""
    distance = sum((x - y) ** 2 for x, y in zip(ratios, (0.6, 0.3, 0.4), strict=True))
    word = int(hashlib.sha256(f"{ratios} {prompt}".encode()).hexdigest(), 16)
    return math.exp(-distance / 0.1) + 0.05 * (word / 2**256 - 0.5)


class Analytic(RatioTrial):
    """A worker that notes each batch in the file `begun`, and dies of what is `lethal`.

    holds:   a folder; while it has a file 6, no batch from the sixth on is finished.
    batch_s: seconds that a batch takes; load_s: that a worker's first takes more.
    """

    begun: str
    holds: str
    lethal: list | None
    batch_s: float
    load_s: float
    is_first = True

    def step(self):
        ratios = list(self.config["ratios"].values())
        prompts = [f"{self.config['prompts']} {number}" for number in self.config["batch"]]
        with open(self.begun, "a") as file:  # In one write, so that no other's comes between.
            file.write(json.dumps([ratios, prompts]) + "\n")
        time.sleep(self.batch_s + self.load_s * self.is_first)
        self.is_first = False
        while self._is_held():
            time.sleep(0.02)
        if self.lethal == [ratios, prompts]:
            os.kill(os.getpid(), signal.SIGKILL)
        measured = SimpleNamespace(
            rewards=tuple(reward_of(ratios, prompt) for prompt in prompts),
            sparsity=self.config["ratios"],
            seconds={"render": self.batch_s},
            batch_size=len(prompts),
            memory_gib=None,
            pictures={},
        )
        return {"measured": measured, "done": True}

    def _is_held(self):
        with open(self.begun) as file:
            num_begun = len(file.readlines())
        return any(num_begun >= int(number) for number in os.listdir(self.holds))


def run(arguments, environment, log, worker):
    """Be `python -m search.run ARGUMENTS`, which prints to the file `log`.

    worker: what an Analytic has.
    """
    import search.driver
    from search.run import main

    with open(log, "a") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.environ |= environment
    for name, value in worker.items():
        setattr(Analytic, name, value)
    # So that workers need neither this module nor what the tests import.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    search.driver.RatioTrial = Analytic
    sys.argv[1:] = arguments
    sys.exit(main())
