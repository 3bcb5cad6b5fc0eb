"""From the recorded rounds to ratios, costs next to the cost model, and goodput."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any, NamedTuple

import numpy as np

from llm.benchmark.goodput import Work
from llm.benchmark.plan import (
    COMPARISONS,
    COSTS,
    EXPECTED_COST,
    GROUPS,
    Comparison,
    Contender,
    batches_of,
)
from llm.benchmark.pool import Record
from llm.benchmark.rows import tokens_of
from llm.benchmark.shapes import Batches, Shape
from llm.loss.objectives import Row
from theory.costs import Costs
from theory.metrics import mean_interval
from theory.tasks import Task

Records = Mapping[str, Record]


class Ratio(NamedTuple):
    """Median over rounds, and a 95% Student t interval of the geometric mean."""

    median: float
    low: float
    high: float


def paired_ratio(over: Sequence[float], under: Sequence[float]) -> Ratio:
    """Of two lists over the same rounds; with one round the interval is (0, infinity).

    Rounds that only one of them has (the later ones) are left out.
    """
    common = min(len(over), len(under))
    ratios = np.array(over[:common]) / np.array(under[:common])
    _, low, high = np.exp(mean_interval(np.log(ratios)))
    return Ratio(float(np.median(ratios)), float(low), float(high))


def seconds_per_unit(name: str, record: Record, group: str, shape: Shape) -> list[float]:
    """Of every round: per row (pair) in the suites on one objective, else per step."""
    units = record["steps_per_round"]
    if group in ("dpo", "sft"):
        units = rows_of_a_round(Contender(*name.split("/")).algo, batches_of(group, shape))
    return [seconds / units for seconds in record["seconds"]]


def rows_of_a_round(algo: str, batches: Batches) -> int:
    """In a suite on one objective every round is one pass over the same rows."""
    return batches.number * (batches.dpo if algo == "dpo" else batches.sft)


def summarise_group(
    group: str, suites: Sequence[str], records: Records, shape: Shape, device: str
) -> dict[str, Any]:
    """`comparisons` and `costs` of the suites of a group, as plain data."""
    times = {
        name: seconds_per_unit(name, record, group, shape)
        for name, record in records.items()
        if "failed" not in record
    }
    times |= expected_costs(records, times, shape)
    chosen = [suite for suite in GROUPS[group] if suite in suites]
    lines = [
        _comparison(suite, comparison.on(device), times, records)
        for suite in chosen
        for comparison in COMPARISONS[suite]
        if comparison.over in times and comparison.under in times
    ]
    costs = _costs(records, times) if "cost" in chosen else []
    return {"comparisons": lines, "costs": costs}


def _comparison(
    suite: str, comparison: Comparison, times: Mapping[str, list[float]], records: Records
) -> dict[str, Any]:
    if comparison.what == "memory":
        pair = [records[name]["peak_mib"] for name in (comparison.over, comparison.under)]
        ratio = Ratio(*[pair[0] / pair[1]] * 3)  # one peak each: no rounds, no interval
    else:
        ratio = paired_ratio(times[comparison.over], times[comparison.under])
    return {
        "suite": suite,
        "label": comparison.label,
        "what": comparison.what,
        "over": comparison.over,
        "under": comparison.under,
        **ratio._asdict(),
        "target": comparison.target,
        "sense": comparison.sense,
        "met": comparison.met(ratio.median),
    }


# ------------------------------------------------------------------------------ cost against theory


def expected_costs(
    records: Records, times: Mapping[str, list[float]], shape: Shape
) -> dict[str, list[float]]:
    """Seconds a step by the cost model, round by round, from the S and D of the same round."""
    if not {"ours/sft", "ours/dpo"} <= set(times):
        return {}
    return {
        EXPECTED_COST + name.removeprefix("ours/"): [
            expected_cost(sft, dpo, counts, shape.forward_share)
            for sft, dpo, counts in zip(
                times["ours/sft"], times["ours/dpo"], records[name]["rounds"], strict=True
            )
        ]
        for name in COSTS
        if name in times
    }


def expected_cost(sft: float, dpo: float, counts: Mapping[str, int], forward_share: float) -> float:
    """`theory.costs` with measured costs and the steps and probes that were taken.

    A forward pass is `forward_share` of a step. `counts` is the record of a round: whether the
    probe's forward pass was reused shows in the number of forward passes.
    """
    costs = Costs(
        sft=sft, dpo=dpo, probe=forward_share * (sft + dpo), sft_forward=forward_share * sft
    )
    dpo_steps, sft_steps, probes = (
        counts[name] / counts["steps"] for name in ("dpo_steps", "sft_steps", "probes")
    )
    reuse = reuses_probe(counts)
    return costs.per_step(dpo_steps, sft_steps, probes=probes, reuse_probe=reuse)


def reuses_probe(counts: Mapping[str, int]) -> bool:
    """A probe takes two forward passes; one of them may be that of the step."""
    return counts["probes"] > 0 and counts["forwards"] == counts["steps"] + counts["probes"]


def _costs(records: Records, times: Mapping[str, list[float]]) -> list[dict[str, Any]]:
    lines = []
    for name in COSTS:
        expected = times.get(EXPECTED_COST + name.removeprefix("ours/"))
        if expected is None:
            continue
        rounds = records[name]["rounds"]
        total = {key: sum(counts[key] for counts in rounds) for key in rounds[0]}
        lines.append(
            {
                "name": name,
                "seconds_per_step": median(times[name]),
                "expected": median(expected),
                "ratio": paired_ratio(times[name], expected)._asdict(),
                "dpo_share": total["dpo_steps"] / total["steps"],
                "probes": total["probes"],
                "steps": total["steps"],
                "reuses_probe": any(map(reuses_probe, rounds)),
            }
        )
    return lines


# ------------------------------------------------------------------------------------- throughput


def throughput(
    group: str,
    records: Records,
    rows: Mapping[Task, Sequence[Row]],
    shape: Shape,
    work: Work,
    tflops: float,
) -> list[dict[str, Any]]:
    """Per contender of a suite that trains `shape`: speed, goodput, memory; units a second."""
    mean_tokens = {task: float(np.mean([tokens_of(row) for row in rows[task]])) for task in rows}
    mean_flops = {task: float(np.mean([work.lean(row) for row in rows[task]])) for task in rows}
    lines = []
    for name, record in records.items():
        if "failed" in record:
            continue
        counts = _rows_seen(name, record, group, shape)
        seconds = fmean(record["seconds"])  # the rounds of a sequence are not alike
        tokens = sum(count * mean_tokens[task] for task, count in counts.items())
        flops = sum(count * mean_flops[task] for task, count in counts.items())
        notes = record["notes"]
        line = {
            "suite": group,
            "name": name,
            "seconds_per_step": seconds / record["steps_per_round"],
            "tokens_per_second": tokens / seconds,
            "pairs_per_second": counts.get(Task.DPO, 0.0) / seconds,
            "demonstrations_per_second": counts.get(Task.SFT, 0.0) / seconds,
            "goodput": flops / seconds / (tflops * 1e12),
            "peak_mib": record["peak_mib"],
            "before_mib": record["before_mib"],
        }
        if "cache_seconds" in notes:
            line["reference_seconds_per_pair"] = notes["cache_seconds"] / len(rows[Task.DPO])
        lines.append(line)
    return lines


def _rows_seen(name: str, record: Record, group: str, shape: Shape) -> dict[Task, float]:
    """Mean number of rows of each objective in a round."""
    batches = batches_of(group, shape)
    algo = Contender(*name.split("/")).algo
    if group != "joint":
        return {Task[algo.upper()]: float(rows_of_a_round(algo, batches))}
    sizes = {Task.DPO: batches.dpo, Task.SFT: batches.sft}
    steps = {
        task: np.mean([counts[f"{task.label}_steps"] for counts in record["rounds"]])
        for task in Task
    }
    return {task: float(steps[task] * sizes[task]) for task in Task if steps[task]}
