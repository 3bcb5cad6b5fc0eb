"""Pretraining: Pythia's sizes, rows that cover every token once, a run that resumes and loads."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _text import make_tokenizer, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig

from llm.formats import RowError
from llm.pretrain.__main__ import main
from llm.pretrain.model import (
    END,
    SIZES,
    Size,
    bare_tokenizer,
    model_config,
    new_model,
    train_tokenizer,
)
from llm.pretrain.settings import parse
from llm.pretrain.texts import (
    CUT,
    EMPTY_TEXT,
    embedded_documents,
    encode_documents,
    read_documents,
    split_documents,
    texts_of,
)
from llm.run import main as run
from theory.cli import UserError

WORDS = ["a lamp in the shed", "the lamp is lit", "who lit the lamp ?", "nobody knows"]


# ------------------------------------------------------------------------------ sizes and tokenizer


PYTHIA = {
    "14m": 14_067_712,
    "31m": 30_494_720,
    "70m": 70_426_624,
    "160m": 162_322_944,
    "410m": 405_334_016,
    "1b": 1_011_781_632,
}
"""Parameters of the published models with their 50304 rows of embedding."""


@pytest.mark.parametrize("name", PYTHIA)
def test_a_named_size_has_the_parameters_of_pythia(name: str) -> None:
    class Tokenizer:
        eos_token_id = pad_token_id = 0

        def __len__(self) -> int:
            return 50277  # of GPT-NeoX-20B

    config = model_config(SIZES[name], Tokenizer())
    assert config.vocab_size == 50304
    assert config.rope_parameters["partial_rotary_factor"] == 0.25
    with torch.device("meta"):
        model = new_model(config)
    assert sum(each.numel() for each in model.parameters()) == PYTHIA[name]


def test_a_trained_tokenizer_writes_every_text_and_is_the_same_every_time() -> None:
    first, second = (train_tokenizer(WORDS, 300) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    text = "Ünseen → 'ẞ' \n\t lamp"  # none of these letters was trained on
    assert first.decode(first(text)["input_ids"]) == text
    assert len(first(WORDS[0])["input_ids"]) < len(WORDS[0])
    assert len(first) <= 300


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(UserError, match=r"--vocab_size is 100; .* 258"):
        train_tokenizer(WORDS, 100)


def test_a_tokenizer_file_alone_is_told_what_ends_a_text(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    tokenizer = bare_tokenizer(tmp_path / "tokenizer.json", "</s>")
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("</s>", "</s>")
    assert tokenizer("ab")["input_ids"][-1] == make_tokenizer()("ab")["input_ids"][-1]
    with pytest.raises(UserError, match=r"--eos_token <none> is no token"):
        bare_tokenizer(tmp_path / "tokenizer.json", "<none>")
    with pytest.raises(UserError, match="cannot be read"):
        bare_tokenizer(tmp_path / "missing.json", "</s>")


@pytest.mark.parametrize(
    ("size", "match"),
    [
        (Size(30, 1, 4, 64), "30 in 4 heads"),
        (Size(16, 1, 4, 64), "multiple of 8"),
    ],
)
def test_a_shape_that_is_no_model_is_refused_in_one_line(size: Size, match: str) -> None:
    with pytest.raises(UserError, match=match):
        model_config(size, make_tokenizer())


# -------------------------------------------------------------------------------------------- texts


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5), max_length=st.integers(2, 17))
def test_every_token_of_every_document_is_learnt_exactly_once(
    lengths: list[int], max_length: int
) -> None:
    tokenizer = make_tokenizer()
    texts = ["xy"[i % 2] * length for i, length in enumerate(lengths)]
    encoded = encode_documents(texts, tokenizer, max_length, "texts")
    end = tokenizer.eos_token_id
    assert all(len(row["prompt_ids"]) == 1 for row in encoded.rows)
    assert all(2 <= 1 + len(row["completion_ids"]) <= max_length for row in encoded.rows)
    learnt = [token for row in encoded.rows for token in row["completion_ids"]]
    documents = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert learnt == [token for ids in documents for token in [*ids, end]]
    # What a row continues is the token before it, and a document continues the end of another.
    before = [row["prompt_ids"][0] for row in encoded.rows]
    stream = [end, *learnt]
    starts = [
        sum(len(row["completion_ids"]) for row in encoded.rows[:i]) for i in range(len(before))
    ]
    assert before == [stream[start] for start in starts]
    assert encoded.report.notes.get(CUT, 0) == sum(length > max_length - 2 for length in lengths)


def test_documents_are_plain_text_or_prompt_and_chosen_answer(
    tmp_path: Path, temporary_datasets_cache: None
) -> None:
    sources = [
        write_jsonl(tmp_path / "plain.jsonl", [{"text": "one"}, {"text": " "}]),
        write_jsonl(tmp_path / "sft.jsonl", [{"prompt": "two ", "completion": "three"}]),
        write_jsonl(
            tmp_path / "dpo.jsonl", [{"prompt": "four ", "chosen": "five", "rejected": "six"}]
        ),
        write_jsonl(
            tmp_path / "chat.jsonl",
            [{"messages": [{"role": r, "content": r} for r in ("user", "assistant")]}],  # type: ignore[dict-item]
        ),
    ]
    documents = read_documents(sources, split="train", column="text", limit=None)
    texts = ["one", "two three", "four five", "user\n\nassistant"]
    assert list(texts_of(documents)) == texts
    (dropped,) = [each for each in documents if isinstance(each, RowError)]
    assert dropped.reason == EMPTY_TEXT
    report = encode_documents(documents, make_tokenizer(), 32, "all").report
    assert (report.total, report.kept, report.dropped) == (5, 4, {EMPTY_TEXT: 1})


def test_whole_documents_are_held_out_and_none_is_lost() -> None:
    documents = [f"document {i}" for i in range(50)]
    train, held_out = split_documents(documents, 0.1, seed=3)
    assert sorted([*train, *held_out]) == sorted(documents)
    assert len(held_out) == 5
    assert split_documents(documents, 0.1, seed=3) == (train, held_out)
    assert split_documents(documents, 0.1, seed=4)[1] != held_out


def test_held_out_texts_of_the_default_are_not_trained_on() -> None:
    train, held_out = embedded_documents(seed=0)
    assert not set(map(str, train)) & set(map(str, held_out))
    assert train != embedded_documents(seed=1)[0]


# --------------------------------------------------------------------------------------- whole runs


def flags(out: Path, *extra: str) -> list[str]:
    return [
        *("--output_dir", str(out), "--max_steps", "24", "--max_train_rows", "120"),
        *("--max_eval_rows", "20", "--use_cpu", "true", "--disable_tqdm", "true"),
        *("--eval_steps", "12", "--per_device_train_batch_size", "8", *extra),
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pretrained") / "out"
    main(flags(out, "--save_strategy", "steps", "--save_steps", "12"))
    return out


def summary_of(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "joint_summary.json").read_text()))


def test_pretraining_lowers_the_held_out_perplexity(trained: Path) -> None:
    summary = summary_of(trained)
    model = AutoModelForCausalLM.from_pretrained(trained)
    before, after = (summary["perplexity"][moment] for moment in ("before", "after"))
    # Random weights of size 0.02 know nothing: all tokens are about equally likely.
    assert before == pytest.approx(model.config.vocab_size, rel=0.2)
    assert after < 0.3 * before
    assert after == pytest.approx(math.exp(summary["held_out"]["after"]["sft_loss"]))


def test_the_model_on_disk_is_the_one_that_was_measured(trained: Path) -> None:
    """The perplexity anew, document by document, by transformers' own loss."""
    model = AutoModelForCausalLM.from_pretrained(trained).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert isinstance(model.config, GPTNeoXConfig)
    assert tokenizer.eos_token == END
    total, tokens = 0.0, 0
    for text in texts_of(embedded_documents(seed=0)[1][:20]):
        ids = torch.tensor([[model.config.eos_token_id, *tokenizer(text)["input_ids"],
                             model.config.eos_token_id]])  # fmt: skip
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    expected = summary_of(trained)["held_out"]["after"]["sft_loss"]
    assert total / tokens == pytest.approx(expected, rel=1e-5)  # float32, other batches


