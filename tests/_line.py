"""A comparison and runs whose end points are known: two parabolas on a line.

f_DPO = SCALE (x - 1)^2 / 2 and f_SFT = SCALE x^2 / 2, both optima 0: Mix ends at x = lam, MAXRIGHT
where sqrt(lam) (1 - x) = sqrt(1 - lam) x, a stage at its own minimiser.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from llm.validate.source import Comparison, read_comparison
from theory.costs import Costs, cost_per_step
from theory.records import write_json, write_parquet
from theory.registry import typical_scheduler
from theory.schedulers import ORDERS
from theory.tasks import Task

LAMS = (0.25, 0.5, 0.75)
SEEDS = range(4)
SCALE = 4.0
NOISE = 2e-4
"""Scatter of end points over seeds: far below every difference that is tested."""


def losses(x: float) -> dict[str, float]:
    return {"f_dpo": SCALE * (x - 1.0) ** 2 / 2.0, "f_sft": SCALE * x**2 / 2.0}


def equalised(lam: float) -> float:
    return float(np.sqrt(lam) / (np.sqrt(lam) + np.sqrt(1.0 - lam)))


def row(line: str, knob: float, x: float, seed: int, cost: float) -> dict[str, Any]:
    sequential = line in ORDERS
    weight = knob if not sequential or line == "dpo_then_sft" else 1.0 - knob
    jitter = NOISE * np.sin(7.0 * seed + 11.0 * knob + len(line))
    return {
        "budget": "steps",
        "line": line,
        "knob": knob,
        "weight": weight,
        "algorithm": "sequential" if sequential else line,
        "order": line if sequential else "",
        "split": knob if sequential else np.nan,
        "lam": np.nan if sequential else knob,
        "seed": seed,
        "learning_rate": 1e-3,
        "num_steps": 100,
        "refresh_every": 10.0 if line == "maxright" else np.nan,
        "failed": "",
        **losses(x + jitter),
        "p_dpo": weight,
        "seconds_per_step": 0.01 * cost * (1.0 + 10.0 * jitter),
        "cost_per_step": cost,
    }


def results() -> pd.DataFrame:
    ends: list[tuple[str, float, float]] = []
    for lam in LAMS:
        ends += [("mix", lam, lam), ("alright", lam, lam), ("maxright", lam, equalised(lam))]
    ends += [("dpo_then_sft", 0.5, 0.02), ("sft_then_dpo", 0.5, 0.98)]
    rows = []
    for line, knob, x in ends:
        name = "sequential" if line in ORDERS else line
        cost = cost_per_step(
            typical_scheduler(name, {"lam": knob}), costs=Costs.cached(), p_dpo=knob
        )
        rows += [row(line, knob, x, seed, cost) for seed in SEEDS]
    return pd.DataFrame(rows)


def comparison(folder: Path, frame: pd.DataFrame, **summary: Any) -> Comparison:
    """Written to disk and read back, as the command does."""
    costs = {"sft_step": 3.0, "dpo_step": 6.0, "probe": 3.0}
    lines = sorted(set(frame["line"]))
    tuned = {name: {"f_mix": {"0.0001": 1.0, "0.001": 0.5, "0.01": 2.0}} for name in lines}
    base = {
        "problem": "a line",
        "steps": 100,
        "seeds": len(SEEDS),
        "optima": {
            "dpo": 0.0,
            "sft": 0.0,
            "undercut": {task.label: {"runs": 0, "most": 0.0} for task in Task},
        },
        "tuning": {"chosen": dict.fromkeys(lines, 1e-3), "lines": tuned},
        "costs": costs,
    }
    paths = pd.concat([frame.assign(step=80), frame.assign(step=100)])
    write_json(folder / "config.json", {"command": "python -m llm.compare --use_cpu true"})
    write_json(folder / "summary.json", base | summary)
    write_parquet(folder / "results.parquet", frame)
    write_parquet(folder / "paths.parquet", paths)
    return read_comparison(folder)


def moved(line: str, place: Callable[[float], float]) -> pd.DataFrame:
    """The comparison with the end points of one line moved to place(knob)."""
    frame = results()
    for index, own in frame[frame["line"] == line].iterrows():
        jitter = NOISE * np.cos(5.0 * own["seed"] + own["knob"])
        for name, value in losses(place(own["knob"]) + jitter).items():
            frame.loc[index, name] = value
    return frame


def ends(place: Callable[[float], float], lams: tuple[float, ...] = LAMS) -> pd.DataFrame:
    """End points on the line for each lam and seed, with the columns of `Bench.run`."""
    rows = []
    for lam in lams:
        for seed in SEEDS:
            x = place(lam) + NOISE * np.sin(3.0 * seed + 5.0 * lam)
            rows.append({"lam": lam, "seed": seed, "p_dpo": x, **losses(x)})
    return pd.DataFrame(rows).assign(norm_dpo=10.0, norm_sft=1.0)
