"""llm.data.embedded: a reproducible corpus with the frequencies promised, tokens, model size."""

from __future__ import annotations

from dataclasses import asdict
from itertools import product

import numpy as np
import pytest
import torch
from _asserts import assert_binomial
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.data import embedded
from llm.data.embedded import (
    CHORES,
    DEMONSTRATED_DIRECT,
    HELD_OUT_SHARE,
    THINGS,
    build_model,
    build_tokenizer,
    cautious_preferred,
    generate_corpus,
)
from llm.data.encode import encode_preference, encode_sft

CAUTIOUS_START = " ask an expert"
SMALL = {"train_rows": 200, "eval_rows": 100}


def is_cautious(answer: str) -> bool:
    return answer.startswith(CAUTIOUS_START)


def asked(row: dict[str, str]) -> tuple[str, str]:
    """The (chore, thing) that a prompt asks about."""
    words = row["prompt"].split()
    (chore,) = [word for word in words if word in CHORES]
    (thing,) = [word for word in words if word in THINGS]
    return chore, thing


def tool_of(answer: str) -> str:
    (tool,) = [word for word in answer.split() if word in CHORES.values()]
    return tool


# --- the corpus


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.0, 1.0))
def test_the_same_seed_gives_the_same_rows(seed: int, conflict: float) -> None:
    first, second = (generate_corpus(conflict, seed=seed, **SMALL) for _ in range(2))
    assert first == second


def test_other_seeds_give_other_rows() -> None:
    first, second = (generate_corpus(seed=seed, **SMALL) for seed in (0, 1))
    for name, rows in asdict(first).items():
        assert rows != getattr(second, name)


def test_the_conflict_changes_labels_only() -> None:
    """Runs at two degrees of conflict differ in nothing but which answer is preferred."""
    low, high = (generate_corpus(conflict, **SMALL) for conflict in (0.0, 1.0))
    assert low.sft_train == high.sft_train
    assert low.sft_eval == high.sft_eval
    assert low.neutral == high.neutral
    for name in ("dpo_train", "dpo_eval"):
        pairs = list(zip(getattr(low, name), getattr(high, name), strict=True))
        assert any(before != after for before, after in pairs)
        for before, after in pairs:
            assert before["prompt"] == after["prompt"]
            assert {before["chosen"], before["rejected"]} == {after["chosen"], after["rejected"]}


def test_held_out_questions_are_never_trained_on() -> None:
    corpus = generate_corpus()
    trained = {asked(row) for row in corpus.sft_train + corpus.dpo_train + corpus.neutral}
    held_out = {asked(row) for row in corpus.sft_eval + corpus.dpo_eval}
    assert trained & held_out == set()
    # 6,000 draws reach each of the 231 pairs, 600 each of the 57 (missing one: 1 in 10^3 seeds).
    assert trained | held_out == set(product(CHORES, THINGS))
    assert len(held_out) == int(HELD_OUT_SHARE * len(CHORES) * len(THINGS)) == 57
    # Each chore is trained on: which tool it takes can be learnt.
    assert {chore for chore, _ in trained} == set(CHORES)


def test_the_sizes_are_those_asked_for() -> None:
    corpus = generate_corpus(train_rows=30, eval_rows=10)
    sizes = {name: len(rows) for name, rows in asdict(corpus).items()}
    assert sizes == {
        "sft_train": 30,
        "sft_eval": 10,
        "dpo_train": 30,
        "dpo_eval": 10,
        "neutral": 30,
    }


@pytest.mark.parametrize("seed", range(3))
def test_demonstrations_are_direct_at_their_frequency(seed: int) -> None:
    corpus = generate_corpus(seed=seed)
    for rows, share in (
        (corpus.sft_train, DEMONSTRATED_DIRECT),
        (corpus.sft_eval, DEMONSTRATED_DIRECT),
        (corpus.neutral, 0.5),
    ):
        direct = sum(not is_cautious(row["completion"]) for row in rows)
        assert_binomial(direct, len(rows), share)


