"""llm.train.streams: passes are permutations, one integer of state, ranks share the batch."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.train.streams import SampleStream, permutation
from theory.tasks import Task

tasks = st.sampled_from(list(Task))
seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=40, deadline=None)


def take(stream: SampleStream, steps: int, micro_batches: int = 1) -> list[list[list[int]]]:
    """Row numbers of the next `steps` steps: steps x micro-batches x rows."""
    taken = []
    for _ in range(steps):
        taken.append(stream.peek(micro_batches))
        stream.advance(micro_batches)
    return taken


def rows_in_order(stream: SampleStream, count: int) -> list[int]:
    steps = -(-count // stream.batch_size)
    return [row for step in take(stream, steps) for batch in step for row in batch][:count]


@few
@given(tasks, seeds, st.integers(1, 30), st.integers(1, 7))
def test_each_pass_is_a_permutation(task: Task, seed: int, num_rows: int, batch_size: int) -> None:
    rows = rows_in_order(SampleStream(task, num_rows, batch_size, seed), 3 * num_rows)
    for number in range(3):
        one_pass = rows[number * num_rows : (number + 1) * num_rows]
        assert sorted(one_pass) == list(range(num_rows))


def test_passes_are_ordered_differently() -> None:
    rows = rows_in_order(SampleStream(Task.SFT, 40, 8, seed=0), 120)
    assert len({tuple(rows[i : i + 40]) for i in (0, 40, 80)}) == 3


def test_rows_depend_on_position_alone() -> None:
    """The batch size, and how often the stream was looked at, leave no trace in the order."""
    by_one, by_seven = (SampleStream(Task.DPO, 12, size, seed=5) for size in (1, 7))
    by_seven.peek(3)
    assert rows_in_order(by_one, 50) == rows_in_order(by_seven, 50)


def test_seeds_and_objectives_have_their_own_orders() -> None:
    orders = {
        tuple(rows_in_order(SampleStream(task, 40, 8, seed), 40))
        for task in Task
        for seed in (0, 1)
    }
    assert len(orders) == 4


def test_every_row_is_equally_likely_to_come_first() -> None:
    # Chi-square with 4 degrees of freedom: 23.5 is exceeded by a true permutation at 1 in 10^4.
    counts = Counter(int(permutation(seed, Task.SFT, 0, 5)[0]) for seed in range(1000))
    assert sum((counts[row] - 200) ** 2 / 200 for row in range(5)) < 23.5


def test_a_batch_larger_than_the_data_wraps_round() -> None:
    (batch,) = SampleStream(Task.SFT, 3, 8, seed=0).peek(1)
    assert len(batch) == 8
    assert sorted(batch[:3]) == sorted(batch[3:6]) == [0, 1, 2]


@few
@given(tasks, seeds, st.integers(1, 20), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_ranks_share_the_global_batch(
    task: Task, seed: int, num_rows: int, world_size: int, batch_size: int, micro_batches: int
) -> None:
    """W ranks with batches of b see in each step, and each micro-batch, what one with W b sees."""
    alone = take(SampleStream(task, num_rows, world_size * batch_size, seed), 5, micro_batches)
    ranks = [
        SampleStream(task, num_rows, batch_size, seed, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    together = [take(stream, 5, micro_batches) for stream in ranks]
    for step in range(5):
        for micro_batch in range(micro_batches):
            shared = [row for taken in together for row in taken[step][micro_batch]]
            assert shared == alone[step][micro_batch]
    assert {stream.consumed for stream in ranks} == {5 * world_size * batch_size * micro_batches}


@few
@given(tasks, seeds, st.integers(1, 20), st.integers(1, 5), st.integers(0, 9), st.integers(1, 3))
def test_a_restored_position_continues_identically(
    task: Task, seed: int, num_rows: int, batch_size: int, before: int, micro_batches: int
) -> None:
    straight = SampleStream(task, num_rows, batch_size, seed)
    take(straight, before, micro_batches)
    resumed = SampleStream(task, num_rows, batch_size, seed)
    resumed.consumed = straight.consumed
    assert take(resumed, 4, micro_batches) == take(straight, 4, micro_batches)


def test_a_position_is_shared_by_runs_on_other_numbers_of_ranks() -> None:
    """Saved by 1 rank with batches of 4, continued by 2 ranks with batches of 2: the same rows."""
    straight = SampleStream(Task.SFT, 10, 4, seed=0)
    take(straight, 3)
    halves = [SampleStream(Task.SFT, 10, 2, seed=0, rank=rank, world_size=2) for rank in (0, 1)]
    for half in halves:
        half.consumed = straight.consumed
    assert halves[0].peek(1)[0] + halves[1].peek(1)[0] == straight.peek(1)[0]


def test_peek_consumes_nothing() -> None:
    stream = SampleStream(Task.DPO, 9, 2, seed=0)
    assert stream.peek(3) == stream.peek(3)
    assert stream.consumed == 0
    stream.advance(3)
    assert stream.consumed == 6


def test_micro_batches_of_a_step_follow_each_other() -> None:
    one, many = (SampleStream(Task.DPO, 9, size, seed=0) for size in (6, 2))
    assert [row for batch in many.peek(3) for row in batch] == one.peek(1)[0]


@pytest.mark.parametrize(("num_rows", "batch_size"), [(0, 1), (1, 0), (-1, 2)])
def test_an_empty_stream_is_refused(num_rows: int, batch_size: int) -> None:
    with pytest.raises(ValueError, match=f"sft: {num_rows} rows in batches of {batch_size}"):
        SampleStream(Task.SFT, num_rows, batch_size, seed=0)


# --- a budget of tokens instead of a number of rows


def budgeted(lengths: list[int], max_tokens: int, **options: int) -> SampleStream:
    return SampleStream(
        Task.SFT, len(lengths), 1, seed=3, max_tokens=max_tokens, lengths=lengths, **options
    )


row_lengths = st.lists(st.integers(1, 12), min_size=2, max_size=25)


@few
@given(row_lengths, st.integers(1, 30))
def test_batches_fill_their_budget_and_no_more(lengths: list[int], max_tokens: int) -> None:
    stream = budgeted(lengths, max_tokens)
    batches = [batch for step in take(stream, 30) for batch in step]
    for batch, following in pairwise(batches):
        tokens = sum(lengths[row] for row in batch)
        assert tokens <= max_tokens or len(batch) == 1
        assert tokens + lengths[following[0]] > max_tokens  # the next row had no room left


@few
@given(row_lengths, st.integers(1, 30), st.integers(1, 3), st.integers(1, 3))
def test_a_budget_keeps_the_order_of_the_rows_on_any_number_of_ranks(
    lengths: list[int], max_tokens: int, world_size: int, micro_batches: int
) -> None:
    ranks = [
        budgeted(lengths, max_tokens, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    by_rank = [take(stream, 4, micro_batches) for stream in ranks]
    rows = [
        row
        for step in range(4)
        for micro_batch in range(micro_batches)
        for rank in range(world_size)
        for row in by_rank[rank][step][micro_batch]
    ]
    plain = SampleStream(Task.SFT, len(lengths), 1, seed=3)
    assert rows == rows_in_order(plain, len(rows))
    assert {stream.consumed for stream in ranks} == {len(rows)}


@few
@given(row_lengths, st.integers(1, 30))
def test_batches_per_pass_cover_the_data_once(lengths: list[int], max_tokens: int) -> None:
    stream = budgeted(lengths, max_tokens)
    count = stream.batches_per_pass()
    sizes = [len(batch) for step in take(stream, count) for batch in step]
    assert sum(sizes[:-1]) < len(lengths) <= sum(sizes)


def test_a_budget_without_the_lengths_of_the_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="10 tokens for 0 lengths"):
        SampleStream(Task.SFT, 4, 1, seed=0, max_tokens=10)
