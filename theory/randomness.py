"""Counter-based randomness: every draw is a pure function of (seed, stream, step).

Philox is a counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011): key = (seed, stream), counter = (0, block, 0, 0). Nothing is carried from one draw to the
next, so a resumed run, another rank and a batched simulation see the same numbers without talking.
"""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

BLOCK = 1024
"""Steps that share one counter block. Part of the definition of the streams: never change it."""


class Stream(IntEnum):
    """Independent streams of one seed."""

    DECISION = 0
    DPO_SAMPLE = 1
    SFT_SAMPLE = 2
    PROBLEM = 3
    DPO_ORDER = 4
    SFT_ORDER = 5
    DPO_PROBE = 6
    SFT_PROBE = 7


def generator(seed: int, stream: Stream, block: int = 0) -> np.random.Generator:
    """The generator at the start of counter block `block` of stream `stream` of seed `seed`."""
    philox = np.random.Philox(key=[seed, int(stream)], counter=[0, block, 0, 0])
    return np.random.Generator(philox)


@lru_cache(maxsize=16)
def uniforms(
    seeds: tuple[int, ...], stream: Stream, block: int, width: int = 1
) -> NDArray[np.float64]:
    """Uniform draws on [0, 1) for the steps of one block, shape (len(seeds), BLOCK, width)."""
    draws = [generator(seed, stream, block).random((BLOCK, width)) for seed in seeds]
    return _frozen(draws)


@lru_cache(maxsize=16)
def normals(
    seeds: tuple[int, ...], stream: Stream, block: int, width: int = 1
) -> NDArray[np.float64]:
    """Standard normal draws for the steps of one block, shape (len(seeds), BLOCK, width)."""
    draws = [generator(seed, stream, block).standard_normal((BLOCK, width)) for seed in seeds]
    return _frozen(draws)


def uniform_at(seeds: tuple[int, ...], stream: Stream, step: int) -> NDArray[np.float64]:
    """The uniform draw of step `step` (counted from 0) for each seed, shape (len(seeds),)."""
    block, offset = divmod(step, BLOCK)
    return uniforms(seeds, stream, block)[:, offset, 0]


def _frozen(draws: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Stack and write-protect: the arrays are shared through the cache."""
    stacked = np.stack(draws)
    stacked.flags.writeable = False
    return stacked
