"""Counter-based draws: pure functions of (seed, stream, step), uniform, independent, read-only."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from theory.randomness import BLOCK, Stream, generator, normals, uniform_at, uniforms

SEEDS = st.integers(0, 2**63)
STREAMS = st.sampled_from(list(Stream))
STEPS = st.integers(0, 6 * BLOCK)
DRAWERS = pytest.mark.parametrize("draw", [uniforms, normals])
FAMILIES = [*itertools.product((0, 1, 2, 12345), Stream)]


def by_hand(seed: int, stream: Stream, step: int) -> float:
    """The draw of one step from Philox's raw bits: the top 53 of a 64-bit word, times 2^-53."""
    block, offset = divmod(step, 1024)
    philox = np.random.Philox(key=[seed, int(stream)], counter=[0, block, 0, 0])
    return (int(philox.random_raw(offset + 1)[offset]) >> 11) * 2.0**-53


# --- a pure function of (seed, stream, step)


@settings(deadline=None, max_examples=50)
@given(SEEDS, STREAMS, STEPS)
def test_draw_is_the_philox_word_of_its_key_and_counter(
    seed: int, stream: Stream, step: int
) -> None:
    assert uniform_at((seed,), stream, step)[0] == by_hand(seed, stream, step)


@pytest.mark.parametrize("step", [BLOCK - 1, BLOCK, 2 * BLOCK - 1, 2 * BLOCK])
def test_draw_is_the_philox_word_across_block_boundaries(step: int) -> None:
    assert uniform_at((7,), Stream.DECISION, step)[0] == by_hand(7, Stream.DECISION, step)


def test_block_length_is_part_of_the_definition_of_the_streams() -> None:
    assert BLOCK == 1024


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 100), STREAMS, st.lists(STEPS, min_size=1, max_size=8), st.randoms())
def test_draws_do_not_depend_on_the_order_of_access(
    seed: int, stream: Stream, steps: list[int], random: Random
) -> None:
    forward = {step: uniform_at((seed,), stream, step)[0] for step in sorted(steps)}
    uniforms.cache_clear()
    shuffled = list(steps)
    random.shuffle(shuffled)
    assert {step: uniform_at((seed,), stream, step)[0] for step in shuffled} == forward


@settings(deadline=None, max_examples=30)
@given(st.lists(SEEDS, min_size=1, max_size=5), STREAMS, STEPS)
def test_draws_do_not_depend_on_the_batch(seeds: list[int], stream: Stream, step: int) -> None:
    batched = uniform_at(tuple(seeds), stream, step)
    assert batched.shape == (len(seeds),)
    assert batched.tolist() == [uniform_at((seed,), stream, step)[0] for seed in seeds]


@DRAWERS
@settings(deadline=None, max_examples=20)
@given(
    seeds=st.lists(SEEDS, min_size=1, max_size=4),
    stream=STREAMS,
    block=st.integers(0, 9),
    width=st.integers(1, 6),
)
def test_block_draws_do_not_depend_on_the_batch(
    draw: Callable[..., np.ndarray], seeds: list[int], stream: Stream, block: int, width: int
) -> None:
    batched = draw(tuple(seeds), stream, block, width)
    assert batched.shape == (len(seeds), BLOCK, width)
    for row, seed in zip(batched, seeds, strict=True):
        np.testing.assert_array_equal(row, draw((seed,), stream, block, width)[0])


def test_generator_starts_at_its_block() -> None:
    expected = uniforms((3,), Stream.DPO_SAMPLE, 5)[0, :, 0]
    np.testing.assert_array_equal(generator(3, Stream.DPO_SAMPLE, 5).random(BLOCK), expected)


# --- distinct keys and counters give distinct, independent draws


@DRAWERS
def test_no_draw_is_shared_between_seeds_streams_and_blocks(
    draw: Callable[..., np.ndarray],
) -> None:
    # 24 families x 3 blocks x 2048 draws of 53 bits: an honest collision has probability 1e-6.
    pool = np.concatenate(
        [draw((s,), stream, b, 2).ravel() for s, stream in FAMILIES for b in (0, 1, 2)]
    )
    assert len(np.unique(pool)) == len(pool)


@DRAWERS
def test_families_are_uncorrelated(draw: Callable[..., np.ndarray]) -> None:
    rows = np.stack([draw((s,), stream, 0, 1).ravel() for s, stream in FAMILIES])
    correlation = np.corrcoef(rows) - np.eye(len(rows))
    # 276 pairs of correlations with standard deviation 1/sqrt(1024): 5 sigma.
    assert np.abs(correlation).max() < 5.0 / np.sqrt(BLOCK)


def test_successive_steps_are_uncorrelated() -> None:
    steps = uniforms(tuple(range(50)), Stream.DECISION, 0)[:, :, 0]
    before, after = steps[:, :-1].ravel(), steps[:, 1:].ravel()
    assert abs(np.corrcoef(before, after)[0, 1]) < 4.5 / np.sqrt(len(before))


# --- distribution, at fixed seeds: a p-value below 1e-3 would be a bad draw of the seed


@pytest.mark.parametrize("stream", list(Stream))
def test_uniforms_are_uniform(stream: Stream) -> None:
    draws = uniforms(tuple(range(20)), stream, 1, 2)
    assert draws.min() >= 0.0
    assert draws.max() < 1.0
    assert stats.kstest(draws.ravel(), "uniform").pvalue > 1e-3


def test_uniforms_of_one_step_are_uniform_over_seeds() -> None:
    draws = uniform_at(tuple(range(5000)), Stream.DECISION, 17)
    assert stats.kstest(draws, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("stream", [Stream.DPO_SAMPLE, Stream.SFT_SAMPLE])
def test_normals_are_standard_normal(stream: Stream) -> None:
    draws = normals(tuple(range(20)), stream, 0, 3)
    assert stats.kstest(draws.ravel(), "norm").pvalue > 1e-3


# --- the cache hands out the same array to everyone


@DRAWERS
def test_returned_arrays_are_read_only(draw: Callable[..., np.ndarray]) -> None:
    draws = draw((0, 1), Stream.DECISION, 0, 2)
    with pytest.raises(ValueError, match="read-only"):
        draws[0, 0, 0] = 0.5


def test_a_step_s_view_is_read_only() -> None:
    draws = uniform_at((0, 1), Stream.DECISION, 3)
    with pytest.raises(ValueError, match="read-only"):
        draws[0] = 0.5
