"""llm.preview --json: what scripts read, and the flags that say how data are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from _text import assistant, make_tokenizer, user, write_jsonl
from transformers import LlamaConfig

from llm import preview
from llm.setup import DATE_FILE
from theory.cli import UserError

pytestmark = pytest.mark.usefixtures("temporary_datasets_cache")
Preview = Callable[..., list[dict[str, Any]]]
TURNS = [user("U0"), assistant("A0"), user("U1"), assistant("A1")]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a tokenizer and a configuration, which is all that a preview needs."""
    make_tokenizer(adds_bos=False).save_pretrained(tmp_path / "model")
    LlamaConfig(max_position_embeddings=64).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def shown(model: Path, capsys: pytest.CaptureFixture[str]) -> Preview:
    def run(source: str | list[str], *flags: str, task: str = "sft") -> list[dict[str, Any]]:
        sources = source if isinstance(source, list) else [source]
        argv = ["--model_name_or_path", str(model), "--output_dir", str(model.parent / "out")]
        argv += ["--algo", task, "--json", "true", f"--{task}_dataset", *sources, *flags]
        preview.main(argv)
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


def test_every_row_is_one_object_in_the_order_of_its_file(shown: Preview, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"messages": TURNS, "id": i} for i in range(8)]
    rows[3] = {"messages": [user("U")], "id": 3}
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    *listed, last = shown(source, "--max_dropped_share", "0.5", "--held_out", "0.3")
    assert [row["row"] for row in listed] == list(range(8))
    assert {row["part"] for row in listed} == {"train", "held-out"}
    assert {row["objective"] for row in listed} == {"sft"}
    kept = [row for row in listed if row["dropped"] is None]
    assert len(kept) == 7
    assert all(row["unused_columns"] == ["id"] for row in kept)
    assert kept[0]["prompt"] == "<s>[user]U0</s>[assistant]"
    assert kept[0]["responses"] == ["A0</s>", "A1</s>"]
    assert listed[3]["dropped"].startswith("no answer to train on (roles")
    assert listed[3]["responses"] == []
    reports = last["summary"]
    assert sum(report["kept"] for report in reports.values()) == 7
    assert sum(report["turns"] for report in reports.values()) == 14


def test_rows_of_which_none_is_left_are_listed_and_refused(
    shown: Preview, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", [{"words": "x"}] * 4)
    with pytest.raises(UserError, match=r"none of 3 rows .*--sft_columns"):
        shown(source)
    *listed, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert len(listed) == 4
    assert all("no known format" in row["dropped"] for row in listed)
    assert last["summary"]["sft train"]["kept"] == 0


def test_rows_that_their_owner_leaves_out_are_no_loss(shown: Preview, tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completion": "c", "label": i > 5} for i in range(12)]
    listed = shown(write_jsonl(tmp_path / "rows.jsonl", rows))[:-1]
    assert [row["dropped"] is None for row in listed] == [i > 5 for i in range(12)]
    assert listed[0]["part"] == "held-out"  # of which nothing is left: a preview goes on


def test_flags_say_what_columns_mean_and_what_to_train_on(shown: Preview, tmp_path: Path) -> None:
    rows = [{"ask": "p", "reply": "c", "system": "s"}] * 4
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    row = shown(source, "--sft_columns", "prompt=ask,completion=reply,system=")[0]
    assert (row["prompt"], row["responses"]) == ("p", ["c</s>"])
    assert row["unused_columns"] == ["system"]
    pairs = [{"ask": "p", "good": "c", "bad": "r"}] * 4
    source = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    row = shown(source, "--dpo_columns", "prompt=ask,chosen=good,rejected=bad", task="dpo")[0]
    assert row["responses"] == ["c</s>", "r</s>"]
    source = write_jsonl(tmp_path / "chats.jsonl", [{"messages": TURNS}] * 4)
    row = shown(source, "--train_on", "last", "--chat_template", "zephyr")[0]
    assert (
        row["prompt"]
        == "<|user|>\nU0</s>\n<|assistant|>\nA0</s>\n<|user|>\nU1</s>\n<|assistant|>\n"
    )
    assert row["responses"] == ["A1</s>\n"]


def test_several_sources_are_mixed(shown: Preview, tmp_path: Path) -> None:
    names = []
    for name in "ab":
        rows = [{"prompt": f"{name}{i} ", "completion": "c"} for i in range(30)]
        names.append(write_jsonl(tmp_path / f"{name}.jsonl", rows))
    *listed, _ = shown([f"{names[0]}:0.9", f"{names[1]}:0.1"])
    prompts = [row["prompt"] for row in listed]
    assert sum(prompt[0] == "a" for prompt in prompts) == 30
    assert len(prompts) == 33
    with pytest.raises(UserError, match=r"gone.jsonl does not exist"):
        shown([names[0], "gone.jsonl:2"])


def test_the_date_of_a_run_is_that_of_its_folder(
    shown: Preview, model: Path, tmp_path: Path
) -> None:
    template = "{{ strftime_now('%Y') }}" + make_tokenizer().chat_template
    make_tokenizer(adds_bos=False, chat_template=template).save_pretrained(model)
    source = write_jsonl(tmp_path / "chats.jsonl", [{"messages": TURNS}] * 4)
    assert shown(source, "--template_date", "1999-01-31")[0]["prompt"].startswith("1999<s>")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / DATE_FILE).write_text("2001-02-03\n", encoding="utf-8")
    assert shown(source)[0]["prompt"].startswith("2001<s>")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--template_date tomorrow", "--template_date is tomorrow"),
        ("--sft_columns prompt", "--sft_columns prompt: give MEANING=COLUMN"),
        ("--preprocessing_num_workers 0", "--preprocessing_num_workers must be at least 1"),
        ("--chat_template vicuna", "none of alpaca, chatml"),
        ("--dpo_columns prompt=a", "--dpo_columns is not used without --dpo_dataset"),
        ("--sft_dataset_config en", "is local and has no configuration 'en'"),
    ],
)
def test_what_is_refused_by_its_flag(
    shown: Preview, tmp_path: Path, flags: str, named: str
) -> None:
    source = write_jsonl(tmp_path / "chats.jsonl", [{"messages": TURNS}] * 4)
    with pytest.raises(UserError) as error:
        shown(source, *flags.split())
    assert named in str(error.value)


def test_the_embedded_corpus_takes_no_flags_of_ones_own_data() -> None:
    with pytest.raises(UserError, match="--train_on: this needs a model of your own"):
        preview.main(["--train_on", "last"])
