"""Hypothesis 2: MAXRIGHT with stale values from minibatches stops answering to lam.

The response is the slope of log(delta_DPO / delta_SFT) on logit(lam), -1 where the weighted gaps
are equal (`theory.beyond.lockout`). Values come from small training batches, refreshed ever more
rarely; then from the remedies: rows held out, and a moving average. Held-out values stay between
two probes, so that at a rare refresh they make long blocks: no remedy for rareness itself.

Noise can do worse than weaken the response: a batch whose loss lies below f* has a negative gap,
which a larger lam makes more negative, so that DPO's share falls with lam.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pandas as pd

from llm.compare.runs import Run
from llm.train.values import DEFAULT_ROWS
from llm.validate.bench import Bench
from llm.validate.effective import paired, share_slopes, slopes
from llm.validate.quantities import Quantity, above, hypothesis, measured, missing
from theory.predictions.paper_numbers import MAXRIGHT_SLOPE
from theory.predictions.paper_numbers import SOURCE as PUBLISHED
from theory.tasks import Task

SOURCE = "lock-out"
BATCH_SIZE = 4
"""Rows of a step: noisy values are what the hypothesis is about."""
EMA_WEIGHT = 0.1
"""A memory of ten values. The theory's 0.02 would lag behind losses that fall in 100 steps."""
REMEDIES: dict[str, dict[str, Any]] = {
    "held_out": {"value_source": "held_out"},
    "ema": {"value_ema": EMA_WEIGHT},
}
TRAIN = "train"

Arms = dict[tuple[str, int], pd.DataFrame]
"""End points by (source of the values, refresh_every)."""
Response = dict[tuple[str, int], dict[int, float]]
"""The response to lam of each arm, by seed."""


def run_lockout(bench: Bench) -> Arms:
    periods = bench.config.periods
    arms = {(TRAIN, k): _run(bench, TRAIN, k, {}) for k in periods}
    smallest = min(len(bench.setup.train[task].rows) for task in Task)
    rows = max(min(DEFAULT_ROWS, smallest // 4), 1)
    for (name, flags), k in product(REMEDIES.items(), periods[1:] or periods):
        own = {"value_rows": rows} if name == "held_out" else {}
        arms[name, k] = _run(bench, name, k, flags | own)
    return arms


def _run(bench: Bench, name: str, period: int, flags: dict[str, Any]) -> pd.DataFrame:
    rate = bench.comparison.rate("maxright", "alright")
    runs = [
        Run(
            *("maxright", bench.config.study_steps, rate, seed),
            knob=lam,
            optimum=bench.optimum,
            path=False,
        )
        for lam in bench.lams
        for seed in bench.seeds
    ]
    sizes = {
        "per_device_train_batch_size": BATCH_SIZE,
        "sft_per_device_train_batch_size": None,
        "dpo_per_device_train_batch_size": None,
    }
    values = {"value_source": None, "value_rows": None, "value_ema": 1.0}
    shared = sizes | values | {"refresh_every": period} | flags
    return bench.run(f"values-{name}-every-{period}", runs, shared)


def lockout_quantities(arms: Arms, optimum: tuple[float, float]) -> Iterator[Quantity]:
    slope, error = MAXRIGHT_SLOPE.mean, MAXRIGHT_SLOPE.bound
    label = "slope of log gap ratio on logit lam: published runs of MAXRIGHT"
    yield Quantity(SOURCE, label, -1.0, slope, slope - error, slope + error, "", PUBLISHED)
    for (name, period), runs in arms.items():
        where = f"MAXRIGHT, values {name}, refresh_every {period}"
        response = slopes(runs, optimum)
        label = f"slope of log gap ratio on logit lam: {where}"
        left_out = runs["seed"].nunique() - len(response)
        note = f"{left_out} seeds ended below an estimated optimum" if left_out else ""
        if response:
            yield measured(SOURCE, label, -1.0, list(response.values()), note=note)
        else:
            yield missing(SOURCE, label, -1.0, note)
        shares = list(share_slopes(runs).values())
        claims = [above("the share rises with lam", shares)]
        yield measured(SOURCE, f"slope of DPO's share on lam: {where}", "> 0", shares, claims)


def lockout_hypotheses(arms: Arms, optimum: tuple[float, float]) -> Iterator[dict[str, Any]]:
    """By two responses, both larger the better: minus the slope of the gaps, and that of the share.

    The share of DPO steps needs no estimate of an optimum, but theory asks no value of it.
    """
    gaps = {arm: {s: -x for s, x in slopes(runs, optimum).items()} for arm, runs in arms.items()}
    shares = {arm: share_slopes(runs) for arm, runs in arms.items()}
    for what, response in (("gap ratio", gaps), ("DPO's share", shares)):
        yield from _lock_out(what, response)
        yield from _remedies(what, response)


def _lock_out(what: str, response: Response) -> Iterator[dict[str, Any]]:
    periods = sorted(k for name, k in response if name == TRAIN)
    if len(periods) > 1:
        loss = paired(response[TRAIN, periods[0]], response[TRAIN, periods[-1]])
        yield hypothesis(
            f"stale minibatch values lock out, by the {what}",
            f"the response to lam is weaker at refresh_every {periods[-1]} than at {periods[0]}",
            "> 0 (difference of the responses)",
            loss,
            [above("the response weakens", loss)],
        )


def _remedies(what: str, response: Response) -> Iterator[dict[str, Any]]:
    for name, period in response:
        if name == TRAIN or period != max(k for _, k in response):
            continue
        gain = paired(response[name, period], response[TRAIN, period])
        yield hypothesis(
            f"{name} values restore the response, by the {what}",
            f"at refresh_every {period} the response to lam is stronger than with train values",
            "> 0 (difference of the responses)",
            gain,
            [above("the response strengthens", gain)],
        )
