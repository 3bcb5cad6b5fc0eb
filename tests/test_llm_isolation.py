"""llm.model.isolation: what a model does to rows beside each other is found out, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _architectures import VOCABULARY, small_model
from _packing import GROUPED, make_model, make_rows
from _text import write_jsonl
from _tiny import TOKENIZER, make_policy
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MambaConfig,
    PhimoeConfig,
    RobertaConfig,
)

from llm.data import embedded
from llm.flags.parse import parse
from llm.loss.attention import PACKED
from llm.model.isolation import Probe, in_float32, layout_problem, probe_rows, shaken
from llm.setup import prepare
from theory.cli import UserError

DTYPES = [torch.float32, torch.bfloat16]


def problem(model: Any, rows: Any = None, *, packing: bool = True) -> str | None:
    return layout_problem(model, "it", rows or ROWS["dpo"], 0, packing=packing)


def sft(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: row[key] for key in ("prompt_ids", "completion_ids")} for row in rows]


def pairs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: row[key] for key in row if key != "completion_ids"} for row in rows]


ROWS = {"sft": sft(make_rows()), "dpo": pairs(make_rows())}


class Meddling(torch.nn.Module):
    """An MLP to which `meddle` (hidden -> hidden) adds something."""

    def __init__(self, mlp: torch.nn.Module, meddle: Any) -> None:
        super().__init__()
        self.mlp, self.meddle = mlp, meddle

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.mlp(hidden) + self.meddle(hidden)
        return out


def meddled(meddle: Any, dtype: torch.dtype = torch.float32) -> Any:
    model = make_model("llama")
    model.base_model.layers[0].mlp = Meddling(model.base_model.layers[0].mlp, meddle)
    return model.to(dtype)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["gpt_neox", "opt", "experts", "logits scaled after the head"])
def test_a_model_that_packs_is_recognised(shape: str, dtype: torch.dtype, rows: Any) -> None:
    model = make_model(shape).to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert problem(model.train(), rows) is None
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), "its weights are as they were"


def test_under_autocast_too() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert problem(make_model()) is None
        assert "together than alone" in (problem(windowed()) or "")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-2, 1e-6])
def test_a_state_that_runs_on_is_found_whatever_its_size(size: float, dtype: torch.dtype) -> None:
    """In bfloat16 the smaller one is far below the rounding of the values."""
    leak = meddled(lambda x: size * x.cumsum(1), dtype)
    for rows in ROWS.values():
        assert problem(leak, rows) == "rows move each other's log-probabilities"
        assert problem(leak, rows, packing=False) is None, "each padded row has its own state"


def windowed(window: int = 5) -> Any:
    """Its attention layers know nothing of the window, which is in the mask."""
    config = PhimoeConfig(**GROUPED, sliding_window=window, num_local_experts=2)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for layer in model.base_model.layers:
        layer.self_attn.o_proj.weight.data *= 1e-3
    return model


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_window_in_the_mask_is_found_where_rows_reach_beyond(dtype: torch.dtype) -> None:
    """It moves these values by 1e-5 nats; rounding to bfloat16 does by 1e-3."""
    assert "rows of 5 and 20 tokens" in (problem(windowed().to(dtype)) or "")
    assert problem(windowed(64).to(dtype)) is None


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_kernels_that_do_not_reproduce_themselves_are_no_leak(rows: Any) -> None:
    """As on a device with atomics: every call rounds in its own way. The derivative decides."""
    generator = torch.Generator().manual_seed(0)

    def rounding(x: Tensor) -> Tensor:
        return 1e-8 * torch.randn(x.shape, generator=generator)

    with torch.no_grad():
        probe = Probe(meddled(rounding).eval(), *probe_rows(rows), 0)
        assert not torch.equal(torch.cat(probe._one_by_one()), torch.cat(probe.alone))
    assert problem(meddled(rounding), rows) is None
    leak = meddled(lambda x: rounding(x) + 1e-9 * x.cumsum(1))
    assert problem(leak, rows) == "rows move each other's log-probabilities"
    future = meddled(lambda x: rounding(x) + 1e-9 * x.flip(1).cumsum(1))
    with pytest.raises(UserError, match="it is no causal language model"):
        problem(future, rows)


def test_what_the_check_cannot_decide_is_refused() -> None:
    """Chance as large as the values: no bits, and nothing that could be called rounding."""
    generator = torch.Generator().manual_seed(0)
    noisy = meddled(lambda x: 9.0 * torch.randn(x.shape, generator=generator))
    noisy.lm_head.weight.data *= 9.0
    with pytest.raises(UserError, match="it cannot be evaluated: rounding moves its values by"):
        problem(noisy)


def test_a_model_that_ignores_the_plan_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    gemma: Any = AutoModelForCausalLM.from_config(Gemma2Config(**GROUPED, head_dim=8))
    assert problem(gemma) == "packed attention does not compute softcap"
    assert gemma.config._attn_implementation != PACKED

    def without_plan(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any):
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2), None

    monkeypatch.setitem(AttentionInterface._global_mapping, PACKED, without_plan)
    assert problem(make_model()) == "rows move each other's log-probabilities"


def long_rope(original: int) -> Any:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [1.0, 1.5, 2, 3, 4, 6, 8, 8],
        "original_max_position_embeddings": original,
        "factor": 4.0,
    }
    return small_model("phi3", original_max_position_embeddings=original, rope_parameters=rope)


def test_factors_that_the_longest_row_decides_are_refused_and_the_mend_is_named() -> None:
    with pytest.raises(UserError, match=r"even padded.*--max_length 16 would keep all rows below"):
        problem(long_rope(16))
    assert problem(long_rope(20)) is None, "no row is longer"
    assert problem(long_rope(2)) is None, "no row is shorter"


@pytest.mark.parametrize("packing", [True, False])
def test_an_encoder_is_refused(packing: bool) -> None:
    config = RobertaConfig(**GROUPED | {"max_position_embeddings": 70})
    with pytest.raises(UserError, match="moves with the tokens that follow it"):
        problem(AutoModelForCausalLM.from_config(config), packing=packing)


def test_tokens_without_an_embedding_and_values_that_are_none_are_one_line() -> None:
    rows = [*ROWS["sft"], {"prompt_ids": [3], "completion_ids": [VOCABULARY]}]
    with pytest.raises(UserError, match=f"embeddings of 97 tokens.* hold token {VOCABULARY}"):
        problem(make_model(), rows)
    with pytest.raises(UserError, match="their padding is token 97"):
        layout_problem(make_model(), "it", ROWS["sft"], 97, packing=True)
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(UserError, match="it cannot be evaluated: its log-probabilities are not fi"):
        problem(model)


def test_rounding_is_that_of_the_precision() -> None:
    sizes = []
    for dtype in (torch.float64, *DTYPES):
        model = make_model().to(dtype).eval()
        with torch.no_grad():
            sizes.append(Probe(model, *probe_rows(ROWS["dpo"]), 0).rounding)
        assert not any(module._forward_hooks for module in model.modules())
    assert sizes[0] < 1e-12  # its logits are scored in float64
    assert 1e-8 < sizes[1] < 1e-5
    assert 1e-4 < sizes[2] < 1e-1


def test_tied_weights_are_still_tied_after_float32() -> None:
    model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**GROUPED, tie_word_embeddings=True))
    model.to(torch.bfloat16)
    with in_float32(model), shaken(model):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_the_shortest_and_the_longest_row_are_pairs_if_any_row_is_one() -> None:
    short = {"prompt_ids": [1], "completion_ids": [2]}
    assert probe_rows([short, *ROWS["sft"]])[0] == short
    shortest, longest = probe_rows([short, *ROWS["dpo"]])
    assert shortest == {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [2]}
    assert longest == {k: v for k, v in ROWS["dpo"][2].items() if k.endswith("_ids")}


# --- in a run


@pytest.mark.usefixtures("temporary_datasets_cache")
def test_the_reference_is_checked_as_the_policy_is(tmp_path: Path) -> None:
    tiny = {"vocab_size": len(TOKENIZER), "hidden_size": 16, "num_hidden_layers": 1}
    models = {
        "policy": make_policy(),
        "state": AutoModelForCausalLM.from_config(MambaConfig(**tiny, state_size=4)),
        "encoder": AutoModelForCausalLM.from_config(
            RobertaConfig(**tiny, num_attention_heads=2, intermediate_size=32, pad_token_id=1)
        ),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        TOKENIZER.save_pretrained(tmp_path / name)
    corpus = embedded.generate_corpus(train_rows=20, eval_rows=4)
    source = write_jsonl(tmp_path / "dpo.jsonl", corpus.dpo_train)
    command = ["--use_cpu", "true", "--algo", "dpo", "--dpo_dataset", source, "--kl_rows", "0"]
    command += ["--output_dir", str(tmp_path / "out")]
    command += ["--model_name_or_path", str(tmp_path / "policy"), "--reference"]
    said: list[str] = []
    setup = prepare(parse([*command, str(tmp_path / "state")]), said.append)
    assert not any(objective.packing for objective in setup.objectives.values())
    text = f"not packed: --reference {tmp_path / 'state'}: rows move each other's log-probabilities"
    assert any(text in line for line in said)
    with pytest.raises(UserError, match=r"--reference \S+encoder is no causal language model"):
        prepare(parse([*command, str(tmp_path / "encoder")]), said.append)
