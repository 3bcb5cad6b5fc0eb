"""From candidate sets to a convex problem: features, base policy, stochastic labels, constants.

Features, from the pooled hidden states h(x, y):

1. centred per prompt: h(x, y) - mean_y' h(x, y'). A constant per prompt changes neither the policy
   nor a margin; what is left tells the candidates of a prompt apart.
2. projected on the `dim` leading principal directions of the centred states, every prompt of a set
   and both sets with the same weight, each coordinate divided by its standard deviation. This is a
   linear change of theta: the ball then measures policies, not the scale of a hidden unit.
3. divided by one number, so that the largest |phi| is 1: M_DPO <= 2 beta, M_SFT <= 2.

Labels: what the data say has probability 1 - label_noise, and the other candidates share the rest.
For a pair that is p = 1 - label_noise. The probabilities are weights, nothing is drawn; as none is
0, f -> infinity in every direction that the features span, so that the minimisers are finite. The
ball is twice as large as the farther of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from llm.features.candidates import Extraction
from theory.cli import UserError
from theory.feature_file import FeatureFile
from theory.objectives import Objective
from theory.optima import OptimumError, minimise
from theory.problems import problem_from_features
from theory.tasks import Task

Array = NDArray[np.float64]

BASE_POLICIES = ("mean", "sum", "uniform")
RADII = (1e1, 1e2, 1e3, 1e4)
"""Balls to look for a minimiser in; the larger, the more digits a certificate takes."""


@dataclass(frozen=True)
class BuildOptions:
    """What makes a problem of an extraction."""

    dim: int = 16
    base_policy: str = "mean"
    """log pi_0 from the model's log pi(y|x): per token ("mean"; else the shortest candidate has
    nearly all the mass), of the whole response ("sum": the model itself, restricted to the
    candidates), or "uniform"."""
    base_temperature: float = 1.0
    label_noise: float = 0.1
    beta: float = 1.0

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise UserError(f"--dim is {self.dim}; it must be at least 1")
        if self.base_policy not in BASE_POLICIES:
            names = ", ".join(BASE_POLICIES)
            raise UserError(f"--base_policy is {self.base_policy}; it is one of {names}")
        if not 0.0 < self.label_noise <= 0.5:
            raise UserError(
                f"--label_noise is {self.label_noise}; it must lie in (0, 0.5]: without noise the "
                "minimisers may be infinite, with more the data mean their opposite"
            )
        for name in ("base_temperature", "beta"):
            if not 0.0 < getattr(self, name) < np.inf:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be positive")


def build(
    extractions: Mapping[Task, Extraction], options: BuildOptions, about: dict[str, Any]
) -> FeatureFile:
    """The problem of the module's docstring; its minimisers are certified.

    Raises:
        UserError: more dimensions than the candidates span, or minimisers that were not found.
    """
    features = _features(extractions, options.dim)
    base = {task: log_base(extraction, options) for task, extraction in extractions.items()}
    data = FeatureFile(
        dpo_features=features[Task.DPO],
        dpo_log_base=base[Task.DPO],
        preference=np.full(len(features[Task.DPO]), 1.0 - options.label_noise),
        sft_features=features[Task.SFT],
        sft_log_base=base[Task.SFT],
        sft_labels=_labels(extractions[Task.SFT], options.label_noise),
        beta=options.beta,
        radius=RADII[-1],
        step_scale=1.0,
        about=about | {"options": asdict(options)},
    )
    return _with_scales(data)


def _with_scales(data: FeatureFile) -> FeatureFile:
    """R = 2 max |theta_i*|, and c = D / M, which minimises the bound of T1 up to its logarithm.

    D = |theta*| of f_Mix and M = M_A at lam = 1/2; the start is 0.
    """
    problem = problem_from_features(data, "features")
    radius = 2.0 * max(_distance(f) for f in problem.objectives)
    norms = [f.constants(radius).gradient_norm for f in problem.objectives]
    scale = _distance(problem.mix(0.5)) / float(np.sqrt(np.mean(np.square(norms))))
    return replace(data, radius=radius, step_scale=scale)


def _distance(objective: Objective) -> float:
    """|theta*| of the minimiser over the whole space."""
    for radius in RADII:
        try:
            optimum = minimise(objective, radius)
        except (OptimumError, np.linalg.LinAlgError):
            continue
        if optimum.interior:
            return float(np.linalg.norm(optimum.theta))
    raise UserError(
        f"no certified minimiser within {RADII[-1]:g} of the start: more --label_noise, a higher "
        "--base_temperature or fewer --dim bring it closer"
    )


def log_base(extraction: Extraction, options: BuildOptions) -> Array:
    """log pi_0 (prompts, K), normalised over the candidates, -inf on padding."""
    pooled = extraction.pooled
    scores = {
        "mean": pooled.logps / pooled.lengths,
        "sum": pooled.logps,
        "uniform": np.zeros(len(pooled.logps)),
    }[options.base_policy]
    return log_softmax(_padded(scores / options.base_temperature, extraction, -np.inf), axis=1)


def _labels(extraction: Extraction, noise: float) -> Array:
    """q(y|x): 1 - noise on candidate 0, noise / (K_x - 1) on each other one."""
    shares = np.concatenate(
        [np.r_[1.0 - noise, np.full(size - 1, noise / (size - 1))] for size in extraction.sizes]
    )
    return _padded(shares, extraction, 0.0)


def _features(extractions: Mapping[Task, Extraction], dim: int) -> dict[Task, Array]:
    """phi (prompts, K, dim) of both sets, 0 on padding."""
    centred = {task: _centred(extraction) for task, extraction in extractions.items()}
    second = np.mean(
        [_second_moment(centred[task], extractions[task].sizes) for task in centred], axis=0
    )
    values, vectors = np.linalg.eigh(second)
    rank = int(np.sum(values > 1e-9 * values[-1])) if values[-1] > 0.0 else 0
    if dim > rank:
        raise UserError(f"--dim is {dim}; the candidates span only {rank} dimensions")
    projection = vectors[:, ::-1][:, :dim] / np.sqrt(values[::-1][:dim])
    phi = {task: states @ projection for task, states in centred.items()}
    largest = max(np.linalg.norm(states, axis=1).max() for states in phi.values())
    return {task: _padded(states / largest, extractions[task], 0.0) for task, states in phi.items()}


def _centred(extraction: Extraction) -> Array:
    """h(x, y) minus its mean over the candidates of x: (N, width)."""
    starts = np.cumsum([0, *extraction.sizes[:-1]])
    means = np.add.reduceat(extraction.pooled.hidden, starts) / np.c_[extraction.sizes]
    return extraction.pooled.hidden - np.repeat(means, extraction.sizes, axis=0)


def _second_moment(centred: Array, sizes: list[int]) -> Array:
    weights = np.repeat(1.0 / (np.array(sizes) * len(sizes)), sizes)
    return (centred.T * weights) @ centred


def _padded(values: Array, extraction: Extraction, fill: float) -> Array:
    """One row a candidate (N, ...) -> (prompts, K, ...), filled up behind the candidates."""
    sizes = np.array(extraction.sizes)
    exists = np.arange(sizes.max()) < sizes[:, None]
    padded = np.full((*exists.shape, *values.shape[1:]), fill)
    padded[exists] = values
    return padded
