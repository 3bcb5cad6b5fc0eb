"""How far the two objectives of a feature problem pull apart, and what that depends on.

At lam = 1/2, for each order of sequential training: the certified limit of G_Mix, its bounds by
T8, and the share of the joint gain that it gives up, G_Mix(limit) / G_Mix(start). Also the cosine
between the two gradients at the start (1: the same direction, -1: opposite), the cosine between
the two minimisers, and lam_c, where the two orders are equally good.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from llm.features.build import BuildOptions, build
from llm.features.candidates import Extraction
from theory.cli import UserError
from theory.feature_file import FeatureFile
from theory.metrics import sequential_limit
from theory.optima import ProblemOptima
from theory.plotting.style import LABELS
from theory.problems import problem_from_features
from theory.schedulers import ORDERS
from theory.tasks import Task
from theory.theorems.bounds import crossing_lam, sequential_gap

LAM = 0.5
VARIED: dict[str, tuple[Any, ...]] = {
    "dim": (1, 2, 4, 8, 16, 32, 64),
    "base_policy": ("uniform", "mean", "sum"),
    "label_noise": (0.02, 0.05, 0.1, 0.2, 0.3, 0.4),
    "beta": (0.1, 0.3, 1.0, 3.0),
}
"""Values of each option that `vary` tries, the others as they were given."""
RESAMPLES = 40
COSINES = ("gradient_cosine", "minimiser_cosine")

Measures = dict[str, Any]


def measure(data: FeatureFile) -> Measures:
    """The numbers of the module's docstring, and the constants of both objectives."""
    optima = ProblemOptima(problem_from_features(data, "features"))
    problem, shares = optima.problem, conflict(optima)
    start_gap = _start_gap(optima)
    measures: Measures = {name: shares.pop(name) for name in COSINES}
    measures |= {"crossing_lam": crossing_lam(optima), "start_gap": start_gap}
    for order, (_, last) in ORDERS.items():
        low, high = sequential_gap(optima, last, LAM)
        share = shares[order]
        measures[order] = {"gap": share * start_gap, "low": low, "high": high, "share": share}
    for task, objective in zip(Task, problem.objectives, strict=True):
        constants = objective.constants(problem.radius)._asdict()
        optimum = optima.single[task]
        measures[task.label] = constants | {
            "start": float(objective.value(problem.start)),
            "optimum": optimum.value,
            "certified_gap": optimum.certificate,
            "distance": float(np.linalg.norm(optimum.theta)),
        }
    return measures


def conflict(optima: ProblemOptima) -> dict[str, float]:
    """The cosines by name, and by order the share of the joint gain that is given up."""
    problem = optima.problem
    values = {
        "gradient_cosine": _cosine(*(f.gradient(problem.start) for f in problem.objectives)),
        "minimiser_cosine": _cosine(*(optimum.theta for optimum in optima.single)),
    }
    for order, (_, last) in ORDERS.items():
        values[order] = sequential_limit(optima, last, LAM)[0] / _start_gap(optima)
    return values


def _start_gap(optima: ProblemOptima) -> float:
    return float(optima.problem.mix(LAM).value(optima.problem.start)) - optima.mix(LAM).value


def vary(
    extractions: Mapping[Task, Extraction], options: BuildOptions, resamples: int = RESAMPLES
) -> list[Measures]:
    """One record per option and value: the measures of the problem and bootstrap intervals.

    Values that the extraction does not allow (more dimensions than it spans, a minimiser out of
    reach) are left out.
    """
    records = []
    for name, value in tqdm(list(_settings(options)), desc="conflict", delay=1, leave=False):
        try:
            data = build(extractions, replace(options, **{name: value}), {})
            record = {"option": name, "value": value} | measure(data)
            intervals = bootstrap(data, resamples)
        except UserError:
            continue
        records.append(record | {"intervals": intervals})
    return records


def _settings(options: BuildOptions) -> Iterator[tuple[str, Any]]:
    for name, values in VARIED.items():
        own = asdict(options)[name]
        every = values if own in values else (*values, own)
        for value in every if isinstance(own, str) else sorted(every):
            yield name, value


def bootstrap(data: FeatureFile, resamples: int, seed: int = 0) -> dict[str, list[float]]:
    """95% intervals of cosines and shares, by resampling the prompts of both sets.

    The features stay as they are. Two small sets disagree by chance, too, and resampled ones twice
    as much; the basic interval (2 estimate - quantile; for shares of their logarithms) takes that
    bias out, so that it may lie beside the estimate.
    """
    rng = np.random.default_rng(seed)
    counts = (len(data.preference), len(data.sft_labels))
    estimate, rows = conflict(ProblemOptima(problem_from_features(data, "features"))), []
    for _ in range(resamples):
        pairs, prompts = (rng.integers(count, size=count) for count in counts)
        problem = problem_from_features(_resampled(data, pairs, prompts), "resampled")
        rows.append(conflict(ProblemOptima(problem)))
    intervals = {}
    for name, value in estimate.items():
        high, low = np.quantile([row[name] for row in rows], (0.025, 0.975))
        reflected = np.array([value**2 / low, value**2 / high])
        if name in COSINES:
            reflected = np.clip([2.0 * value - low, 2.0 * value - high], -1.0, 1.0)
        intervals[name] = reflected.tolist()
    return intervals


def _resampled(
    data: FeatureFile, pairs: NDArray[np.int64], prompts: NDArray[np.int64]
) -> FeatureFile:
    chosen = {"dpo": pairs, "preference": pairs, "sft": prompts}
    arrays = {
        field.name: getattr(data, field.name)[chosen[field.name.split("_")[0]]]
        for field in fields(data)
        if field.name.split("_")[0] in chosen
    }
    return replace(data, **arrays, radius=2.0 * data.radius)  # room for their minimisers


def _cosine(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def report(measures: Measures) -> str:
    """The readable table of one problem."""
    lines = [
        f"\ncosine between the gradients at the start {measures['gradient_cosine']:+.3f}, "
        f"between the minimisers {measures['minimiser_cosine']:+.3f}",
        f"G_Mix at the start {measures['start_gap']:.4g}; where sequential training ends "
        f"(lam = {LAM:g}):",
    ]
    for order in ORDERS:
        record = measures[order]
        lines.append(
            f"  {LABELS[order]:<14}{record['gap']:.4g} = {record['share']:.1%} of it, T8: between "
            f"{record['low']:.2g} and {record['high']:.2g}"
        )
    lines.append(f"the orders cross at lam = {measures['crossing_lam']:.3f}")
    for task in Task:
        record = measures[task.label]
        lines.append(
            f"  f_{task.name}: {record['start']:.4g} at the start, "
            f"at best {record['optimum']:.4g}, |theta*| {record['distance']:.3g}, "
            f"M {record['gradient_norm']:.3g}, L {record['smoothness']:.3g}, "
            f"mu {record['strong_convexity']:.2g}"
        )
    return "\n".join(lines)
