"""The cost model: what a step of each algorithm costs.

Unit: the forward pass of one SFT sequence. A backward pass costs two forwards, a preference pair
is two sequences, and the reference runs forward only:

    c_SFT = 1 + 2 = 3,    c_DPO = 2 + 2 + 4 = 8,    e = 1 + (2 + 2) = 5 (a probe of both).

A cached reference saves 2 in c_DPO and in e. With LoRA the backward pass computes no gradients of
the frozen weights and costs about 1 forward. These are counts, to be replaced by measured ones:
`Costs` takes any numbers, and only ratios matter.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from theory.scheduling import Scheduler


@dataclass(frozen=True)
class Costs:
    """Cost of an SFT step, of a DPO step, and of a probe (forward passes of both objectives)."""

    sft: float = 3.0
    dpo: float = 8.0
    probe: float = 5.0
    sft_forward: float = 1.0
    """Part of `probe` that belongs to SFT; the rest is the DPO forward, reference included."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (np.isfinite(value) and value > 0.0):
                raise ValueError(f"cost {field.name} is {value}; it must be positive and finite")
        if self.sft_forward >= self.probe:
            raise ValueError(f"probe is {self.probe}; it must exceed its SFT part")

    def per_step(
        self, dpo: float, sft: float, *, probes: float = 0.0, reuse_probe: bool = False
    ) -> float:
        """A step with `dpo` and `sft` gradients of each objective and `probes` of both losses.

        With `reuse_probe` the step trains on the forward pass of its probe.
        """
        forward = dpo * (self.probe - self.sft_forward) + sft * self.sft_forward
        return dpo * self.dpo + sft * self.sft + probes * (self.probe - forward * reuse_probe)

    @classmethod
    def counted(cls, *, backward: float = 2.0, pair: float = 2.0, cached: bool = False) -> Costs:
        """From the cost of a backward pass and the relative length of a pair (in sequences)."""
        reference = 0.0 if cached else pair
        return cls(
            sft=1.0 + backward,
            dpo=pair * (1.0 + backward) + reference,
            probe=1.0 + pair + reference,
        )

    @classmethod
    def cached(cls) -> Costs:
        """Reference log-probabilities computed once, before training: 3, 6 and 3."""
        return cls.counted(cached=True)

    @classmethod
    def lora(cls, *, cached: bool = False) -> Costs:
        """Adapters, so that backward costs about 1: 2, 6 and 5, or 2, 4 and 3 if cached."""
        return cls.counted(backward=1.0, cached=cached)


def cost_per_step(
    scheduler: Scheduler, *, costs: Costs, p_dpo: float | None = None, reuse_probe: bool = False
) -> float:
    """Expected cost of one optimiser step of one run, in the unit of `costs`.

        g_1 c_DPO + g_2 c_SFT + n e

    with g the gradients of each objective that a step pays for and n the probes of both losses
    (`Scheduler.gradients_per_step`, `probes_per_step`): (1, 1) for Mix inside (0, 1),
    (lam, 1 - lam) for ALRIGHT and alternation, n = 1/k for MAXRIGHT(k). Where the gradients depend
    on the problem or on the length of the run (MAXRIGHT, sequential) they are (p, 1 - p) with the
    share `p_dpo` of steps on DPO, which must then be given. `reuse_probe` as in `Costs.per_step`.

    Raises:
        ValueError: for a missing or impossible p_dpo, or a batch of several runs.
    """
    if scheduler.runs != ():
        raise ValueError("the cost of a step is that of one run; this scheduler holds several")
    gradients = _gradients(scheduler, p_dpo)
    return costs.per_step(*gradients, probes=scheduler.probes_per_step, reuse_probe=reuse_probe)


def _gradients(scheduler: Scheduler, p_dpo: float | None) -> tuple[float, float]:
    if scheduler.gradients_per_step is not None:
        dpo, sft = scheduler.gradients_per_step.tolist()
        return dpo, sft
    if p_dpo is None:
        raise ValueError(f"{scheduler.describe()}: how often does it step on DPO? give p_dpo")
    if not 0.0 <= p_dpo <= 1.0:
        raise ValueError(f"p_dpo is {p_dpo}; it is a share of steps and must lie in [0, 1]")
    return p_dpo, 1.0 - p_dpo
