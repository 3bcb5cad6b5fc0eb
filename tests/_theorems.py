"""What the tests of the theorems share: small runs of many seeds."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from theory.optima import ProblemOptima
from theory.problems import Problem, make_problem
from theory.schedulers import objective_weights
from theory.scheduling import Scheduler
from theory.simulate import StepSize, Trace, simulate

Array = NDArray[np.float64]

LAM = 0.3
SEEDS = tuple(range(60))
STEPS = 400
CONSTANT = StepSize(0.05, decay=False)


@cache
def optima_of(name: str) -> ProblemOptima:
    return ProblemOptima(make_problem(name))


def run(
    optima: ProblemOptima, scheduler: Scheduler, step_size: StepSize = CONSTANT, **options: object
) -> Trace:
    settings = {"num_steps": STEPS, "seeds": SEEDS, "record_steps": [STEPS]} | options
    return simulate(optima.problem, scheduler, step_size=step_size, **settings)  # type: ignore[arg-type]


def spread_at(problem: Problem, lam: float, theta: Array) -> float:
    """Standard deviation of h_1^ - h_2^ at theta, on a quadratic pair."""
    sds = [f.noise * np.linalg.norm(theta - f.center) for f in problem.objectives]  # type: ignore[attr-defined]
    return float(np.linalg.norm(objective_weights(lam) * sds))
