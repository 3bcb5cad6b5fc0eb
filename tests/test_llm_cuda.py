"""The paths that only a CUDA device takes: variable-length attention, precisions, copies, events.

Skipped where there is no such device. Everything here has a counterpart that runs on a CPU; these
tests say that the device computes the same.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _packing import SHAPES, assert_equal, make_model, make_rows, value_and_gradient
from _resume import AT, Interrupt, trained, with_dropout
from _tiny import make_policy, make_trainer
from torch import Tensor
from transformers import TrainerCallback

from llm.loss import attention
from llm.loss.attention import varlen_attention
from llm.loss.collate import collate_preference
from llm.loss.objectives import move
from llm.loss.packing import pack_preference, to_device
from llm.model.isolation import layout_problem
from llm.train.trainer import JointTrainer
from llm.train.values import copied_early
from theory.schedulers import Alright, Maxright, Mix
from theory.scheduling import Scheduler

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DEVICE = torch.device("cuda")
# Sums of float32 in another order than the CPU's, through two layers and back.
FLOAT32 = 1e-4
# Of the largest entry: products and weights of attention rounded to 8 (bf16) and 11 (fp16) bits.
ROUNDING = {torch.bfloat16: 2**-6, torch.float16: 2**-8}
SCHEDULERS: dict[str, Scheduler] = {
    "alright": Alright(0.5, seed=4),
    "maxright": Maxright(0.85, (0.1, 0.2), refresh_every=3),
    "mix": Mix(0.3),
}


def on_device(tmp_path: Path, scheduler: Scheduler, **options: Any) -> JointTrainer:
    return make_trainer(scheduler, tmp_path, **({"use_cpu": False} | options))


def losses(trainer: JointTrainer) -> list[float]:
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Entries agree to `tolerance` times the largest."""
    difference = (actual.double().cpu() - expected.double().cpu()).abs().max()
    assert float(difference) <= tolerance * float(expected.abs().max())


