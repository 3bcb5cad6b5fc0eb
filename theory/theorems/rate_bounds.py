"""Which theorem of `theory.theorems.bounds` bounds which line of the convergence experiment.

    Mix, ALRIGHT               T1     all three iterates, on G_Mix
    MAXRIGHT exact             T2     all three, on G_Max; with unscaled steps the averages,
                                      by the factor max(lam, 1 - lam)
    MAXRIGHT fresh             T3     the averages: the rate plus sigma / 2, sigma over the ball
    MAXRIGHT same              T4     all three: the rate plus sigma / 2, sigma at theta* alone
    MAXRIGHT stale k           T5     the weighted average, for decaying steps: `staleness`

T2's factor carries over to the uniform average, because each term that its proof adds up is
bounded by itself. T3's does as well, its bias being the same at each step; T4 is T2 for another
convex function. Sequential training, averaged values, and unscaled steps on imperfect values have
no bound here.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from theory.optima import ProblemOptima
from theory.problems import Problem
from theory.randomness import BLOCK
from theory.schedulers import objective_weights
from theory.simulate import StepSize
from theory.tasks import Task
from theory.theorems import bounds
from theory.values import SAMPLE_STREAMS

Array = NDArray[np.float64]

RATES: dict[str, Callable[[bounds.Descent], float]] = {
    "last": bounds.last_iterate,
    "uniform": bounds.uniform_average,
    "weighted": bounds.weighted_average,
}
AVERAGES = ("uniform", "weighted")
BOUNDED: dict[str, tuple[str, tuple[str, ...]]] = {
    "mix": ("mix", tuple(RATES)),
    "alright": ("alright", tuple(RATES)),
    "exact": ("maxright_scaled", tuple(RATES)),
    "exact unscaled": ("maxright_unscaled", AVERAGES),
    "fresh": ("maxright_scaled", AVERAGES),
    "same": ("maxright_same", tuple(RATES)),
    "stale": ("maxright_scaled", ("weighted",)),
}
"""Method -> (its constants in `bounds.METHODS`, the iterates that its theorem covers)."""


def bound_curve(
    optima: ProblemOptima, lam: float, method: str, iterate: str, steps: NDArray[np.int64]
) -> Array | None:
    """The bound on the mean gap at each of `steps` for alpha_t = step_scale / sqrt(t), or None.

    `method` is a name of `convergence_experiment.methods`; "stale k=inf" never refreshes again.
    """
    kind, _, period = method.partition(" k=")
    if kind not in BOUNDED or iterate not in BOUNDED[kind][1] or period.endswith("unscaled"):
        return None
    step_size = StepSize(optima.problem.step_scale)
    descents = [
        bounds.descent(optima, BOUNDED[kind][0], lam, step_size, int(step)) for step in steps
    ]
    rate = np.array([RATES[iterate](descent) for descent in descents])
    if kind == "exact unscaled":
        return max(lam, 1.0 - lam) * rate
    if kind == "fresh":
        return rate + bounds.fresh_bias(choice_noise_on_ball(optima.problem, lam))
    if kind == "same":
        return rate + bounds.same_batch_bias(choice_noise(optima, lam))
    if kind == "stale":
        refresh_every = int(steps[-1]) if period == "inf" else int(period)
        return rate + descents[0].norm ** 2 * staleness(steps, step_size, refresh_every)
    return rate


def staleness(steps: NDArray[np.int64], step_size: StepSize, refresh_every: int) -> Array:
    """T5 for any step sizes: what stale values add to the weighted average's rate, over M^2.

    sum_t alpha_t (A_t - A_s(t) + alpha_{t-1} [t > s(t)]) / sum_t alpha_t at each T of `steps`, with
    A_t = sum_{r<t} alpha_r and s(t) <= t the last refresh. Proof: if t > s(t), one of the known
    values is that of step t - 1 and the other not older than s(t); h_i is w_i M_i-Lipschitz and
    step r moves alpha_r M at most in mean, so the chosen h_i lies below f_Max(theta_t) by at most
    M^2 times the bracket. Constant alpha gives `bounds.stale_average` where k divides T.
    """
    t = np.arange(int(steps[-1]))
    alpha = step_size(t + 1)
    path = np.cumsum(alpha) - alpha
    refreshed = t - t % refresh_every
    age = path - path[refreshed] + np.where(t > refreshed, alpha[t - 1], 0.0)
    return (np.cumsum(alpha * age) / np.cumsum(alpha))[steps - 1]


def choice_noise(optima: ProblemOptima, lam: float) -> float:
    """sigma of h_1^ - h_2^ from one sample each, at the minimiser of f_Max."""
    spread = loss_spread(optima.problem, optima.max(lam).theta)
    return float(np.linalg.norm(objective_weights(lam) * spread))


def choice_noise_on_ball(problem: Problem, lam: float) -> float:
    """A bound of sigma on the whole ball: sd f_i(theta) <= sd f_i(theta_0) + M_i R.

    Minkowski's inequality along the segment from the centre, with E|g_i|^2 <= M_i^2.
    """
    norms = np.array([f.constants(problem.radius).gradient_norm for f in problem.objectives])
    spread = loss_spread(problem, np.zeros(problem.dim)) + norms * problem.radius
    return float(np.linalg.norm(objective_weights(lam) * spread))


def loss_spread(problem: Problem, theta: Array, blocks: int = 16) -> Array:
    """Standard deviations (2,) of the sample losses at theta, from `blocks` x 1024 samples."""
    losses = [[_losses(problem, theta, task, b) for b in range(blocks)] for task in Task]
    return np.std(np.reshape(losses, (2, -1)), axis=1, ddof=1)


def _losses(problem: Problem, theta: Array, task: Task, block: int) -> Array:
    """Losses of the BLOCK samples of one block of seed 0: each sample poses as a run of its own."""
    objective = problem.objectives[task]
    draws = objective.draws((0,), SAMPLE_STREAMS[task], block)
    losses, out = np.empty((BLOCK, 2)), np.zeros((BLOCK, problem.dim))
    points = np.tile(theta, (BLOCK, 1))
    samples = np.ascontiguousarray(draws.swapaxes(0, 1))
    objective.add_stochastic_gradient(
        points, np.ones((BLOCK, 2)), task, samples, np.arange(BLOCK), 0, out, losses
    )
    return losses[:, task]