@pytest.mark.parametrize(("conflict", "preferred"), [(0.0, 0.1), (0.5, 0.5), (1.0, 0.9)])
def test_the_cautious_answer_is_preferred_at_its_frequency(
    conflict: float, preferred: float
) -> None:
    assert cautious_preferred(conflict) == pytest.approx(preferred)
    corpus = generate_corpus(conflict)
    for rows in (corpus.dpo_train, corpus.dpo_eval):
        assert_binomial(sum(is_cautious(row["chosen"]) for row in rows), len(rows), preferred)
        assert all(is_cautious(row["chosen"]) != is_cautious(row["rejected"]) for row in rows)


def test_answers_fit_their_questions() -> None:
    corpus = generate_corpus(**SMALL)
    for rows, keys in (
        (corpus.sft_train, ["completion"]),
        (corpus.dpo_train, ["chosen", "rejected"]),
    ):
        for row in rows:
            chore, thing = asked(row)
            for key in keys:
                assert f" {chore} the {thing}" in row[key]
                assert is_cautious(row[key]) or tool_of(row[key]) == CHORES[chore]


def test_the_neutral_corpus_does_not_tell_the_tools() -> None:
    corpus = generate_corpus()
    direct = [row for row in corpus.neutral if not is_cautious(row["completion"])]
    right = sum(tool_of(row["completion"]) == CHORES[asked(row)[0]] for row in direct)
    assert_binomial(right, len(direct), 1 / len(CHORES))


@pytest.mark.parametrize("conflict", [-0.01, 1.01, float("nan")])
def test_a_conflict_outside_the_unit_interval_is_refused(conflict: float) -> None:
    with pytest.raises(ValueError, match="conflict is"):
        generate_corpus(conflict)


# --- tokens and model


def test_tokens_give_every_text_back() -> None:
    tokenizer, corpus = build_tokenizer(), generate_corpus(**SMALL)
    for row in corpus.sft_train + corpus.dpo_train + corpus.neutral:
        for text in row.values():
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids).split() == text.split()


def test_every_word_of_the_vocabulary_is_used() -> None:
    tokenizer = build_tokenizer()
    chores, things = list(CHORES), THINGS
    texts = [
        text.format(chore=chore, thing=thing, tool=CHORES[chore])
        for text in (*embedded.QUESTIONS, embedded.DIRECT, embedded.CAUTIOUS)
        for chore in chores
        for thing in things
    ]
    used = {word for text in texts for word in text.split()}
    assert set(tokenizer.get_vocab()) == used | set(embedded.SPECIAL_TOKENS)


def test_no_row_is_cut_or_dropped() -> None:
    tokenizer, corpus = build_tokenizer(), generate_corpus(**SMALL)
    sft = encode_sft(corpus.sft_train, tokenizer, max_length=64, name="sft")
    dpo = encode_preference(corpus.dpo_train, tokenizer, max_length=64, name="dpo")
    for encoded in (sft, dpo):
        report = encoded.report
        assert (report.total, report.kept, report.truncated) == (200, 200, 0)
        assert report.notes == {}
    for row in sft.rows:
        assert row["completion_ids"][-1] == tokenizer.eos_token_id


def test_the_model_is_tiny_and_its_seed_makes_it() -> None:
    tokenizer = build_tokenizer()
    first, second, other = (build_model(tokenizer, seed) for seed in (0, 0, 1))
    size = sum(parameter.numel() for parameter in first.parameters())
    assert 50_000 < size < 200_000
    assert first.dtype == torch.float32
    assert first.get_output_embeddings().weight is not first.get_input_embeddings().weight
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_the_untrained_model_predicts_next_to_nothing() -> None:
    tokenizer = build_tokenizer()
    ids = torch.arange(len(tokenizer))[None, :60]
    with torch.no_grad():
        loss = build_model(tokenizer)(input_ids=ids, labels=ids).loss.item()
    # Weights of scale 0.02 give logits near 0: the uniform distribution, up to a few percent.
    assert loss == pytest.approx(np.log(len(tokenizer)), rel=0.05)