# --- attention


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_the_variable_length_kernel_computes_what_its_layout_says(
    dtype: torch.dtype, size: int, key_heads: int, window: int | None
) -> None:
    """Values and gradients against one call per block, in float64 on the same rounded numbers."""
    kernel = varlen_attention()
    assert kernel is not None
    plan = pack_preference(make_rows())["plan"]
    tokens = sum(plan.lengths)
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(1, heads, tokens, size, generator=generator).to(dtype)
        for heads in (4, key_heads, key_heads)
    ]
    weights = torch.randn(1, tokens, 4, size, generator=generator).to(dtype)

    def run(attend: Any, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(device, dtype).clone().requires_grad_() for x in inputs]
        out = attend(*leaves)
        (out * weights.to(device, dtype)).sum().backward()
        return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    fast = run(
        lambda q, k, v: attention._all_blocks(kernel, q, k, v, plan, None, window), DEVICE, dtype
    )
    exact = run(
        lambda q, k, v: attention._block_by_block(q, k, v, plan, None, 0.0, window),
        torch.device("cpu"),
        torch.float64,
    )
    assert len(fast) == len(exact) == 4
    for mine, theirs in zip(fast, exact, strict=True):
        assert_near(mine, theirs, ROUNDING[dtype])


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_equals_padded_on_the_cpu(shape: str) -> None:
    """float32: one call per block."""
    rows = make_rows()
    expected = value_and_gradient(make_model(shape), collate_preference(rows, 0))
    model = make_model(shape).to(DEVICE)
    actual = value_and_gradient(model, move(pack_preference(rows), DEVICE))
    assert_equal(actual, expected, FLOAT32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", ["gpt_neox", "llama", "opt", "qwen3", "sliding window"])
def test_a_model_that_packs_is_recognised(shape: str, dtype: torch.dtype) -> None:
    model = make_model(shape).to(DEVICE, dtype)
    rows = [{key: ids for key, ids in row.items() if key[:4] != "comp"} for row in make_rows()]
    assert layout_problem(model, "it", rows, 0, packing=True) is None


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_reaches_the_variable_length_kernel(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[torch.dtype] = []
    all_blocks = attention._all_blocks

    def spy(kernel: Any, query: Tensor, *args: Any) -> Tensor:
        calls.append(query.dtype)
        return all_blocks(kernel, query, *args)

    monkeypatch.setattr(attention, "_all_blocks", spy)
    # Weights in float32: rotary positions lift query and key out of the precision of autocast.
    model = make_policy(hidden_size=64)
    values = losses(on_device(tmp_path, Mix(0.5), model=model, **{precision: True}, max_steps=3))
    expected = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert set(calls) == {expected}
    assert all(torch.isfinite(torch.tensor(values)))


# --- the trainer


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_run_takes_the_same_course_as_on_the_cpu(name: str, tmp_path: Path) -> None:
    """SGD: Adam would turn roundings of gradients near zero into whole steps."""
    options: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.1}
    here = on_device(tmp_path / "cuda", SCHEDULERS[name], **options)
    there = make_trainer(SCHEDULERS[name], tmp_path / "cpu", **options)
    assert losses(here) == pytest.approx(losses(there), rel=1e-3)
    assert here.decisions == there.decisions
    assert next(here.model.parameters()).device.type == DEVICE.type


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_half_precision_follows_float32(name: str, precision: str, tmp_path: Path) -> None:
    exact = make_trainer(SCHEDULERS[name], tmp_path / "cpu")
    rounded = on_device(tmp_path / precision, SCHEDULERS[name], **{precision: True})
    # 8 bits in the products of a forward; ten steps of Adam at a rate of 1e-2 go the same way.
    assert losses(rounded) == pytest.approx(losses(exact), rel=0.05)
    assert rounded.decisions == exact.decisions


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_resumed_run_ends_with_the_same_bits(name: str, tmp_path: Path) -> None:
    """Dropout draws from the device's own generator, which the checkpoint has to hold."""
    options: dict[str, Any] = {"full_determinism": True, "save_strategy": "steps", "save_steps": AT}
    straight = on_device(tmp_path / "a", SCHEDULERS[name], model=with_dropout(0), **options)
    cut = on_device(tmp_path / "b", SCHEDULERS[name], model=with_dropout(0), **options)
    cut.add_callback(Interrupt())
    try:
        expected = trained(straight)
        trained(cut)
        resumed = on_device(tmp_path / "b", SCHEDULERS[name], model=with_dropout(1), **options)
        actual = trained(resumed, tmp_path / "b" / f"checkpoint-{AT}")
    finally:
        torch.use_deterministic_algorithms(False)
    assert actual["losses"] == expected["losses"][-len(actual["losses"]) :]
    for mine, theirs in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


class Watch(TrainerCallback):
    """Asks torch to warn of every wait for the device, in steps that nothing is logged in."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The first steps build the optimiser's state.
        torch.cuda.set_sync_debug_mode("warn" if state.global_step >= 3 else "default")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")


def test_between_two_log_lines_the_host_never_waits(tmp_path: Path) -> None:
    """ALRIGHT decides without a loss, so the host may run ahead of the device."""
    options: dict[str, Any] = {"logging_steps": 100, "max_steps": 12, "bf16": True}
    trainer = on_device(tmp_path, Alright(0.5, seed=4), **options)
    trainer.add_callback(Watch())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    waits = [str(w.message) for w in caught if "synchroniz" in str(w.message)]
    assert waits == []


# --- copies and memory


def test_a_pinned_copy_is_whole() -> None:
    """The host's buffer is given back at once: the allocator must wait for the copy."""
    sources = [torch.full((1 << 20,), float(i)) for i in range(20)]
    copies = [to_device(source, DEVICE) for source in sources]
    for i, copy in enumerate(copies):
        assert bool((copy == i).all())


def test_an_early_copy_does_not_wait_for_what_comes_after_it() -> None:
    matrix = torch.ones(4096, 4096, device=DEVICE)
    read = copied_early(torch.tensor([1.5, torch.nan], device=DEVICE))
    for _ in range(200):
        matrix @ matrix
    last = torch.cuda.Event()
    last.record()
    losses = read()
    assert not last.query()  # the products still run
    assert losses[0] == 1.5
    assert np.isnan(losses[1])


def test_logits_of_the_whole_batch_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """With chunks of 2 rows a pass must stay below what the float32 logits alone would take."""
    vocabulary, rows = 50_000, make_rows() * 16
    monkeypatch.setattr("llm.loss.forward.LOGITS_BYTES", 2 * 4 * vocabulary)
    model = make_policy(vocab_size=vocabulary, max_position_embeddings=64).to(DEVICE)
    batch = move(pack_preference(rows), DEVICE)
    value_and_gradient(model, batch)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    value_and_gradient(model, batch)
    added = torch.cuda.max_memory_allocated() - before
    assert added < 0.5 * 4 * vocabulary * len(batch["targets"])
