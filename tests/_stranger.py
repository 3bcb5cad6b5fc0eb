"""A package of somebody else's, with a scheduler and a problem, written where a test wants it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ALGORITHM = "stranger.schedules:Turns"
SCHEDULE = '''
from dataclasses import dataclass
from theory.scheduling import Scheduler, option
from stranger import rules

@dataclass(frozen=True)
class Turns(Scheduler):
    """DPO at every n-th step, by a count of its own; a step shrinks as its memory grows."""

    every: int = option("steps between two of DPO", default=3)
    damping: float = 0.0
    loud: bool = False
    seed: int = 0

    def init(self):
        return super().init()._replace(memory={"taken": [0, 0]})

    def select(self, state, probe):
        taken = state.memory["taken"]
        weights = rules.weights(sum(taken) % self.every == 0, self.damping, taken)
        after = [n + int(w > 0.0) for n, w in zip(taken, weights)]
        return weights, state._replace(memory={"taken": after})
'''
RULES = """
import numpy as np

def weights(dpo, damping, taken):
    size = 1.0 / (1.0 + damping * sum(taken))
    return np.array([size, 0.0] if dpo else [0.0, size])
"""


def write_package(folder: Path) -> Path:
    """The package `stranger` below `folder`."""
    package = folder / "stranger"
    package.mkdir(parents=True, exist_ok=True)
    for name, text in (("__init__", ""), ("schedules", SCHEDULE), ("rules", RULES)):
        (package / f"{name}.py").write_text(text, encoding="utf-8")
    return package


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """`folder` on the path; modules that come from it are forgotten afterwards."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in [n for n in sys.modules if n.partition(".")[0] == "stranger"]:
            del sys.modules[name]
