"""What a failed prediction is not due to: learning rate, clipping, lock-out, too few steps.

P1 to P5 follow from optimality alone, so that where one fails its runs have not reached what they
were to minimise. Each cause is held against what the comparison and the studies measured; where
neither speaks, it is not ruled out. P6 is about seconds and has causes of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm.compare.results import predictions_table
from llm.validate.source import Comparison
from theory.metrics import mean_interval, mix_value, optimality_gaps
from theory.predictions import Verdict
from theory.predictions.claims import CostPerStep
from theory.registry import flags_of
from theory.schedulers import ORDERS
from theory.tasks import Task

Array = NDArray[np.float64]
LAST_SHARE = 0.2
"""The part of a run at its end in which it is asked whether it still moved."""
TO_COME = 1.0 / ((1.0 - LAST_SHARE) ** -0.5 - 1.0)
"""What c / sqrt(T), the rate of T1, still has to fall after T steps, over its fall in that part."""
LOAD_SCATTER = 0.1
"""P6's tolerance."""


def ruled_out(
    comparison: Comparison, verdict: Verdict, found: dict[str, Any]
) -> list[dict[str, Any]]:
    """{cause, ruled_out, evidence} for each cause. `found`: verdicts of hypotheses by name."""
    if verdict.prediction == "P6":
        return [_other_steps(comparison), _load(comparison), _overhead()]
    lines = _lines(comparison, verdict)
    return [
        _learning_rate(comparison, lines),
        _clipping(comparison, lines, found),
        _lock_out(comparison, lines, found),
        _few_steps(comparison, lines, verdict),
    ]


def _cause(name: str, excluded: bool, evidence: str) -> dict[str, Any]:
    return {"cause": name, "ruled_out": excluded, "evidence": evidence}


def _lines(comparison: Comparison, verdict: Verdict) -> list[str]:
    """The lines that the deciding claim and the violated ones name."""
    text = " ".join((verdict.claim, *verdict.violated))
    names = [n for n in comparison.rates if n in text or (n in ORDERS and "sequential" in text)]
    if verdict.prediction == "P3":
        names = ["maxright"]
    return [n for n in names if n in comparison.rates] or list(comparison.rates)


def _learning_rate(comparison: Comparison, lines: list[str]) -> dict[str, Any]:
    tuned = comparison.summary["tuning"].get("lines") or {}
    if not tuned:
        return _cause("learning rate", False, "not tuned: one rate for all")
    border = []
    for line in lines:
        grid = sorted(float(rate) for rate in tuned.get(line, {}).get("f_mix", {}))
        chosen = comparison.rates[line]
        if not grid or np.isclose(chosen, (grid[0], grid[-1])).any():
            border.append(line)
    if border:
        words = f"the best rate of {', '.join(border)} is at the border of the grid"
        return _cause("learning rate", False, words)
    return _cause("learning rate", True, "the best rate lies inside the grid for every run named")


def _clipping(comparison: Comparison, lines: list[str], found: dict[str, Any]) -> dict[str, Any]:
    training = comparison.config.run.training
    alternating = [line for line in lines if line in ("alright", "maxright", "importance")]
    if not training.max_grad_norm:
        return _cause("clipping", True, "the runs are not clipped")
    if not alternating:
        return _cause("clipping", True, "each step named holds one gradient of its objective")
    if training.clipping == "per_step":
        return _cause("clipping", False, "each objective is clipped by itself")
    study = found.get("one factor for both objectives keeps lam")
    words = "one factor clips both objectives"
    if study is None:
        return _cause("clipping", True, words)
    return _cause("clipping", study != "fails", f"{words}; that it keeps lam: {study}")


