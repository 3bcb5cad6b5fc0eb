"""The gap of sequential training from gradients and curvature, next to the measured one (T8).

On the same training rows, at the end theta_m of Mix and at the end theta_s of sequential training
on the same problem, with H = H_Mix and g = grad f_Mix:

lower estimate (T8)  |g(theta_s)|^2 / (2 L), with L the largest curvature of f_Mix seen at theta_s:
                     what one gradient step would win back. T8 takes the smoothness of a convex
                     f_Mix; the largest curvature at one point of a network is less than that,
                     and Ritz values lie below it: the estimate is on the high, strict side.
local model          theta_s as seen from theta_m: the last stage minimises the quadratic model of
                     its own f_i, d = -(H_i + mu I)^-1 grad f_i(theta_m), so that the gap is
                     g(theta_m) . d + d' H d / 2. H_i is nearly singular, and a finite stage does
                     not reach its minimum: mu is such that |d| = |theta_s - theta_m|, the one
                     number that is taken from the measured run. Assumes that theta_s lies within
                     the reach of the quadratic model, and is refuted where it does not.
measured             f_Mix(theta_s) - f_Mix(theta_m).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import brentq
from torch import Tensor
from tqdm import tqdm

from llm.compare.runs import Run
from llm.compare.settings import RUNS
from llm.validate.bench import Bench
from llm.validate.curvature import Krylov, Probe, lanczos, probe_at
from llm.validate.quantities import Quantity, above, measured
from theory.metrics import mean_interval, mix_value
from theory.records import digest, read_json, write_json
from theory.schedulers import ORDERS
from theory.tasks import Task
from theory.theorems.bounds import gap_from_gradient

SOURCE = "curvature (T8)"
LAM = 0.5
FACTOR = 2.0
"""A prediction of the gap within this factor counts as right."""
MOST_RESIDUAL = 0.1
"""Beyond this relative residual a solve has not converged, and its prediction is not judged."""


@dataclass(frozen=True)
class TradeOff:
    """One seed and one order of the stages. Losses in nats on the probed rows."""

    measured: float
    distance: float
    """|theta_s - theta_m|."""
    gradient: float
    """|grad f_Mix(theta_s)|."""
    abandoned: float
    """lam_i |grad f_i(theta_s)| of the abandoned objective: `gradient` at a finished stage."""
    curvature: float
    """Largest Ritz value of H_Mix at theta_s."""
    predicted: float
    damping: float
    residual: float
    """Of the solve, relative."""

    @property
    def lower(self) -> float:
        return gap_from_gradient(self.gradient, self.curvature, 0.0)[0]


@dataclass(frozen=True)
class Joint:
    """The end of Mix, one seed: gradients (2,) and the extreme Ritz values of H_Mix."""

    gradients: tuple[float, float]
    mix_gradient: float
    largest: float
    smallest: float


@dataclass(frozen=True)
class TradeOffs:
    joint: list[Joint]
    orders: dict[str, list[TradeOff]]


def run_trade_off(bench: Bench) -> TradeOffs:
    """Repeats Mix and both orders at lam (split) 1/2 with their models kept."""
    names = ("mix", *ORDERS)
    ends = {name: bench.run(f"end-{name}", _runs(bench, name), {}, True) for name in names}
    bar = tqdm(bench.seeds, desc="curvature", unit="seed")
    found = [_of_seed(bench, {n: e["folder"].iloc[i] for n, e in ends.items()}) for i in bar]
    return TradeOffs(
        [Joint(**part["joint"]) for part in found],
        {order: [TradeOff(**part[order]) for part in found] for order in ORDERS},
    )


def _of_seed(bench: Bench, folders: dict[str, str]) -> dict[str, Any]:
    """Joint and TradeOffs as plain data, kept on disk: Hessian products take a while."""
    steps, rows = bench.config.krylov_steps, bench.config.probe_rows
    runs = {name: Path(folder).name for name, folder in folders.items()}  # a digest of each run
    key = {"runs": runs, "krylov_steps": steps, "rows": rows}
    place = bench.config.out / RUNS / "probes" / f"{digest(key)[:20]}.json"
    if not place.is_file():
        probes = {name: _probe(bench, folder) for name, folder in folders.items()}
        part = {"joint": asdict(joint_point(probes["mix"], steps))}
        for order, stages in ORDERS.items():
            part[order] = asdict(trade_off(probes["mix"], probes[order], stages[1], steps))
        write_json(place, part)
    return dict(read_json(place))


def _runs(bench: Bench, name: str) -> list[Run]:
    shared: dict[str, Any] = {"steps": int(bench.comparison.summary["steps"]), "path": False}
    shared["learning_rate"] = bench.comparison.rate(name, "mix")
    if name in ORDERS:
        return [Run("sequential", seed=s, line=name, knob=0.5, **shared) for s in bench.seeds]
    return [Run("mix", seed=s, knob=LAM, **shared) for s in bench.seeds]


def _probe(bench: Bench, folder: str) -> Probe:
    return probe_at(bench.setup, bench.load(folder), bench.config.probe_rows)


def joint_point(probe: Probe, steps: int) -> Joint:
    gradient = probe.mix_gradient(LAM)
    ritz = lanczos(probe.mix_product(LAM), gradient, steps).eigenvalues
    norms = [float(probe.gradient(task).norm()) for task in Task]
    return Joint((norms[0], norms[1]), float(gradient.norm()), float(ritz[-1]), float(ritz[0]))


def trade_off(joint: Probe, end: Probe, last: Task, steps: int, lam: float = LAM) -> TradeOff:
    """From the end of Mix and the end of a sequence whose last stage is on `last`."""
    gradient = end.mix_gradient(lam)
    curvature = float(lanczos(end.mix_product(lam), gradient, steps).eigenvalues[-1])
    distance = float((end.point - joint.point).norm())
    own = lanczos(joint.product(last), joint.gradient(last), steps)
    damping = matching_damping(own, distance)
    step, residual = own.solve(damping)
    weight = lam if last.other == Task.DPO else 1.0 - lam
    return TradeOff(
        measured=float(mix_value(end.values(), lam) - mix_value(joint.values(), lam)),
        distance=distance,
        gradient=float(gradient.norm()),
        abandoned=weight * float(end.gradient(last.other).norm()),
        curvature=curvature,
        predicted=quadratic_change(joint, -step, lam),
        damping=damping,
        residual=residual,
    )


def quadratic_change(probe: Probe, step: Tensor, lam: float) -> float:
    """f_Mix's change along `step` by its quadratic model: g . d + d' H d / 2."""
    slope = probe.mix_gradient(lam) @ step
    return float(slope + step @ probe.mix_product(lam)(step) / 2.0)


def matching_damping(krylov: Krylov, length: float) -> float:
    """The mu with |(H + mu I)^-1 b| = length: unique, since the norm falls in mu.

    Where even the least damping that keeps H + mu I positive gives a shorter step, that damping.
    """
    eigenvalues = krylov.eigenvalues
    scale = float(np.abs(eigenvalues).max())
    least = max(0.0, -float(eigenvalues[0])) + 1e-9 * scale
    most = least + krylov.norm / length + scale

    def excess(log_damping: float) -> float:
        return float(np.log(float(krylov.solve(np.exp(log_damping))[0].norm()) / length))

    if excess(np.log(least)) <= 0.0:
        return least
    return float(np.exp(brentq(excess, np.log(least), np.log(most), xtol=1e-6)))


def trade_off_quantities(found: TradeOffs) -> Iterator[Quantity]:
    joint = found.joint
    for task in Task:
        name = f"|grad f_{task.name}| at the end of Mix"
        yield measured(SOURCE, name, "-", [point.gradients[task] for point in joint])
    name = "|grad f_Mix| over the larger of the two, at the end of Mix"
    cancelled = [point.mix_gradient / max(point.gradients) for point in joint]
    yield measured(SOURCE, name, "0 at the optimum", cancelled)
    for side in ("largest", "smallest"):
        values = [getattr(point, side) for point in joint]
        yield measured(SOURCE, f"{side} curvature of f_Mix found at the end of Mix", "-", values)
    for order, points in found.orders.items():
        yield from _of_order(order, points)


def _of_order(order: str, points: list[TradeOff]) -> Iterator[Quantity]:
    gap, lower, predicted = (
        np.array([getattr(point, name) for point in points])
        for name in ("measured", "lower", "predicted")
    )
    words = order.replace("_", " ")
    note = f"|g| {_mean(points, 'gradient'):.3g} (abandoned objective's share "
    note += f"{_mean(points, 'abandoned'):.3g}), curvature {_mean(points, 'curvature'):.3g}"
    claims = [above("the gap is above the lower estimate", gap - lower)]
    yield measured(SOURCE, f"gap of {words}", f">= {lower.mean():.3g}", gap, claims, note)
    ends = mean_interval(predicted)
    note = f"predicted in [{ends.low:.3g}, {ends.high:.3g}], damping {_mean(points, 'damping'):.3g}"
    note += f", |d| {_mean(points, 'distance'):.3g}, residual {_mean(points, 'residual'):.1g}"
    close = [
        above("not too small", predicted - gap / FACTOR),
        above("not too large", FACTOR * gap - predicted),
    ]
    if max(point.residual for point in points) > MOST_RESIDUAL:
        close, note = [], f"{note}: no verdict, too few --krylov_steps"
    name = f"gap of {words}, local model (within a factor of {FACTOR:g})"
    yield measured(SOURCE, name, ends.mean, gap, close, note)


def _mean(points: list[TradeOff], name: str) -> float:
    return float(np.mean([getattr(point, name) for point in points]))
