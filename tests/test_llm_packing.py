"""llm.loss (packing, attention, forward): a packed batch is worth what its rows are alone."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _packing import (
    FLOAT32,
    GROUPED,
    SHAPES,
    VOCABULARY,
    assert_equal,
    make_model,
    make_rows,
    value_and_gradient,
)
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
)

from llm.loss import attention, forward
from llm.loss.attention import PACKED, packed_attention, varlen_attention
from llm.loss.collate import collate_preference, collate_sft
from llm.loss.forward import response_logps
from llm.loss.objectives import DPOObjective, SFTObjective
from llm.loss.packing import PackingPlan, pack_preference, pack_sft


@pytest.mark.parametrize("chunk_rows", [None, 5])
@pytest.mark.parametrize(
    ("pack", "pad"), [(pack_preference, collate_preference), (pack_sft, collate_sft)]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_equals_padded(
    shape: str,
    pack: Callable[..., Any],
    pad: Callable[..., Any],
    chunk_rows: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if chunk_rows is not None:
        monkeypatch.setattr(forward, "LOGITS_BYTES", chunk_rows * 4 * VOCABULARY)
    model, rows = make_model(shape), make_rows()
    expected = value_and_gradient(model, pad(rows, 0))
    assert_equal(value_and_gradient(model, pack(rows)), expected)


def test_activation_checkpointing_changes_nothing() -> None:
    model, batch = make_model(), pack_preference(make_rows())
    expected = value_and_gradient(model, batch)
    # transformers renamed it within 5.x
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)()
    model.train()
    assert_equal(value_and_gradient(model, batch), expected)


def test_layers_that_torch_computes_again_change_nothing() -> None:
    """As accelerate wraps them for FSDP: the backward finds the last MLP whole, as the forward."""
    model, batch = make_model(), pack_preference(make_rows())
    expected = value_and_gradient(model, batch)
    layers = model.base_model.layers
    for i in range(len(layers)):
        layers[i] = checkpoint_wrapper(layers[i])
    values, gradients = value_and_gradient(model, batch)
    plain = {name.replace("_checkpoint_wrapped_module.", ""): g for name, g in gradients.items()}
    assert_equal((values, plain), expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own compiler
def test_a_compiled_model_gives_the_same_values_and_gradients() -> None:
    model, rows = make_model("gpt_neox"), make_rows()
    expected = value_and_gradient(model, collate_preference(rows, 0))
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    model.zero_grad()
    with packed_attention(model):
        sums = response_logps(compiled, pack_preference(rows)).sums()
        (sums * torch.arange(1.0, len(sums) + 1.0)).sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_equal((sums.detach(), gradients), expected)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning:transformers")  # peft
def test_adapters_on_layers_and_head_are_seen() -> None:
    targets = ["q_proj", "v_proj", "lm_head"]
    model: Any = get_peft_model(make_model(), LoraConfig(r=2, target_modules=targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    rows = make_rows()
    expected = value_and_gradient(model, collate_preference(rows, 0))
    actual = value_and_gradient(model, pack_preference(rows))
    assert any("lm_head" in name for name in actual[1])
    assert_equal(actual, expected)


def test_a_pair_costs_its_prompt_once() -> None:
    rows = make_rows()
    batch = pack_preference(rows)
    tokens = sum(len(row[key]) for row in rows for key in ("prompt_ids", "chosen_ids"))
    tokens += sum(len(row["rejected_ids"]) for row in rows)
    assert batch["input_ids"].shape == batch["position_ids"].shape == (1, tokens)
    assert sum(batch["plan"].lengths) == tokens


def test_positions_and_predictors_of_a_pair_by_hand() -> None:
    batch = pack_preference([{"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 2]]
    assert batch["predictors"].tolist() == [1, 2, 1]  # 7 from 6, 8 from 7, 9 from 6
    assert batch["targets"].tolist() == [7, 8, 9]
    assert batch["owners"].tolist() == [0, 0, 1]
    assert batch["plan"] == PackingPlan((4, 1), (-1, 0), (0, 2))
    assert batch["plan"].key_indices().tolist() == [0, 1, 2, 3, 0, 1, 4]
    assert batch["plan"].key_lengths == (4, 3)


@pytest.mark.parametrize("changed", range(4))
def test_rows_do_not_see_each_other(changed: int) -> None:
    model, rows = make_model("gpt_neox"), make_rows()
    before = response_logps(model, pack_preference(rows)).sums()
    other = make_rows(seed=1)[changed]
    rows[changed] = other
    after = response_logps(model, pack_preference(rows)).sums()
    touched = torch.zeros(2, 4, dtype=torch.bool)
    touched[:, changed] = True
    assert torch.equal(before[~touched.flatten()], after[~touched.flatten()])
    assert (before - after)[touched.flatten()].abs().min() > 1e-3


def test_the_rejected_response_does_not_see_the_chosen_one() -> None:
    model, rows = make_model(), make_rows()
    before = response_logps(model, pack_preference(rows)).sums().chunk(2)
    for row in rows:
        row["chosen_ids"] = [1 + token % (VOCABULARY - 1) for token in row["chosen_ids"]]
    after = response_logps(model, pack_preference(rows)).sums().chunk(2)
    assert torch.equal(before[1], after[1])
    assert (before[0] - after[0]).abs().min() > 1e-3


@pytest.mark.parametrize("objective", [SFTObjective, DPOObjective])
def test_objectives_have_one_value_packed_or_padded(objective: Any) -> None:
    model, rows = make_model(), make_rows()
    values = []
    for packing in (True, False):
        chosen = objective(packing=packing)
        terms = chosen(model, chosen.collate(rows, 0))
        values.append([terms.total, *(total for total, _ in terms.sums.values())])
    torch.testing.assert_close(*values, rtol=FLOAT32, atol=FLOAT32)


def test_logits_exist_only_chunk_by_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    rows_at_once = 5
    monkeypatch.setattr(forward, "LOGITS_BYTES", rows_at_once * 4 * VOCABULARY)
    model, sizes = make_model(), []
    linear = F.linear

    def spy(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.shape[0] == VOCABULARY:
            sizes.append(x.numel() // x.shape[-1])
        return linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", spy)
    batch = pack_preference(make_rows())
    value_and_gradient(model, batch)
    # Once in the forward and once more for the backward, on response tokens only.
    assert sum(sizes) == 2 * len(batch["targets"])
    assert max(sizes) == rows_at_once


@pytest.mark.parametrize("shape", ["gpt_neox", "llama", "qwen3", "gpt2"])
def test_the_last_mlp_runs_where_a_response_token_is_predicted(shape: str) -> None:
    """The other layers see the whole sequence; a prompt's end predicts for both its responses."""
    model, batch, tokens_seen = make_model(shape), pack_preference(make_rows()), list[int]()
    for layer in getattr(model.base_model, "h" if shape == "gpt2" else "layers"):
        first = next(module for module in layer.mlp.modules() if not list(module.children()))
        first.register_forward_hook(lambda _, x, out: tokens_seen.append(x[0][..., 0].numel()))
    response_logps(model, batch)
    predictors = set(batch["predictors"].tolist())
    assert tokens_seen == [batch["input_ids"].numel(), len(predictors)]
    assert batch["predicting"].tolist() == sorted(predictors)


