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

from theory.schedulers import make_scheduler


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
    algorithm: str,
    *,
    lam: float,
    costs: Costs,
    refresh_every: int = 10,
    p_dpo: float | None = None,
    cycle: int | None = None,
    reuse_probe: bool = False,
) -> float:
    """Expected cost of one optimiser step, in the unit of `costs`.

    With p the share of steps that go to DPO:

        dpo, sft, sequential, alright, importance, alternate    p c_DPO + (1 - p) c_SFT
        mix (0 < lam < 1; at the ends, the one objective)        c_DPO + c_SFT
        maxright(k)                                              p c_DPO + (1 - p) c_SFT + e / k

    p is lam for ALRIGHT and round(lam n) / n for alternation in cycles of n. Otherwise it must be
    given as `p_dpo`: the split of sequential training, the sampling probability of importance
    sampling, and for MAXRIGHT a measured share, since it depends on the problem. (`p_dpo` is read
    for these three only.) `reuse_probe` trains on the forward pass of the probe, which saves the
    chosen objective's forward once per refresh.

    Raises:
        ValueError: for an unknown algorithm, a missing p_dpo or cycle, or a number out of range.
    """
    if algorithm == "mix":
        make_scheduler(algorithm, lam=lam)  # checks lam
        return costs.dpo * (lam > 0.0) + costs.sft * (lam < 1.0)
    share = _dpo_share(algorithm, lam, p_dpo, cycle)
    step = share * costs.dpo + (1.0 - share) * costs.sft
    if algorithm != "maxright":
        return step
    if refresh_every < 1:
        raise ValueError(f"refresh_every is {refresh_every}; it must be at least 1")
    forward = share * (costs.probe - costs.sft_forward) + (1.0 - share) * costs.sft_forward
    return step + (costs.probe - forward * reuse_probe) / refresh_every


def _dpo_share(algorithm: str, lam: float, p_dpo: float | None, cycle: int | None) -> float:
    if algorithm in ("dpo", "sft"):
        return float(algorithm == "dpo")
    if algorithm == "alright":
        make_scheduler(algorithm, lam=lam)
        return lam
    if algorithm == "alternate":
        if cycle is None:
            raise ValueError("the cost of 'alternate' depends on its cycle: give cycle")
        make_scheduler(algorithm, lam=lam, cycle=cycle)
        return float(np.round(lam * cycle) / cycle)
    if algorithm not in ("sequential", "maxright", "importance"):
        raise ValueError(f"there is no cost model for algorithm {algorithm!r}")
    if p_dpo is None:
        raise ValueError(f"lam does not say how often {algorithm!r} steps on DPO: give p_dpo")
    if not 0.0 <= p_dpo <= 1.0:
        raise ValueError(f"p_dpo is {p_dpo}; it is a share of steps and must lie in [0, 1]")
    return p_dpo
