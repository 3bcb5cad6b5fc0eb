"""The number of switches against the gap (T7): from alternation to sequential on a language model.

`alternate` at lam 1/2 with cycles of n steps, at a constant learning rate (a decaying one would
weigh the last cycle least). The gap is f_Mix at the end less that of Mix for as many steps and the
same seed, on held-out rows. Next to it stands T7's D M sqrt(n/T), with D the distance that Mix
went and M the mean norm of the minibatch gradients: proved for convex losses and SGD, so here
a yardstick, and an upper bound: the slope of the gap need not be its 1/2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from llm.compare.runs import Run
from llm.validate.bench import Bench
from llm.validate.quantities import Quantity, above, measured, missing
from theory.metrics import fit_slope, mix_value

SOURCE = "switches (T7)"
LAM = 0.5
MOST_CYCLES = 6
CONSTANT = {"lr_scheduler_type": "constant_with_warmup"}


@dataclass(frozen=True)
class SwitchRuns:
    """Excess of f_Mix over Mix of the same seed, {cycle: (seeds,)}, and what T7 needs."""

    gaps: dict[int, np.ndarray]
    steps: int
    distance: float
    norm: float

    def bound(self, cycle: int) -> float:
        return self.distance * self.norm * float(np.sqrt(cycle / self.steps))


def cycles(steps: int) -> list[int]:
    """At most MOST_CYCLES even divisors of `steps`, 2 and `steps` among them, evenly in the log."""
    found = [n for n in range(2, steps + 1, 2) if steps % n == 0]
    if not found:
        return []
    wanted = np.geomspace(found[0], found[-1], MOST_CYCLES)
    return sorted({min(found, key=lambda n: abs(np.log(n / w))) for w in wanted})


def run_switches(bench: Bench) -> SwitchRuns:
    steps = bench.config.study_steps - bench.config.study_steps % 2
    rate = bench.comparison.rate("alright", "mix")

    def runs(algorithm: str) -> list[Run]:
        return [Run(algorithm, steps, rate, s, knob=LAM, path=False) for s in bench.seeds]

    mix = bench.run("constant-mix", runs("mix"), CONSTANT, keep_models=True)
    base = _gap_base(mix)
    gaps, blocks = {}, pd.DataFrame()
    for n in cycles(steps):
        blocks = bench.run(f"cycle-{n}", runs("alternate"), CONSTANT | {"cycle": n})
        gaps[n] = _gap_base(blocks) - base
    norm = LAM * blocks["norm_dpo"].mean() + (1.0 - LAM) * blocks["norm_sft"].mean()
    return SwitchRuns(gaps, steps, _distance(bench, mix), float(norm))


def _gap_base(runs: pd.DataFrame) -> np.ndarray:
    return mix_value(runs.sort_values("seed")[["f_dpo", "f_sft"]].to_numpy(), LAM)


def _distance(bench: Bench, mix: pd.DataFrame) -> float:
    """|theta - theta_start| of the first seed's Mix, in the trained parameters."""
    start, end = bench.setup.new_policy(), bench.load(mix["folder"].iloc[0])
    pairs = zip(start.parameters(), end.parameters(), strict=True)
    squares = [(a.detach().cpu().double() - b.detach().cpu().double()).square().sum()
               for a, b in pairs if a.requires_grad]  # fmt: skip
    return float(torch.stack(squares).sum().sqrt())


def switch_quantities(runs: SwitchRuns) -> Iterator[Quantity]:
    for n, gap in runs.gaps.items():
        bound = runs.bound(n)
        name = f"gap to Mix at {2 * runs.steps // n - 1} switches (cycle {n})"
        yield measured(SOURCE, name, f"<= {bound:.3g}", gap, [above("below T7", bound - gap)])
    order = sorted(runs.gaps)
    if len(order) > 1:
        more = runs.gaps[order[-1]] - runs.gaps[order[0]]
        name = f"gap at cycle {order[-1]} less that at {order[0]}"
        yield measured(SOURCE, name, "> 0", more, [above("switches close the gap", more)])
    yield _slope(runs)


def _slope(runs: SwitchRuns) -> Quantity:
    """Over the longest cycles whose gaps are positive for every seed: a logarithm needs that."""
    name, theory = "log-log slope of the gap on the cycle", "bound 0.5; drift 2 below the plateau"
    kept: list[int] = []
    for n in sorted(runs.gaps, reverse=True):
        if not np.all(runs.gaps[n] > 0.0):
            break
        kept.insert(0, n)
    if len(kept) < 2:
        return missing(SOURCE, name, theory, "fewer than two cycles have a positive gap throughout")
    values = np.stack([runs.gaps[n] for n in kept], axis=1)
    return measured(SOURCE, name, theory, fit_slope(kept, values), note=f"cycles {kept}")
