"""The theorems on sequential and joint training: each function returns the bound it states.

Notation: theta_{t+1} = P(theta_t - alpha_t d_t) for t = 1..T, P the projection on the ball of
radius R; w = (lam, 1 - lam); delta_i = f_i - f_i*, h_i = w_i delta_i; E|g_i|^2 <= M_i^2 for the
stochastic gradients; D = |theta_1 - theta*| with theta* the minimiser of f_Mix (T1, T7) or of
f_Max = max h_i (T2 to T6). T1 to T7 bound expectations, at every T; nothing is asymptotic. What
holds to leading order, and is then an equality, stands in `theory.theorems.leading_order`.

Every rate starts from the same line: |theta_{t+1} - u|^2 <= |theta_t - u|^2
- 2 alpha_t <d_t, theta_t - u> + alpha_t^2 |d_t|^2 for u in the ball, as P is non-expansive.

The setting and the claims O(log T / sqrt T) are those of arXiv 2410.15483; constants and proofs
are given here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from theory.optima import Optimum, ProblemOptima
from theory.schedulers import objective_weights
from theory.simulate import StepSize
from theory.tasks import Task

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Descent:
    """A projected stochastic subgradient method on a convex F, as far as its rate depends on it."""

    distance: float
    """D, from the start to the minimiser of F."""
    norm: float
    """M with E|d_t|^2 <= M^2 for the steps' directions d_t."""
    step_size: StepSize
    num_steps: int
    """T, the number of steps taken."""
    reach: float = np.inf
    """No point of the ball is farther than this from the minimiser of F."""

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps}; it must be at least 1")

    def alphas(self, count: int) -> Array:
        return self.step_size(np.arange(1, count + 1))

    @property
    def constant_alpha(self) -> float:
        if self.step_size.decay:
            raise ValueError("this bound is for a constant step size")
        return self.step_size.scale


class Method(NamedTuple):
    """What an algorithm descends on, and M from w and (M_DPO, M_SFT)."""

    target: Callable[[ProblemOptima, float], Optimum]
    norm: Callable[[Array, Array], float]


METHODS: dict[str, Method] = {
    "mix": Method(ProblemOptima.mix, lambda w, m: float(w @ m)),
    "alright": Method(ProblemOptima.mix, lambda w, m: float(np.sqrt(w @ m**2))),
    "alternate": Method(ProblemOptima.mix, lambda w, m: float(w @ m)),
    "maxright_scaled": Method(ProblemOptima.max, lambda w, m: float(np.max(w * m))),
    "maxright_unscaled": Method(ProblemOptima.max, lambda w, m: float(np.max(m))),
    "maxright_same": Method(ProblemOptima.max, lambda w, m: float(np.linalg.norm(w * m))),
}
"""M of each algorithm; the theorems say why.

Mix: |w_1 g_1 + w_2 g_2| has the L2 norm M_X <= w_1 M_1 + w_2 M_2 (Minkowski). ALRIGHT: E|g|^2 <=
w_1 M_1^2 + w_2 M_2^2 = M_A^2, and M_X <= M_A (Jensen). MAXRIGHT scaled: M_s = max w_i M_i, as the
choice does not look at the step's sample. When it does (`same`), it can favour large gradients and
only sum w_i^2 M_i^2 is sure, unless the M_i bound every single sample (then M_s holds again).
"""


