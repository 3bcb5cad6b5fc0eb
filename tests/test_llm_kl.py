"""llm.model.samples: KL(ref || pi) against closed forms, samples that survive a restart."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from _tiny import PAD_ID, TOKENIZER, eval_rows, make_policy, make_trainer
from transformers import GenerationConfig, GPTNeoXForCausalLM

import llm.model.samples
from llm.flags.parse import parse
from llm.loss.evaluate import row_length
from llm.loss.kl import ReferenceSamples
from llm.loss.objectives import Row
from llm.model.samples import FILE, sample_reference, samples_of_run
from theory.cli import UserError
from theory.schedulers import Single
from theory.tasks import Task

PAD, END, WORD = 0, 1, 2


def coin(stop: float) -> GPTNeoXForCausalLM:
    """A model of two tokens: after everything, END with probability `stop`, else WORD."""
    model = make_policy(vocab_size=3, pad_token_id=PAD, bos_token_id=END, eos_token_id=END)
    with torch.no_grad():
        norm = model.gpt_neox.final_layer_norm  # its output is (1, 0, 0, ...) whatever it reads
        norm.weight.zero_()
        norm.bias.copy_(torch.eye(len(norm.bias))[0])
        model.lm_head.weight.zero_()
        logits = torch.tensor([-50.0, math.log(stop), math.log1p(-stop)])
        model.lm_head.weight[:, 0] = logits
    return model.eval()


def kl_of_coins(p: float, q: float, tokens: int) -> float:
    """KL of responses: one coin's KL for every token that is written at all."""
    one = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    return sum((1 - p) ** t for t in range(tokens)) * one


def coin_samples(stop: float, count: int, **options: Any) -> ReferenceSamples:
    rows: list[Row] = [
        {"prompt_ids": [WORD] * length, "chosen_ids": [WORD] * 6, "rejected_ids": [END]}
        for length in (1, 3, 2)
    ]
    ids = {"eos_token_id": END, "pad_token_id": PAD}
    return sample_reference(coin(stop), rows, count, batch_size=256, **ids, **options)


def tiny_samples(model: Any, count: int = 12, **options: Any) -> ReferenceSamples:
    return sample_reference(
        model,
        eval_rows()[Task.DPO],
        count,
        **({"batch_size": 4, "seed": 0, "pad_token_id": PAD_ID} | options),
        eos_token_id=int(TOKENIZER.eos_token_id),
    )


# --- the number


@pytest.mark.parametrize(("p", "q"), [(0.3, 0.5), (0.4, 0.1)])
def test_the_kl_of_two_coins_is_the_closed_form(p: float, q: float) -> None:
    """Within four standard errors: one false alarm in 16,000 seeds, and the seed is fixed."""
    samples = coin_samples(p, 3000, seed=5)
    values = samples.kl(coin(q), batch_size=256, pad_token_id=PAD)
    error = values["kl_reference_se"]
    expected = kl_of_coins(p, q, tokens=6)  # as long as the longest response of the rows
    assert abs(values["kl_reference"] - expected) < 4 * error < 0.3 * expected
    tokens = sum(len(row["completion_ids"]) for row in samples.rows)
    per_token = values["kl_reference"] * len(samples.rows) / tokens
    assert values["kl_reference_per_token"] == pytest.approx(per_token, rel=1e-12)


def test_samples_are_scored_as_the_reference_gives_them() -> None:
    """Up to and with the end, prompts of different lengths side by side."""
    p = 0.3
    for row in coin_samples(p, 50, seed=1).rows:
        *words, last = row["completion_ids"]
        assert set(words) <= {WORD}
        assert last == END or len(words) == 5
        ended = last == END
        logp = math.log(p) * ended + math.log(1 - p) * (len(words) + (not ended))
        assert row["ref_logps"] == pytest.approx(logp, rel=1e-5)


@pytest.mark.parametrize("packing", [True, False])
def test_the_kl_of_a_policy_to_itself_is_zero(packing: bool, tmp_path: Path) -> None:
    """To the last bit: the same batches, in evaluation mode, even with dropout in the model."""
    model = make_policy(hidden_dropout=0.1).train()
    samples = tiny_samples(model, packing=packing)
    assert model.training
    values = samples.kl(model, batch_size=4, pad_token_id=PAD_ID)
    assert values == {
        "kl_reference": 0.0,
        "kl_reference_per_token": 0.0,
        "kl_reference_se": 0.0,
    }