def test_a_resumed_pretraining_ends_with_the_same_bits(trained: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    killed.mkdir()
    shutil.copytree(trained / "checkpoint-12", killed / "checkpoint-12")
    more = ("--save_strategy", "steps", "--save_steps", "12")
    main(flags(killed, *more, "--resume_from_checkpoint", "true"))
    whole, resumed = (AutoModelForCausalLM.from_pretrained(out) for out in (trained, killed))
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0.0, atol=0.0)
    lines = (killed / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line)["step"] for line in lines]
    assert min(logged) > 12  # the first half was not trained again


def test_llm_run_trains_on_from_a_pretrained_model(
    trained: Path, tmp_path: Path, temporary_datasets_cache: None
) -> None:
    rows = [{"prompt": "how do i ", "completion": f"lift the lamp {i} ?"} for i in range(12)]
    data = write_jsonl(tmp_path / "sft.jsonl", rows)
    out = tmp_path / "run"
    common = ["--use_cpu", "true", "--disable_tqdm", "true", "--report_to", "none"]
    command = ["--model_name_or_path", str(trained), "--sft_dataset", data, "--algo", "sft"]
    run([*command, *common, "--max_steps", "4", "--output_dir", str(out)])
    assert summary_of(out)["steps"] == {"sft": 4}