def _lock_out(comparison: Comparison, lines: list[str], found: dict[str, Any]) -> dict[str, Any]:
    training = comparison.config.run.training
    if "maxright" not in lines:
        return _cause("lock-out", True, "no run of MAXRIGHT is named")
    if training.value_source == "held_out":
        return _cause("lock-out", True, "values come from rows held out")
    period = training.schedule.get("refresh_every", flags_of("maxright")["refresh_every"].default)
    study = found.get("stale minibatch values lock out, by the gap ratio", "not studied")
    words = f"values from minibatches, refreshed every {period} steps; lock-out: {study}"
    return _cause("lock-out", False, words)


def _few_steps(comparison: Comparison, lines: list[str], verdict: Verdict) -> dict[str, Any]:
    """Ruled out if what the claim is about has less to go than the violation, at theory's rate.

    That is f_Mix in nats, for P3 log(delta_DPO/delta_SFT); what it has to go is extrapolated from
    the end of the runs (`TO_COME`). A rising f_Mix is no lack of steps.
    """
    slope = verdict.prediction == "P3"
    paths = comparison.paths
    rows = paths[(paths["budget"] == comparison.budget) & paths["line"].isin(lines)]
    moves: dict[Any, list[float]] = {}
    for (line, weight, _), run in rows.groupby(["line", "weight", "seed"]):
        run = run.sort_values("step")
        losses = run[["f_dpo", "f_sft"]].to_numpy()
        value = _log_ratio(comparison, losses) if slope else mix_value(losses, float(weight))
        late = run["step"].to_numpy() >= (1.0 - LAST_SHARE) * run["step"].max()
        earlier = value[~late][-1:] if (~late).any() else value[:1]
        moves.setdefault((line, weight), []).append(float(earlier[0] - value[-1]))
    if not moves:
        return _cause("too few steps", False, "no paths were recorded")
    means = [mean_interval(values).mean for values in moves.values()]
    most = float(np.max(np.abs(means) if slope else means))  # NaN, without a logarithm, stays
    what = "the log of the gaps' ratio moved" if slope else "f_Mix fell"
    words = f"{what} by {most:.3g} at most in the last {LAST_SHARE:.0%} of a run"
    words += f", so by about {TO_COME * most:.3g} with more steps at the rate 1/sqrt(T)"
    needed = abs(verdict.margin - verdict.threshold)
    excluded = TO_COME * most < needed
    return _cause("too few steps", excluded, f"{words}; the violation is {needed:.3g}")


def _log_ratio(comparison: Comparison, losses: Array) -> Array:
    """log(delta_DPO/delta_SFT); NaN at or below an optimum."""
    gaps = optimality_gaps(losses, comparison.optima.values)
    known = np.where(gaps > 0.0, gaps, np.nan)
    return np.asarray(np.log(known[:, Task.DPO] / known[:, Task.SFT]), dtype=np.float64)


def _other_steps(comparison: Comparison) -> dict[str, Any]:
    """P6: the tokens of the runs, counted, against the model's cost of a step."""
    model = CostPerStep(costs=comparison.costs)
    rows = comparison.results[comparison.results["failed"] == ""]
    counted = rows[rows["budget"] == comparison.budget]
    names = {"cost_per_step": "seconds_per_step"}
    counted = counted.drop(columns="seconds_per_step").rename(columns=names)
    table = predictions_table(counted, comparison.budget)
    outcome = model.test(table, comparison.optima).outcome
    words = f"costs counted in tokens are in the model's ratios: {outcome}"
    return _cause("other steps than planned", outcome == "holds", words)


def _load(comparison: Comparison) -> dict[str, Any]:
    """P6: runs of one setting should take the same time, if nothing else ran beside them."""
    groups = comparison.table.groupby(["algorithm", "order", "split", "lam"], dropna=False)["cost"]
    spread = float((groups.std() / groups.mean()).max())
    words = f"seconds per step of one setting scatter by up to {spread:.0%} over its seeds"
    return _cause("load of the machine", spread < LOAD_SCATTER, words)


def _overhead() -> dict[str, Any]:
    words = "seconds hold what every step costs whatever its tokens: small on large models only"
    return _cause("fixed cost of a step", False, words)