def descent(
    optima: ProblemOptima, method: str, lam: float, step_size: StepSize, num_steps: int
) -> Descent:
    """The constants of `method` (a key of `METHODS`) on a problem. Unknown name: ValueError."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose from {', '.join(METHODS)}")
    problem, (target, norm) = optima.problem, METHODS[method]
    theta = target(optima, lam).theta
    norms = np.array([f.constants(problem.radius).gradient_norm for f in problem.objectives])
    return Descent(
        distance=float(np.linalg.norm(problem.start - theta)),
        norm=norm(objective_weights(lam), norms),
        step_size=step_size,
        num_steps=num_steps,
        reach=problem.radius + float(np.linalg.norm(theta)),
    )


# --- T1: Mix and ALRIGHT on f_Mix; T2: MAXRIGHT with exact values, scaled steps, on f_Max


def weighted_average(d: Descent) -> float:
    """T1, T2: the alpha-weighted average of theta_1..theta_T (uniform, if alpha is constant).

    Assumption: E[d_t | theta_t] in the subdifferential of F at theta_t. For Mix and ALRIGHT F is
    f_Mix. For MAXRIGHT with exact values, w_i grad f_i of the larger h_i is a subgradient of f_Max.
    Guarantee: E F(average) - min F <= (D^2 + M^2 sum alpha_t^2) / (2 sum alpha_t).
    Proof: add up the common line with u = theta*, take expectations; Jensen.
    Constant alpha: D^2 / (2 alpha T) + alpha M^2 / 2, attained (`tests/test_pepit.py`).
    alpha = c / sqrt t: at most (D^2 + c^2 M^2 (1 + ln T)) / (4c (sqrt(T + 1) - 1)).
    Source: Nemirovski, Juditsky, Lan and Shapiro 2009, section 2.2.
    """
    alphas = d.alphas(d.num_steps)
    return float((d.distance**2 + d.norm**2 * np.sum(alphas**2)) / (2.0 * np.sum(alphas)))


def uniform_average(d: Descent) -> float:
    """T1, T2: the uniform average of theta_1..theta_T, any non-increasing alpha.

    Guarantee: E F(average) - min F <= (B^2 / alpha_T + M^2 sum alpha_t) / (2T), B = R + |theta*|;
    D in place of B if alpha is constant. For alpha = c / sqrt t at most
    (B^2 / (2c) + c M^2) / sqrt T: the logarithm of the paper's rate is removable, and B <= 2R.
    Proof: divide the common line by 2 alpha_t before adding up. The distances telescope to
    a_1^2 / (2 alpha_1) + sum_{t > 1} a_t^2 (1/alpha_t - 1/alpha_{t-1}) / 2 with
    a_t^2 = E|theta_t - theta*|^2 <= B^2, and sum 1/sqrt t <= 2 sqrt T.
    Source: Zinkevich 2003, theorem 1.
    """
    alphas = d.alphas(d.num_steps)
    reach = d.reach if d.step_size.decay else d.distance
    return float((reach**2 / alphas[-1] + d.norm**2 * np.sum(alphas)) / (2.0 * d.num_steps))


def last_iterate(d: Descent) -> float:
    """T1, T2 (scaled): theta_{T+1}, the point after T steps, any non-increasing alpha.

    Guarantee, with n = T + 1 and A_k = sum of alpha_t^2 over the last k + 1 of t = 1..n:
    alpha_n (E F(theta_n) - min F) <= (D^2 + M^2 A_{n-1}) / (2n) + sum_{k=1}^{n-1} M^2 A_k /
    (2k (k + 1)). For alpha = c / sqrt t this is (D^2 / (2c) + c M^2 (ln n + O(1))) / sqrt n,
    against (B^2 / c + c M^2)(2 + ln n) / sqrt n, B = 2R, of Shamir and Zhang 2013, theorem 2: no
    diameter enters, and the logarithm multiplies the noise alone.
    Proof: let S_k be the mean of alpha_t (F(theta_t) - min F) over the last k + 1 points. With
    s = n - k, k S_{k-1} = (k + 1) S_k - alpha_s (F(theta_s) - min F), and as alpha_t <= alpha_s,
    S_{k-1} <= S_k + (1 / (k (k + 1))) sum_{t >= s} alpha_t (F(theta_t) - F(theta_s)). The common
    line with u = theta_s, at distance 0 from theta_s, bounds that sum by M^2 A_k / 2. Unroll
    from S_{n-1}, which `weighted_average` bounds, down to S_0.
    Source: Orabona, "Last iterate of SGD converges (even in unbounded domains)", 2020.
    """
    count = d.num_steps + 1
    alphas = d.alphas(count)
    tails = np.cumsum(alphas[::-1] ** 2)
    k = np.arange(1, count)
    average = (d.distance**2 + d.norm**2 * tails[-1]) / (2.0 * count)
    drift = d.norm**2 * np.sum(tails[1:] / (2.0 * k * (k + 1.0)))
    return float((average + drift) / alphas[-1])


def unscaled_average(d: Descent, lam: float) -> float:
    """T2, unscaled steps (as in the authors' code): the alpha-weighted average on f_Max.

    Algorithm: step along g_i, i the larger of the exact h_i; M = max M_i; 0 < lam < 1.
    Guarantee: max(lam, 1 - lam) (D^2 + M^2 sum alpha_t^2) / (2 sum alpha_t).
    Proof: w_i <grad f_i, theta_t - theta*> >= h_i(theta_t) - h_i(theta*) >= G_Max(theta_t) >= 0,
    so that <grad f_i, theta_t - theta*> >= G_Max(theta_t) / max w_i. (Against a comparator other
    than theta* this may fail: `last_iterate` has no unscaled twin.)
    """
    return max(lam, 1.0 - lam) * weighted_average(d)


# --- T3 to T6: MAXRIGHT, scaled steps, with values that are not exact: a rate plus a bias

GAUSSIAN_CHOICE = 0.16998
"""max_x x Phi(-x), at x = 0.7518, rounded upwards."""


def fresh_bias(sigma: float, gaussian: bool = False) -> float:
    """T3: values from fresh samples; E G_Max(average) <= weighted_average + sigma / 2.

    Assumption: h_1^ - h_2^ has mean Delta = h_1 - h_2 and standard deviation at most sigma at
    every point of the ball, independent of the sample of the step; refreshed at every step.
    Guarantee: the bias sigma / 2, and 0.17 sigma if Gaussian. It does not vanish with T:
    `selection_limit` says where the algorithm goes instead.
    Proof: a step on the smaller h_i is an epsilon-subgradient of f_Max, epsilon = |Delta|. Hence
    the extra term is E epsilon <= |Delta| P(wrong choice) <= |Delta| sigma^2 / (sigma^2 + Delta^2)
    (Cantelli) <= sigma / 2; Gaussian: |Delta| Phi(-|Delta| / sigma) <= 0.17 sigma.
    """
    return sigma * (GAUSSIAN_CHOICE if gaussian else 0.5)


def same_batch_bias(sigma: float, gaussian: bool = False) -> float:
    """T4: the minibatch of the step selects too; E G_Max(average) <= weighted_average + sigma / 2.

    Assumption: sigma is the standard deviation of h_1^ - h_2^ at theta* alone (T3 needs it on
    the whole ball); M is that of "maxright_same" in `METHODS`.
    Guarantee: the bias sigma / 2; sigma / sqrt(2 pi) if Gaussian.
    Proof: the step is a stochastic subgradient of F = E max(h_1^, h_2^), convex, >= f_Max (Jensen).
    So G_Max(average) <= F(average) - F(theta*) + [F - f_Max](theta*): a rate, and
    E (Delta + e)_+ - Delta_+ <= (sqrt(Delta^2 + sigma^2) - |Delta|) / 2 <= sigma / 2; Gaussian:
    sigma phi(x) - |Delta| Phi(-x) with x = |Delta| / sigma, at most sigma phi(0).
    """
    return sigma * (1.0 / np.sqrt(2.0 * np.pi) if gaussian else 0.5)


def stale_average(d: Descent, refresh_every: int) -> float:
    """T5: exact values, both refreshed every k steps, in between only that of the stepped one.

    Algorithm: constant alpha, scaled steps, average of theta_1..theta_T.
    Guarantee: D^2 / (2 alpha T) + alpha M_s^2 (1/2 + b), b = (k - 1)(k + 2) / (2k); so
    D M_s sqrt((k + 2 - 2/k) / T) at the best alpha. k = 1 is T2; k = o(T) suffices; k = T has no
    guarantee. (The coarser count b = k holds for k >= 2: twice as much for large k.)
    Proof: j steps after a refresh, the value of the objective stepped last is 1 step old and the
    other at most j. If i is chosen and the other is larger, epsilon = (h_other - its known value) +
    (known value of i - h_i) + (<= 0); h_i is w_i M_i-Lipschitz and a step moves alpha M_s at most
    in mean, so E epsilon <= alpha M_s^2 (j + 1), and 0 for j = 0. b is the mean over
    j = 0..k-1; a last, incomplete cycle only lowers it.
    """
    k = refresh_every
    if k < 1:
        raise ValueError(f"refresh_every is {k}; it must be at least 1")
    staleness = (k - 1) * (k + 2) / (2 * k)
    return weighted_average(d) + d.constant_alpha * d.norm**2 * staleness


def wrong_optimum_bias(lam: float, errors: tuple[float, float], rho: float | None = None) -> float:
    """T6: values measured from f_i* + e_i; G_Max <= weighted_average + |E|, E = w_1 e_1 - w_2 e_2.

    Guarantee: the bias |E|. With the multiplier rho of h_1 at the minimiser of the shifted
    objective (`selection_limit`; D from there) the bias is (1 - rho) E if E > 0,
    else rho |E|. Equal weighted errors do no harm.
    Proof: MAXRIGHT then descends on F = max(h_1 - E, h_2) (up to a constant): a wrong choice has
    epsilon <= |E|. Sharper, for E > 0: f_Max <= F + E, and min F = min_theta rho (h_1 - E) +
    (1 - rho) h_2 <= min f_Max - rho E; so G_Max <= F - min F + (1 - rho) E.
    """
    error = float(objective_weights(lam) @ (np.array(errors) * [1.0, -1.0]))
    if rho is None:
        return abs(error)
    return (1.0 - rho) * error if error > 0.0 else -rho * error


# --- T7: blocks in turn


def cycle_average(
    d: Descent, cycle: int, starts_only: bool = True, *, lam: float | None = None
) -> float:
    """T7: cycles of n steps, lam n of them DPO; `d` from "alternate", constant alpha, T = m n.

    Guarantee: the average of the cycles' starts theta_1, theta_{n+1}, ... has
    E G_Mix <= D^2 / (2 alpha T) + alpha n M_X^2 / 2, so D M_X sqrt(n / T) at the best alpha: n = 2
    alternates, n = T is sequential and has no guarantee left. Averaging all iterates: the same
    with D + alpha n M_X for D.
    Proof: let x start a cycle and psi_j be its j-th point. f_i(psi_j) >= f_i(x) - M_i |psi_j - x|,
    and |psi_j - x| <= alpha sum_{l<j} M_{i_l} in L2; so adding up the common line over the cycle,
    |next start - theta*|^2 <= |x - theta*|^2 - 2 alpha n G_Mix(x) + alpha^2 (sum_j M_{i_j})^2 in
    mean, where sum_j M_{i_j} = n M_X. Any order inside the cycle will do; so the iterates at
    offset j are starts of the rotated cycles, at most alpha n M_X farther from theta*.
    lam n must be an integer (checked if `lam` is given). Else `Alternate` carries on what rounding
    leaves over, and its shares are whole after m n steps, with the least m that makes lam m n an
    integer: those are the cycles of the theorem, in some order inside.
    Source: Nedic and Bertsekas 2001, lemma 2.1, for exact gradients.
    """
    alpha = d.constant_alpha
    if cycle < 1 or d.num_steps % cycle:
        raise ValueError(f"cycle is {cycle}; it must divide the {d.num_steps} steps")
    if lam is not None and abs(lam * cycle - round(lam * cycle)) > 1e-9 * cycle:
        raise ValueError(f"lam times cycle is {lam * cycle:g}; T7 needs whole DPO steps")
    path = alpha * cycle * d.norm
    start = d.distance if starts_only else d.distance + path
    once = replace(d, distance=start, norm=np.sqrt(cycle) * d.norm)
    return weighted_average(once)


# --- T8: what sequential training cannot repair


def gap_from_gradient(
    gradient_norm: float, smoothness: float, strong_convexity: float, reach: float = np.inf
) -> tuple[float, float]:
    """T8: lower and upper bound of f - min f from g = |grad f| at one point.

    Guarantee: g^2 / (2L) <= f - min f <= min(g^2 / (2 mu), g reach), reach >= |theta - theta*|.
    Assumption: f is L-smooth on R^d and its minimiser lies inside the ball (lower bound; on the
    boundary it can fail); f is mu-strongly convex on the ball (upper).
    Proof: f(theta - grad f / L) <= f - g^2 / (2L); minimise the strongly convex lower model;
    convexity and Cauchy-Schwarz. mu shrinks like exp(-R) for SFT and DPO: reach then rules.
    """
    squared = gradient_norm**2 / 2.0
    curved = squared / strong_convexity if strong_convexity > 0.0 else np.inf
    return squared / smoothness, min(curved, gradient_norm * reach)


def sequential_gap(optima: ProblemOptima, last: Task, lam: float) -> tuple[float, float]:
    """T8: bounds of G_Mix at the end of sequential training, from one gradient norm.

    At theta_2*, the interior optimum of the last stage's objective, grad f_Mix = w_1 g_1 with g_1
    the gradient of the abandoned one: w_1^2 |g_1|^2 / (2 L_lam) <= G_Mix <= w_1^2 |g_1|^2 /
    (2 mu_lam), L_lam = w . L, mu_lam = w . mu. Zero iff theta_2* minimises both. O(lam^2) near
    lam = 0 if SFT is last: no lower bound is uniform in lam. ValueError if a minimiser is not
    interior. Source: the lower bound of arXiv 2410.15483, quantified.
    """
    problem, weights = optima.problem, objective_weights(lam)
    end, best = optima.single[last], optima.mix(lam)
    if not (end.interior and best.interior):
        raise ValueError("T8 needs minimisers inside the ball")
    constants = [f.constants(problem.radius) for f in problem.objectives]
    pull = weights[last.other] * problem.objectives[last.other].gradient(end.theta)
    return gap_from_gradient(
        float(np.linalg.norm(pull)),
        float(weights @ [c.smoothness for c in constants]),
        float(weights @ [c.strong_convexity for c in constants]),
        reach=problem.radius + float(np.linalg.norm(end.theta)),
    )


def crossing_lam(optima: ProblemOptima) -> float:
    """T8: lam_c, where both orders have the same limit; below it, DPO first is the better.

    lam_c = delta_2(theta_1*) / (delta_1(theta_2*) + delta_2(theta_1*)); nan without conflict.
    Proof: f_Mix(theta_2*) - f_Mix(theta_1*) = lam delta_1(theta_2*) - (1 - lam) delta_2(theta_1*),
    which increases in lam.
    """
    dpo, sft = optima.single
    excess = optima.problem.losses(np.stack([sft.theta, dpo.theta])) - np.array(optima.values)
    dpo_lost, sft_lost = excess[0, Task.DPO], excess[1, Task.SFT]
    total = dpo_lost + sft_lost
    return float(sft_lost / total) if total > 0.0 else float("nan")