def test_an_mlp_that_returns_more_than_a_tensor_runs_whole() -> None:
    """As some mixtures of experts do. Whoever wrapped its forward finds it as it was."""
    model: Any = make_model()
    mlp, hidden = model.base_model.layers[-1].mlp, torch.randn(1, 5, 32)
    whole = mlp.forward
    with forward._last_mlp_on(model, torch.tensor([1, 3])):
        out = mlp(hidden)
    assert (out[:, [0, 2, 4]] == 0.0).all()
    torch.testing.assert_close(out[:, [1, 3]], whole(hidden)[:, [1, 3]])
    assert "forward" not in vars(mlp)
    mlp.forward = wrapped = lambda x: (whole(x), "routing")
    with forward._last_mlp_on(model, torch.tensor([1, 3])):
        out, routing = mlp(hidden)
    assert routing == "routing"
    assert torch.equal(out, whole(hidden))
    assert mlp.forward is wrapped


def test_bfloat16_logits_are_scored_in_float32() -> None:
    model = make_model().to(torch.bfloat16)
    logps = response_logps(model, pack_sft(make_rows()))
    assert logps.values.dtype == torch.float32


@pytest.mark.parametrize("shape", ["gpt_neox", "llama", "opt", "qwen3"])
def test_under_autocast_attention_gets_one_half_precision(
    shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rotary positions in float32 would keep query and key from the kernels of half precision."""
    types = set()
    in_turn = attention._block_by_block

    def spy(*args: Any) -> Tensor:
        types.update(tensor.dtype for tensor in args[:3])
        return in_turn(*args)

    monkeypatch.setattr(attention, "_block_by_block", spy)
    model, batch = make_model(shape), pack_preference(make_rows())
    exact = response_logps(model, batch).values
    assert types == {torch.float32}
    types.clear()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = response_logps(model, batch).values
    assert types == {torch.bfloat16}
    # 8 bits in the products of two layers.
    torch.testing.assert_close(rounded, exact, rtol=0.0, atol=0.05)


# --- the switch


def test_the_model_is_itself_again_afterwards() -> None:
    model = make_model()
    before = model.config._attn_implementation
    with packed_attention(model):
        with packed_attention(model):
            assert model.config._attn_implementation == PACKED
        assert model.config._attn_implementation == PACKED
        with pytest.raises(NotImplementedError, match="no plan of a packed batch"):
            model(input_ids=torch.ones(1, 3, dtype=torch.long))
    assert model.config._attn_implementation == before
    with pytest.raises(ZeroDivisionError), packed_attention(model):
        raise ZeroDivisionError
    assert model.config._attn_implementation == before
    head = model.get_output_embeddings()
    assert "forward" not in vars(head)


def test_attention_that_is_not_computed_is_refused() -> None:
    model: Any = AutoModelForCausalLM.from_config(Gemma2Config(**GROUPED, head_dim=8))
    with pytest.raises(NotImplementedError, match="softcap"):
        response_logps(model, pack_sft(make_rows()))


# --- variable-length attention: its layout, with a slow kernel in its place


def slow_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    longest_query: int,
    longest_key: int,
    *,
    scale: float,
    window: tuple[int, int],
    grouped: bool,
) -> Tensor:
    """What the CUDA kernel computes: causal, aligned to the end of the keys, by definition."""
    outputs = []
    bounds = zip(query_starts.tolist(), key_starts.tolist(), strict=True)
    for (q0, k0), (q1, k1) in pairwise(bounds):
        assert q1 - q0 <= longest_query
        assert k1 - k0 <= longest_key
        q, k, v = query[q0:q1], key[k0:k1], value[k0:k1]
        if grouped:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        distance = torch.arange(len(q))[:, None] + (len(k) - len(q)) - torch.arange(len(k))
        hidden = distance < window[1]
        if window[0] >= 0:
            hidden |= distance > window[0]
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("pack", [pack_preference, pack_sft])
def test_one_variable_length_call_equals_one_call_per_block(
    pack: Callable[..., Any], key_heads: int, window: int | None
) -> None:
    plan = pack(make_rows())["plan"]
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, sum(plan.lengths), 8, generator=generator, dtype=torch.float64)
        for heads in (4, key_heads, key_heads)
    )
    at_once = attention._all_blocks(slow_varlen, query, key, value, plan, 0.3, window)
    in_turn = attention._block_by_block(query, key, value, plan, 0.3, 0.0, window)
    torch.testing.assert_close(at_once, in_turn, rtol=1e-12, atol=1e-12)


def _up_to_2_10(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, *, scale=None): ...
def _since_2_11(
    q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
): ...


@pytest.mark.parametrize(
    ("signature", "expected"),
    [
        (_up_to_2_10, {"scale": 0.5, "is_causal": True}),
        (_since_2_11, {"scale": 0.5, "window_size": (-1, 0), "enable_gqa": True}),
    ],
)
def test_every_signature_of_torch_is_called_as_it_wants(
    signature: Any, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def record(*args: Any, **options: Any) -> Tensor:
        calls.append((args, options))
        return args[0]

    record.__wrapped__ = signature  # type: ignore[attr-defined]
    module = types.ModuleType("torch.nn.attention.varlen")
    module.varlen_attn = record  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    varlen_attention.cache_clear()
    try:
        call = varlen_attention()
        assert call is not None
        starts = torch.tensor([0, 3])
        query, key = torch.zeros(3, 4, 2), torch.zeros(3, 2, 2)
        call(query, key, key, starts, starts, 3, 3, scale=0.5, window=(-1, 0), grouped=True)
    finally:
        varlen_attention.cache_clear()
    ((args, options),) = calls
    assert options == expected
    # Without enable_gqa the key heads are repeated by hand.
    assert args[1].shape[1] == (2 if "enable_gqa" in expected else 4)