def test_training_moves_the_policy_away_and_logs_it(tmp_path: Path) -> None:
    trainer = make_trainer(
        Single(Task.SFT),
        tmp_path,
        held_out=eval_rows(),
        reference_samples=tiny_samples(make_policy()),
        eval_strategy="steps",
        eval_steps=5,
        eval_on_start=True,
    )
    trainer.train()
    kls = [log["eval_kl_reference"] for log in trainer.state.log_history if "eval_sft_loss" in log]
    assert kls[0] == 0.0
    assert kls[-1] != 0.0
    assert kls[-1] == pytest.approx(trainer.held_out()["kl_reference"], rel=1e-6)


def test_one_sample_has_no_standard_error() -> None:
    values = tiny_samples(make_policy(), 1).kl(make_policy(1), batch_size=4, pad_token_id=PAD_ID)
    assert values.keys() == {"kl_reference", "kl_reference_per_token"}


# --- the draw


def test_the_draw_is_a_function_of_its_seed_and_leaves_no_trace() -> None:
    model = make_policy()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, again, other = (tiny_samples(model, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert first == again
    assert first != other


def test_generation_settings_of_the_model_do_not_bend_the_samples() -> None:
    """Greedy, penalised, cut: what a chat model brings along is for its users."""
    model, plain = make_policy(), make_policy()
    own = GenerationConfig(do_sample=True, top_k=1, repetition_penalty=5.0, min_new_tokens=9)
    model.generation_config = own
    assert tiny_samples(model) == tiny_samples(plain)
    assert model.generation_config is own


def test_responses_fit_into_the_positions_of_the_model() -> None:
    long = [row | {"prompt_ids": row["prompt_ids"] * 9} for row in eval_rows()[Task.DPO]]
    rows = [row | {"prompt_ids": row["prompt_ids"][:28]} for row in long]
    samples = sample_reference(
        make_policy(), rows, 4, batch_size=4, seed=0, pad_token_id=PAD_ID, eos_token_id=1
    )
    longest = max(len(row["completion_ids"]) for row in samples.rows)
    assert 28 + longest <= make_policy().config.max_position_embeddings == 32


def test_samples_stay_where_the_rows_leave_the_rotary_factors_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One longer row would change the values of all rows of its batch."""
    rows = [
        {"prompt_ids": [5] * prompt, "chosen_ids": [6] * response, "rejected_ids": [7]}
        for prompt, response in ((20, 2), (2, 18))
    ]
    lengths = []
    for limit in (None, 22):
        monkeypatch.setattr(llm.model.samples, "rotary_limit", lambda _, limit=limit: limit)
        samples = sample_reference(
            make_policy(), rows, 8, batch_size=4, seed=0, pad_token_id=PAD_ID, eos_token_id=1
        )
        lengths.append(max(map(row_length, samples.rows)))
    assert lengths[1] <= max(map(row_length, rows)) == 22 < lengths[0]


# --- in a run


def test_a_restart_reads_what_the_first_start_has_drawn(tmp_path: Path) -> None:
    rows, said, none = eval_rows()[Task.DPO], list[str](), list[Row]()
    flags = ["--use_cpu", "true", "--output_dir", str(tmp_path), "--kl_rows"]

    def start(count: int, rows: list[Row], policy: Any) -> list[Row]:
        config = parse([*flags, str(count)])
        samples = samples_of_run(config, policy, TOKENIZER, rows, said.append)
        return none if samples is None else list(samples.rows)

    first = start(6, rows, make_policy())
    assert len(first) == 6
    assert start(6, rows, None) == first  # no model is needed
    assert len(said) == 1
    (tmp_path / FILE).write_text("{", encoding="utf-8")  # damaged: drawn again, the same
    assert start(6, rows, make_policy()) == first
    other = [row | {"ref_chosen_logps": 0.0} for row in rows]  # of another reference
    assert start(6, other, make_policy(1)) != first
    assert len(start(5, rows, make_policy())) == 5
    assert len(said) == 4
    assert start(0, rows, None) == none


def test_a_number_of_samples_that_means_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="--kl_rows is -1; it must not be negative"):
        parse(["--use_cpu", "true", "--kl_rows", "-1"])