def test_own_texts_with_a_given_tokenizer_and_explicit_shape(
    tmp_path: Path, temporary_datasets_cache: None, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    texts = write_jsonl(tmp_path / "t.jsonl", [{"story": f"ab {i} " * 30} for i in range(30)])
    config = tmp_path / "own.yaml"
    config.write_text(f"texts: [{texts}]\ntext_column: story\nmax_length: 32\nhidden_size: 24\n")
    out = tmp_path / "out"
    shape = ("--num_attention_heads", "3", "--num_hidden_layers", "1", "--hidden_size", "48")
    main(flags(out, "--config", str(config), "--tokenizer", str(tmp_path / "tokenizer"), *shape))
    made = json.loads((out / "config.json").read_text())
    assert (made["hidden_size"], made["intermediate_size"]) == (48, 192)
    assert (made["num_hidden_layers"], made["num_attention_heads"]) == (1, 3)
    assert made["vocab_size"] == 384  # 260 tokens, in multiples of 128
    assert summary_of(out)["rows"]["sft held-out"]["total"] == 2  # 5% of 30
    assert "cut into several rows" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------- flags


def test_the_peak_learning_rate_goes_with_the_size_unless_it_is_given(tmp_path: Path) -> None:
    common = ["--use_cpu", "true", "--output_dir", str(tmp_path)]
    assert parse([*common, "--size", "160m"]).run.training.learning_rate == 6e-4
    given_rate = parse([*common, "--size", "160m", "--learning_rate", "2e-4"])
    assert given_rate.run.training.learning_rate == 2e-4
    assert given_rate.run.training.adam_beta2 == 0.95


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        (["--dpo_dataset", "x"], "--dpo_dataset is not used"),
        (["--use_peft", "true"], "--use_peft is not used"),
        (["--lam", "0.5"], "--lam is not used"),
        (["--beta", "0.5"], "--beta is not used"),
        (["--optima", "none"], "--optima is not used"),
        (["--held_out", "0.1"], "--held_out is not used without --texts"),
        (["--texts", "no/such.jsonl"], "--texts no/such.jsonl does not exist"),
        (["--tokenizer", "t", "--vocab_size", "400"], "--vocab_size is not used with --tokenizer"),
        (["--tokenizer", "dir", "--eos_token", "x"], "--eos_token is not used without"),
        (["--config", "no.yaml"], "--config no.yaml: No such file"),
        (["--packing", "false", "--max_tokens_per_batch", "9"], "not used with --packing false"),
    ],
)
def test_a_flag_that_does_nothing_is_refused_in_one_line(
    extra: list[str], match: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=match) as caught:
        parse(["--use_cpu", "true", "--output_dir", str(tmp_path), *extra])
    assert "\n" not in str(caught.value)


def test_held_out_texts_must_not_be_the_trained_ones(tmp_path: Path) -> None:
    texts = write_jsonl(tmp_path / "t.jsonl", [{"text": "a"}])
    with pytest.raises(UserError, match="is trained on"):
        parse(["--texts", texts, "--eval_texts", texts, "--output_dir", str(tmp_path)])


def test_results_of_other_settings_are_not_overwritten(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*_: Any) -> Callable[..., None]:
        raise AssertionError("must be refused before any work")

    monkeypatch.setattr("llm.pretrain.__main__.prepare", nothing)
    with pytest.raises(UserError, match="holds the results of a run with other settings"):
        main(flags(trained, "--hidden_size", "32"))
    assert summary_of(trained)["steps"] == {"sft": 24}


def test_a_length_beyond_the_positions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="max_length is 300 but the model has only 256 positions"):
        main(flags(tmp_path / "out", "--max_length", "300"))
