"""The numbers of the Pareto experiment: its runs' end points against the certified front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from theory import compared
from theory.compared import EVEN_SPLIT, Compared
from theory.costs import Costs, cost_per_step
from theory.metrics import Interval, mean_interval, middle, optimality_gaps
from theory.optima import ProblemOptima
from theory.problems import PROBLEMS, make_problem
from theory.registry import make_scheduler, scheduler_options, typical_scheduler
from theory.schedulers import ORDERS
from theory.simulate import ITERATES, StepSize, log_spaced_steps, simulate
from theory.sweep import COUNTS
from theory.theorems.pareto import Front, hypervolume, least_ideal_distance, pareto_front

PLANE = "toy2d"
"""The problem with two parameters, whose paths can be drawn."""
PLANE_STEPS, PLANE_SEEDS, PLANE_SCALE = 4000, 100, 0.25
"""Its pictures: steps a quarter of the usual ones, which show the drift and not the noise."""


@dataclass(frozen=True)
class ParetoConfig(Compared):
    """Everything that determines the results."""

    problems: tuple[str, ...] = tuple(PROBLEMS)
    lams: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 0.9)
    num_steps: int = 10_000
    num_seeds: int = 20
    splits: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 0.9, 0.97, 0.99, 0.997, 0.999, 0.9997)
    refresh_every: int = 10
    front_points: int = 201
    algorithms: tuple[str, ...] = compared.ALGORITHMS
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def lines(self) -> tuple[str, ...]:
        return compared.lines(self.algorithms)

    @property
    def record_steps(self) -> tuple[int, ...]:
        """Log-spaced in both halves: the even split starts its second stage in the middle."""
        half = self.num_steps // 2
        stage = log_spaced_steps(half, per_decade=4)
        return tuple(np.unique([*stage, *(half + stage), self.num_steps]).tolist())


@dataclass(frozen=True, eq=False)
class Reference:
    """What the runs on a problem are measured against."""

    front: Front
    ideal: NDArray[np.float64]
    least_distance: float
    certificate: float
    """How far the least distance may lie below: certified."""
    front_volume: float
    lams_volume: float
    """Hypervolume of the exact minimisers of f_Mix at the lams of the runs alone."""


def reference(config: ParetoConfig, problem: str) -> Reference:
    optima = ProblemOptima(make_problem(problem))
    front, least = pareto_front(optima, config.front_points), least_ideal_distance(optima)
    minimisers = optima.problem.losses(np.stack([optima.mix(lam).theta for lam in config.lams]))
    return Reference(
        front=front,
        ideal=np.array(optima.values),
        least_distance=least.value,
        certificate=least.value - least.lower,
        front_volume=hypervolume(front.losses, front.reference()),
        lams_volume=hypervolume(minimisers, front.reference()),
    )


def summary(
    config: ParetoConfig, results: pd.DataFrame, references: dict[str, Reference]
) -> dict[str, Any]:
    """What summary.json holds: fronts, and every line's hypervolume, gaps and cost."""
    final = results[results["step"] == config.num_steps]
    grouped = final.groupby(["problem", "line", "iterate"])
    records = []
    for problem in config.problems:
        for line in config.lines:
            for iterate in ITERATES:
                rows = grouped.get_group((problem, line, iterate))
                keys = {"problem": problem, "line": line, "iterate": iterate}
                records.append(keys | _line_record(config, rows, line, references[problem]))
    fronts = {name: _front_record(ref) for name, ref in references.items()}
    return {"config": asdict(config), "fronts": fronts, "lines": records}


def _front_record(ref: Reference) -> dict[str, Any]:
    return {
        "ideal": ref.ideal.tolist(),
        "nadir": ref.front.nadir.tolist(),
        "hypervolume_reference": ref.front.reference().tolist(),
        "hypervolume": ref.front_volume,
        "hypervolume_share_at_lams": ref.lams_volume / ref.front_volume,
        "largest_certificate": float(ref.front.certificates.max()),
        "least_ideal_distance": ref.least_distance,
        "least_ideal_distance_certificate": ref.certificate,
    }


