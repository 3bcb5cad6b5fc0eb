"""The convex objectives: value, gradient, Hessian, stochastic gradient and constants.

Setting (arXiv 2410.15483): a finite response set per prompt, features phi(x, y), the policy
pi_theta(y|x) = softmax_y(theta . phi(x, y)), theta in the ball of radius R. At response level the
normalisers of DPO cancel, so both losses are convex in theta. (Token-level DPO is not.)

Arrays are float64. `theta` has shape (..., d); values have the leading shape (...). Stochastic
gradients are compiled and loop over runs one by one, so a run's numbers do not depend on the batch
it is simulated in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logsumexp, softmax, xlogy

from theory import checks, kernels
from theory.randomness import Stream, normals, uniforms

Array = NDArray[np.float64]
Kernel = Callable[..., None]


class Constants(NamedTuple):
    """Constants of an objective on the ball of radius R."""

    gradient_norm: float
    """M with E|g|^2 <= M^2 for the stochastic gradient g everywhere on the ball."""
    smoothness: float
    """L: no eigenvalue of the Hessian exceeds it."""
    strong_convexity: float
    """mu: no eigenvalue of the Hessian on the ball is below it (may be 0)."""


class Objective(Protocol):
    """A smooth convex function of theta in R^d."""

    @property
    def dim(self) -> int: ...

    def value(self, theta: Array) -> Array:
        """f(theta), shape (...)."""
        ...

    def gradient(self, theta: Array) -> Array:
        """grad f(theta), shape (..., d)."""
        ...

    def hessian(self, theta: Array) -> Array:
        """The Hessian at one point: theta (d,) -> (d, d)."""
        ...


SAMPLING = ("stochastic_gradient", "add_stochastic_gradient")


class StochasticObjective(ABC):
    """An objective that a simulation can step on: derive your own from this class.

    It needs `dim`, `value`, `gradient`, `hessian`, `constants` and either `stochastic_gradient`
    (NumPy, all runs at once) or, for speed, `compiled` (a kernel that loops over the runs). The
    stochastic gradient must be unbiased; a subclass that changes `value` or `gradient` states it
    anew. Least squares, one row of A and b a sample:

        @dataclass(frozen=True, eq=False)
        class LeastSquares(StochasticObjective):
            a: Array
            b: Array

            @property
            def dim(self): return self.a.shape[1]
            def value(self, theta): return np.mean((theta @ self.a.T - self.b) ** 2, axis=-1) / 2
            def gradient(self, theta): return (theta @ self.a.T - self.b) @ self.a / len(self.b)
            def hessian(self, theta): return self.a.T @ self.a / len(self.b)

            def constants(self, radius):
                norms = np.linalg.norm(self.a, axis=1)
                spectrum = np.linalg.eigvalsh(self.hessian(np.zeros(self.dim)))
                largest = np.max(norms * (radius * norms + np.abs(self.b)))
                return Constants(largest, spectrum[-1], spectrum[0])

            def stochastic_gradient(self, theta, draws):
                i = (draws[:, 0] * len(self.b)).astype(int)
                residual = np.sum(self.a[i] * theta, axis=1) - self.b[i]
                return residual[:, None] * self.a[i], residual**2 / 2
    """

    def __init_subclass__(cls, **options: Any) -> None:
        """A class inherits no sampling of another function, and no kernel of another sampling."""
        super().__init_subclass__(**options)
        own, base = vars(cls).keys(), StochasticObjective
        if own & {"value", "gradient"} and not own & {"compiled", *SAMPLING}:
            cls.stochastic_gradient = base.stochastic_gradient  # type: ignore[method-assign]
            cls.add_stochastic_gradient = base.add_stochastic_gradient  # type: ignore[method-assign]
            cls.compiled = None  # type: ignore[assignment]
        elif own & set(SAMPLING) and "compiled" not in own:
            cls.compiled = None  # type: ignore[assignment]

    @property
    @abstractmethod
    def dim(self) -> int: ...

    @abstractmethod
    def value(self, theta: Array) -> Array: ...

    @abstractmethod
    def gradient(self, theta: Array) -> Array: ...

    @abstractmethod
    def hessian(self, theta: Array) -> Array: ...

    def value_and_gradient(self, theta: Array) -> tuple[Array, Array]:
        """f and grad f at once, where sharing the work pays."""
        return self.value(theta), self.gradient(theta)

    @abstractmethod
    def constants(self, radius: float) -> Constants:
        """M, L and mu on the ball of radius `radius`."""

    def draws(self, seeds: tuple[int, ...], stream: Stream, block: int) -> Array:
        """Random numbers of one block of steps: (len(seeds), BLOCK, 2) for an index and a label.

        An override gives (len(seeds), BLOCK, width), a pure function of (seed, stream, block).
        """
        return uniforms(seeds, stream, block, 2)

    def stochastic_gradient(self, theta: Array, draws: Array) -> tuple[Array, Array]:
        """g(theta_i; z_i) (n, d) and f(theta_i; z_i) (n,): `theta` (n, d), `draws` (n, width)."""
        raise NotImplementedError(
            f"{type(self).__name__} has no stochastic gradient of its own: "
            "define its method stochastic_gradient or its property compiled"
        )

    @property
    def compiled(self) -> tuple[Kernel, tuple[Any, ...]] | None:
        """The kernel of the stochastic gradient and the data that it takes, if there is one.

        kernel(theta, weights, column, draws, seed_index, offset, *data, out, losses) does what
        `add_stochastic_gradient` says.
        """
        return None

    def add_stochastic_gradient(
        self,
        theta: Array,
        weights: Array,
        column: int,
        draws: Array,
        seed_index: NDArray[np.int64],
        offset: int,
        out: Array,
        losses: Array,
    ) -> None:
        """out[r] += w_r g(theta[r]; z_r), losses[r, column] = f(theta[r]; z_r), for each run r.

        w_r = weights[r, column] and z_r = draws[seed_index[r], offset]. A run with weight zero is
        skipped and gets the loss NaN. g is unbiased: E g = grad f. `theta` is (runs, d).
        """
        if self.compiled is not None:
            kernel, data = self.compiled
            kernel(theta, weights, column, draws, seed_index, offset, *data, out, losses)
            return
        stepped, losses[:, column] = weights[:, column] != 0.0, np.nan
        if not stepped.any():
            return
        points = theta[stepped]
        gradients, values = self.stochastic_gradient(points, draws[seed_index[stepped], offset])
        for name, found, shape in (
            ("gradients", gradients, points.shape),
            ("losses", values, points.shape[:1]),
        ):
            if np.shape(found) != shape:
                name = f"{type(self).__name__}.stochastic_gradient: {name}"
                raise ValueError(f"{name} have the shape {np.shape(found)}, not {shape}")
        out[stepped] += weights[stepped, column, None] * gradients
        losses[stepped, column] = values

    @property
    def built_in(self) -> bool:
        """Whether the loops of `theory.kernels` know the kernel of `compiled` by its data."""
        plain = StochasticObjective.add_stochastic_gradient
        if self.compiled is None or type(self).add_stochastic_gradient is not plain:
            return False
        kernel, data = self.compiled
        return kernels.KERNELS.get(type(data)) is kernel


@dataclass(frozen=True, eq=False)
class Quadratic(StochasticObjective):
    """f(theta) = (theta - c)' H (theta - c) / 2, observed with Gaussian gradient noise.

    Sample loss f(theta; z) = f(theta) + sigma z . (theta - c), z standard normal, so that the
    gradient noise has covariance V = sigma^2 I. H (d, d) is symmetric positive semi-definite.
    """

    matrix: Array
    center: Array
    noise: float

    def __post_init__(self) -> None:
        matrix = checks.semidefinite("matrix", self.matrix)
        center = checks.array("center", self.center, d=len(matrix))
        noise = checks.number("noise", self.noise, zero=True)
        checks.assign(self, matrix=matrix, center=center, noise=noise)

    @property
    def dim(self) -> int:
        return len(self.center)

    def value(self, theta: Array) -> Array:
        offset = theta - self.center
        return 0.5 * np.sum(offset * (offset @ self.matrix), axis=-1)

    def gradient(self, theta: Array) -> Array:
        return (theta - self.center) @ self.matrix

    def hessian(self, theta: Array) -> Array:
        return self.matrix

    def constants(self, radius: float) -> Constants:
        """M^2 = (L (R + |c|))^2 + tr V; L and mu are the extreme eigenvalues of H."""
        eigenvalues = np.linalg.eigvalsh(self.matrix)
        slope = eigenvalues[-1] * (radius + np.linalg.norm(self.center))
        second_moment = slope**2 + self.noise**2 * self.dim
        return Constants(
            float(np.sqrt(second_moment)), float(eigenvalues[-1]), max(float(eigenvalues[0]), 0.0)
        )

    def draws(self, seeds: tuple[int, ...], stream: Stream, block: int) -> Array:
        return normals(seeds, stream, block, self.dim)

    @property
    def compiled(self) -> tuple[Kernel, tuple[Any, ...]]:
        return kernels.quadratic, kernels.QuadraticData(self.matrix, self.center, self.noise)


@dataclass(frozen=True, eq=False)
class LogisticDPO(StochasticObjective):
    """f(theta) = mean_i [p_i softplus(-s_i) + (1 - p_i) softplus(s_i)]: DPO at response level.

    s_i = beta (theta - theta_ref) . (phi(x_i, a_i) - phi(x_i, b_i)) is the reward margin of the
    i-th pair and p_i the probability that a_i is preferred: both orders occur, so the minimiser is
    interior. A sample draws a pair uniformly and its label from p_i; its loss is
    -log sigmoid(+-s_i), the DPO loss of arXiv 2305.18290, equation 7, for the policy above.

    `differences` (n, d) holds phi(x_i, a_i) - phi(x_i, b_i); `preference` (n,) holds p_i.
    """

    differences: Array
    preference: Array
    beta: float
    theta_ref: Array

    def __post_init__(self) -> None:
        differences = checks.array("differences", self.differences, pairs=None, d=None)
        pairs, dim = differences.shape
        checks.assign(
            self,
            differences=differences,
            preference=checks.probabilities("preference", self.preference, pairs=pairs),
            beta=checks.number("beta", self.beta),
            theta_ref=checks.array("theta_ref", self.theta_ref, d=dim),
        )

    @property
    def dim(self) -> int:
        return self.differences.shape[1]

    @cached_property
    def _rows(self) -> Array:
        return np.ascontiguousarray(self.beta * self.differences)

    @cached_property
    def _shift(self) -> Array:
        return self._rows @ self.theta_ref

    def _margins(self, theta: Array) -> Array:
        return theta @ self._rows.T - self._shift

    def value(self, theta: Array) -> Array:
        margins = self._margins(theta)
        return self._mean_loss(margins, np.exp(-np.abs(margins)))

    def _mean_loss(self, margins: Array, tails: Array) -> Array:
        # p softplus(-s) + (1 - p) softplus(s) = softplus(s) - p s, stable for every s.
        softplus = np.maximum(margins, 0.0) + np.log1p(tails)
        return np.mean(softplus - self.preference * margins, axis=-1)

    def gradient(self, theta: Array) -> Array:
        return self.value_and_gradient(theta)[1]

    def value_and_gradient(self, theta: Array) -> tuple[Array, Array]:
        margins = self._margins(theta)
        tails = np.exp(-np.abs(margins))  # one exponential serves softplus and sigmoid
        residual = np.where(margins >= 0.0, 1.0, tails) / (1.0 + tails) - self.preference
        return self._mean_loss(margins, tails), residual @ self._rows / len(self._rows)

    def hessian(self, theta: Array) -> Array:
        slope = _logistic_slope(self._margins(theta))
        return (self._rows.T * slope) @ self._rows / len(self._rows)

    def constants(self, radius: float) -> Constants:
        """M = beta max|a - b| <= 2 beta Phi; L = eig_max(mean x x') / 4 <= beta^2 Phi^2.

        x_i = beta (phi(x_i, a_i) - phi(x_i, b_i)). mu = eig_min(mean s'(R|x_i| + |x_i . theta_ref|)
        x_i x_i'), where s' = s (1 - s) is the slope of the sigmoid s, decreasing away from 0.
        """
        norms = np.linalg.norm(self._rows, axis=1)
        second = self._rows.T @ self._rows / len(self._rows)
        floor = _logistic_slope(radius * norms + np.abs(self._shift))
        lowest = np.linalg.eigvalsh((self._rows.T * floor) @ self._rows / len(self._rows))[0]
        largest = np.linalg.eigvalsh(second)[-1]
        return Constants(float(norms.max()), float(largest / 4), max(float(lowest), 0.0))

    @property
    def compiled(self) -> tuple[Kernel, tuple[Any, ...]]:
        return kernels.logistic, kernels.LogisticData(self._rows, self._shift, self.preference)


@dataclass(frozen=True, eq=False)
class SoftmaxSFT(StochasticObjective):
    """f(theta) = -mean_x sum_y q(y|x) log pi_theta(y|x): SFT at response level.

    A sample draws a prompt uniformly and its demonstration y from q(.|x); its loss is
    -log pi_theta(y|x). `features` (prompts, responses, d) holds phi; `labels` (prompts, responses)
    holds q, rows summing to 1.

    With `log_base` (prompts, responses), log pi_0 up to a constant per prompt, the policy is
    pi_theta(y|x) proportional to pi_0(y|x) exp(theta . phi(x, y)); without it pi_0 is uniform. A
    response with log_base = -inf does not exist (so prompts may have different numbers of them):
    its label must be 0.
    """

    features: Array
    labels: Array
    log_base: Array | None = None

    def __post_init__(self) -> None:
        base = np.zeros(np.shape(self.labels)) if self.log_base is None else self.log_base
        features, base = checks.candidates("", self.features, base)
        labels = checks.labels("", self.labels, base)
        kept = None if self.log_base is None else base
        checks.assign(self, features=features, labels=labels, log_base=kept)

    @property
    def dim(self) -> int:
        return self.features.shape[2]

    @cached_property
    def _by_response(self) -> Array:
        """Features as (responses * prompts, d): reductions over responses then run along rows."""
        return np.ascontiguousarray(self.features.swapaxes(0, 1).reshape(-1, self.dim))

    @cached_property
    def _demonstrated(self) -> Array:
        """Mean feature of the demonstrations: the labels enter f through it alone."""
        return np.einsum("xy,xyd->d", self.labels, self.features) / len(self.features)

    @cached_property
    def _cumulative(self) -> Array:
        """Of the labels; exactly 1 from the last label on, so that no draw ends behind it."""
        cumulative = np.cumsum(self.labels, axis=1)
        return np.where(cumulative < cumulative[:, -1:], cumulative, 1.0)

    @cached_property
    def _offsets(self) -> Array:
        return np.zeros_like(self.labels) if self.log_base is None else self.log_base

    @cached_property
    def _demonstrated_offset(self) -> float:
        """mean_x E_q log pi_0, the part of f that theta does not reach."""
        terms = self.labels * np.where(self.labels > 0.0, self._offsets, 0.0)
        return float(np.sum(terms) / len(self.labels))

    @cached_property
    def _base(self) -> Array:
        """pi_0 (prompts, responses)."""
        return softmax(self._offsets, axis=1)

    def value(self, theta: Array) -> Array:
        return self._evaluate(theta)[0]

    def gradient(self, theta: Array) -> Array:
        return self.value_and_gradient(theta)[1]

    def value_and_gradient(self, theta: Array) -> tuple[Array, Array]:
        value, unnormalised = self._evaluate(theta)
        unnormalised /= unnormalised.sum(axis=0)
        policy = unnormalised.reshape(len(self._by_response), -1)
        moment = (self._by_response.T @ policy).T / len(self.features)
        return value, moment.reshape(theta.shape) - self._demonstrated

    def _evaluate(self, theta: Array) -> tuple[Array, Array]:
        """mean_x logsumexp_y(theta . phi) - theta . E_q phi, and exp(logits - peak).

        Exact MAXRIGHT spends its time here, so the log-sum-exp runs in place over the leading
        axis of (responses, prompts, points).
        """
        points = theta.reshape(-1, self.dim)
        logits = (self._by_response @ points.T).reshape(*self.labels.T.shape, len(points))
        if self.log_base is not None:
            logits += self.log_base.T[..., None]
        peak = logits.max(axis=0)
        logits -= peak
        np.exp(logits, out=logits)
        log_normaliser = (np.log(logits.sum(axis=0)) + peak).mean(axis=0)
        demonstrated = theta @ self._demonstrated + self._demonstrated_offset
        return log_normaliser.reshape(theta.shape[:-1]) - demonstrated, logits

    def _policy(self, theta: Array) -> Array:
        """pi_theta(y|x), shape (..., prompts, responses)."""
        logits = np.einsum("xyd,...d->...xy", self.features, theta)
        return softmax(logits + self._offsets, axis=-1)

    def hessian(self, theta: Array) -> Array:
        policy = self._policy(theta)
        return _mean_covariance(self.features, policy)

    def constants(self, radius: float) -> Constants:
        """M = max_x diam_x <= 2 Phi; L <= Phi^2 is the lesser of two bounds on Cov_pi[phi].

        Popoviciu: its eigenvalues are at most diam_x^2 / 4. Boehning (1992, "Multinomial logistic
        regression algorithm"): diag(pi) - pi pi' <= (I - 11'/|Y_x|) / 2 for every pi.
        diam_x is the largest |phi(x, y) - phi(x, y')|. pi >= exp(-R diam_x) pi_0 on the ball, and a
        variance under pi is at least min(pi / pi_0) times the one under pi_0, hence
        mu = eig_min(mean_x exp(-R diam_x) Cov_{pi_0}[phi(x, .)]).
        """
        exists = self._offsets > -np.inf
        gaps = self.features[:, :, None, :] - self.features[:, None, :, :]
        distances = np.linalg.norm(gaps, axis=-1) * (exists[:, :, None] & exists[:, None, :])
        diameters = distances.max(axis=(1, 2))
        lowest = np.linalg.eigvalsh(
            _mean_covariance(self.features, self._base, np.exp(-radius * diameters))
        )[0]
        # With weights 1/|Y_x| on the existing responses, (I - 11'/|Y|) is |Y| times the covariance.
        counts = exists.sum(axis=1)
        bohning = _mean_covariance(self.features, exists / counts[:, None], counts / 2)
        smoothness = min(np.mean(diameters**2) / 4, np.linalg.eigvalsh(bohning)[-1])
        return Constants(float(diameters.max()), float(smoothness), max(float(lowest), 0.0))

    def entropy(self) -> float:
        """mean_x H(q(.|x)): the value that a policy with pi = q would reach."""
        return float(-np.sum(xlogy(self.labels, self.labels)) / len(self.labels))

    @property
    def compiled(self) -> tuple[Kernel, tuple[Any, ...]]:
        return kernels.softmax, kernels.SoftmaxData(self.features, self._cumulative, self._offsets)


@dataclass(frozen=True, eq=False)
class WeightedSum:
    """sum_i w_i f_i: f_Mix for w = (lam, 1 - lam), and the dual functions of f_Max."""

    objectives: Sequence[Objective]
    weights: Sequence[float]

    @property
    def dim(self) -> int:
        return self.objectives[0].dim

    def value(self, theta: Array) -> Array:
        return np.sum([w * f.value(theta) for w, f in self._terms()], axis=0)

    def gradient(self, theta: Array) -> Array:
        return np.sum([w * f.gradient(theta) for w, f in self._terms()], axis=0)

    def hessian(self, theta: Array) -> Array:
        return np.sum([w * f.hessian(theta) for w, f in self._terms()], axis=0)

    def _terms(self) -> list[tuple[float, Objective]]:
        return list(zip(self.weights, self.objectives, strict=True))


def response_log_probs(features: Array, theta: Array) -> Array:
    """log pi_theta(y|x) for features (..., responses, d): shape (..., responses)."""
    logits = features @ theta
    return logits - logsumexp(logits, axis=-1, keepdims=True)


def _logistic_slope(margins: Array) -> Array:
    return expit(margins) * expit(-margins)


def _mean_covariance(features: Array, policy: Array, scale: Array | None = None) -> Array:
    """mean_x scale_x Cov_{y ~ policy(.|x)}[phi(x, y)], shape (d, d)."""
    means = np.einsum("xy,xyd->xd", policy, features)
    centred = features - means[:, None, :]
    mass = policy if scale is None else policy * scale[:, None]
    return np.einsum("xy,xyd,xye->de", mass, centred, centred, optimize=True) / len(features)
