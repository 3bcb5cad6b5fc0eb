"""Hypothesis 1: clipping each objective by itself makes ALRIGHT serve another lam.

Runs of ALRIGHT without clipping, with one factor for both objectives (`global`) and with each step
clipped by itself (`per_step`), against the curve of Mix without clipping (`effective`). The shift
is that of logit(lam') against the same seed without clipping, a mean over lam: whatever else moves
lam' (Adam, too few steps, the finite curve) is in both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import logit

from llm.compare.runs import Run
from llm.validate.bench import UNCLIPPED, Bench
from llm.validate.effective import clipped_lam, effective_lam, paired
from llm.validate.quantities import Quantity, above, hypothesis, measured
from theory.predictions.verdicts import Estimate, within

SOURCE = "clipping"
CURVE = (0.1, 0.25, 0.5, 0.75, 0.9)
"""The lam of Mix between which effective values are interpolated."""
TOLERANCE = 0.2
"""In logit(lam), which is 0.05 at lam 1/2: a shift that counts as none."""


@dataclass(frozen=True)
class ClippingRuns:
    """`mix` is the curve; `arms` holds ALRIGHT's end points by rule; `max_norm` the clip."""

    mix: pd.DataFrame
    arms: dict[str, pd.DataFrame]
    max_norm: float


def run_clipping(bench: Bench) -> ClippingRuns:
    mix = bench.run("mix", _runs(bench, "mix", CURVE), UNCLIPPED)
    alright = _runs(bench, "alright", bench.lams)
    arms = {"none": bench.run("clip-none", alright, UNCLIPPED)}
    norm = bench.config.clip_norm or _between(arms["none"])
    for rule in ("global", "per_step"):
        flags = {"max_grad_norm": norm, "clipping": rule}
        arms[rule] = bench.run(f"clip-{rule}-{norm:g}", alright, flags)
    return ClippingRuns(mix, arms, norm)


def _runs(bench: Bench, algorithm: str, lams: tuple[float, ...]) -> list[Run]:
    rate = bench.comparison.rate(algorithm, "mix", "alright")
    steps = bench.config.study_steps
    return [
        Run(algorithm, steps, rate, seed, knob=lam, path=False)
        for lam in lams
        for seed in bench.seeds
    ]


def _between(runs: pd.DataFrame) -> float:
    """The smaller of the two mean norms: one objective is clipped, the other hardly."""
    return float(f"{min(gradient_norms(runs)):.3g}")


def gradient_norms(runs: pd.DataFrame) -> tuple[float, float]:
    """Mean norms of the unclipped gradients of (DPO, SFT) along the runs."""
    return float(runs["norm_dpo"].mean()), float(runs["norm_sft"].mean())


def shifts(runs: ClippingRuns, rule: str) -> dict[int, float]:
    """logit(lam') under `rule` less that without clipping, mean over lam, by seed."""
    logits = {}
    for name in (rule, "none"):
        frame = runs.arms[name]
        values = logit(effective_lam(runs.mix, frame))
        logits[name] = frame.assign(value=values).groupby("seed")["value"].mean().to_dict()
    return {seed: logits[rule][seed] - logits["none"][seed] for seed in logits[rule]}


def clipping_quantities(runs: ClippingRuns) -> Iterator[Quantity]:
    norms = gradient_norms(runs.arms["none"])
    ratio = norms[0] / norms[1]
    note = f"mean norms {norms[0]:.3g} and {norms[1]:.3g}; clip {runs.max_norm:g}"
    yield Quantity(SOURCE, "gradient norms, DPO / SFT", "-", ratio, ratio, ratio, "", note)
    for rule, frame in runs.arms.items():
        values = frame.assign(value=effective_lam(runs.mix, frame))
        for lam, own in values.groupby("lam"):
            theory = clipped_lam(float(lam), norms, runs.max_norm) if rule == "per_step" else lam
            name = f"effective lam of ALRIGHT, clipping {rule}, lam {lam:g}"
            yield measured(SOURCE, name, float(theory), own["value"])


def clipping_hypotheses(runs: ClippingRuns) -> Iterator[dict[str, Any]]:
    dpo, sft = gradient_norms(runs.arms["none"])
    sign = -1.0 if dpo > sft else 1.0
    each = np.array(list(shifts(runs, "per_step").values()))
    whole = np.array(list(shifts(runs, "global").values()))
    statement = "clipping each objective by itself shifts the effective lam of ALRIGHT "
    towards = "SFT" if dpo > sft else "DPO"
    expected = [
        logit(clipped_lam(lam, (dpo, sft), runs.max_norm)) - logit(lam)
        for lam in runs.arms["none"]["lam"].unique()
    ]
    yield hypothesis(
        "per-objective clipping shifts lam",
        statement + f"towards {towards}, whose gradients are the smaller",
        f"shift {np.mean(expected):+.3f} in logit(lam), from the gradient norms alone",
        each,
        [above("shift in the predicted direction", sign * each)],
    )
    kept = within("shift of global clipping", Estimate.from_seeds(whole), 0.0, TOLERANCE)
    yield hypothesis(
        "one factor for both objectives keeps lam",
        f"global clipping moves logit(lam) by less than {TOLERANCE:g}",
        "shift 0",
        whole,
        kept,
    )
    both = paired(shifts(runs, "per_step"), shifts(runs, "global"))
    yield hypothesis(
        "the remedy for clipping works",
        "global clipping shifts lam less than clipping each objective by itself",
        "the difference of the shifts has the sign of the shift",
        both,
        [above("difference of the shifts", sign * both)],
    )