def _line_record(
    config: ParetoConfig, rows: pd.DataFrame, line: str, ref: Reference
) -> dict[str, Any]:
    """Hypervolume of the end points over the knob, per seed, as a share of the front's own."""
    volumes = [
        hypervolume(run[["f_dpo", "f_sft"]], ref.front.reference()) / ref.front_volume
        for _, run in rows.groupby("seed")
    ]
    points = [
        {"knob": knob} | _point_record(config, group, line, ref)
        for knob, group in rows.groupby("knob")
    ]
    return {"hypervolume_share": mean_interval(volumes)._asdict(), "points": points}


def _point_record(
    config: ParetoConfig, rows: pd.DataFrame, line: str, ref: Reference
) -> dict[str, Any]:
    delta = optimality_gaps(rows[["f_dpo", "f_sft"]], ref.ideal)
    distance = rows["ideal_distance"].to_numpy()
    measured: dict[str, Interval] = {
        "f_dpo": mean_interval(rows["f_dpo"]),
        "f_sft": mean_interval(rows["f_sft"]),
        "delta_dpo": mean_interval(delta[:, 0]),
        "delta_sft": mean_interval(delta[:, 1]),
        "ideal_distance": mean_interval(distance),
        "excess_ideal_distance": mean_interval(distance - ref.least_distance),
    }
    record: dict[str, Any] = {name: value._asdict() for name, value in measured.items()}
    return record | {"cost": _cost(config, rows, line)}


def _cost(config: ParetoConfig, rows: pd.DataFrame, line: str) -> dict[str, float]:
    """Per step: gradients of each objective, probes of both, and the cost model's total.

    The simulator's exact values are charged as a trainer would pay for them: one minibatch of both
    objectives at each refresh, nothing in between (a step computes its own loss).
    """
    dpo, sft = (rows[count].mean() / config.num_steps for count in COUNTS[:2])
    given = {"lam": rows["lam"].iloc[0], "refresh_every": config.refresh_every}
    scheduler = typical_scheduler("sequential" if line in ORDERS else line, given)
    total = cost_per_step(scheduler, costs=Costs(), p_dpo=dpo)
    counts = {"dpo_gradients": dpo, "sft_gradients": sft, "probes": scheduler.probes_per_step}
    return counts | {"cost_per_step": total}


def objective_paths(
    config: ParetoConfig, results: pd.DataFrame, problem: str
) -> dict[str, pd.DataFrame]:
    """Mean losses of the last iterate by step, from the start on: one table per line."""
    lam = middle(config.lams)
    start = make_problem(problem)
    losses = start.losses(start.start)
    rows = results[(results["problem"] == problem) & (results["iterate"] == "last")]
    paths = {}
    for line in config.lines:
        knob = EVEN_SPLIT if line in ORDERS else lam
        chosen = rows[(rows["line"] == line) & (rows["knob"] == knob)]
        mean = chosen.groupby("step")[["f_dpo", "f_sft"]].mean()
        mean.loc[0] = losses
        paths[line] = mean.sort_index()
    return paths


def plane_paths(lines: Sequence[str], lam: float) -> dict[str, NDArray[np.float64]]:
    """Last iterates on the 2-D problem, (steps + 1, seeds, 2) per line, the start included."""
    optima = ProblemOptima(make_problem(PLANE))
    half, seeds = PLANE_STEPS // 2, tuple(range(PLANE_SEEDS))
    known: dict[str, Any] = {"lam": (lam,) * PLANE_SEEDS, "seed": seeds}
    known |= {"optimum": optima.values, "refresh_every": 1, "first_steps": half}
    stage = np.append(np.arange(1, 10), log_spaced_steps(half, per_decade=12))
    paths = {}
    for line in lines:
        algorithm = "sequential" if line in ORDERS else line
        used = scheduler_options(algorithm)
        options = {k: v for k, v in (known | {"order": line}).items() if k in used}
        trace = simulate(
            optima.problem,
            make_scheduler(algorithm, **options),
            num_steps=PLANE_STEPS,
            step_size=StepSize(PLANE_SCALE * optima.problem.step_scale),
            seeds=seeds,
            record_steps=np.unique([*stage, *(half + stage)]),
        )
        start = np.broadcast_to(optima.problem.start, (1, PLANE_SEEDS, 2))
        paths[line] = np.concatenate([start, trace.theta["last"]])
    return paths
