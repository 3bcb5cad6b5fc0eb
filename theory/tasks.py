"""The two objectives and their order: the only place where that order exists."""

from __future__ import annotations

from enum import IntEnum


class Task(IntEnum):
    """An objective; its integer is its position on every last axis of length two.

    `lam` weighs DPO and `1 - lam` weighs SFT everywhere: w = (lam, 1 - lam).
    """

    DPO = 0
    SFT = 1

    @property
    def other(self) -> Task:
        return Task(1 - self)

    @property
    def label(self) -> str:
        """Lower-case name used in files, flags and column names."""
        return self.name.lower()
