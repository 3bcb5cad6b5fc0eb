"""llm.setup: which rows a run trains on and holds out, and when it refuses to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from _text import write_jsonl
from safetensors.torch import load_file, save_file

import llm.flags.checks
from llm import preview
from llm.compare.pool import shared_fingerprint
from llm.data import embedded, sources
from llm.data.checks import LEAKED
from llm.flags.parse import parse
from llm.setup import prepare, read_data
from llm.single_runs import estimate_fingerprint
from theory.cli import UserError
from theory.tasks import Task

pytestmark = pytest.mark.usefixtures("temporary_datasets_cache")
Own = Callable[..., list[str]]


def silent(_: str) -> None:
    pass


def raw_rows(command: list[str]) -> dict[Task, tuple[Any, Any]]:
    return read_data(parse(command), silent)[1]


def texts(rows: Any) -> list[str]:
    rows = rows if isinstance(rows, list) else sources.raw_rows(rows[:])
    return [row["prompt"] + row.get("completion", row.get("chosen")) for row in rows]


class _FirstError(Exception): ...


def test_determinism_is_settled_before_the_model_computes_anything(
    own: Own, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA the first product decides, and Trainer comes after the reference's."""

    def settled(seed: int) -> None:
        raise _FirstError(seed)

    monkeypatch.setattr("llm.setup.enable_full_determinism", settled)
    with pytest.raises(_FirstError, match="7"):
        prepare(parse(own("--full_determinism", "true", "--seed", "7")), silent)


def test_a_model_counts_by_its_weights_wherever_it_lies(own: Own, tmp_path: Path) -> None:
    """For kept comparisons and estimates: the same in another folder, other weights in its own."""

    def told(model: Path) -> tuple[str, str]:
        config = parse(own("--model_name_or_path", str(model)))
        setup = prepare(config, silent)
        return estimate_fingerprint(setup, config), shared_fingerprint(config, setup)

    here = Path(str(parse(own()).model.model_name_or_path))
    there = shutil.copytree(here, tmp_path / "there")
    mine = told(here)
    assert told(there) == mine
    weights = load_file(there / "model.safetensors")
    next(iter(weights.values()))[-1] += 1e-3
    save_file(weights, there / "model.safetensors", {"format": "pt"})
    assert not set(told(there)) & set(mine)


# --- splits


def test_slices_of_one_set_are_trained_on_and_held_out(own: Own, tmp_path: Path) -> None:
    flags = ("--sft_train_split", "train[:30]", "--sft_eval_split", "train[30:]")
    train, held_out = raw_rows(own(*flags, evaluation_sets=False))[Task.SFT]
    everything = [json.loads(line) for line in (tmp_path / "sft.jsonl").read_text().splitlines()]
    assert texts(train) == texts(everything[:30])
    assert texts(held_out) == texts(everything[30:])


def test_a_split_of_the_evaluation_set_is_read_from_it(own: Own, tmp_path: Path) -> None:
    flags = ("--dpo_eval_split", "train[4:6]", "--max_eval_rows", "1")
    train, held_out = raw_rows(own(*flags))[Task.DPO]
    lines = (tmp_path / "dpo_eval.jsonl").read_text().splitlines()
    assert texts(held_out) == texts([json.loads(lines[4])])
    assert len(train) == 40


def test_a_hub_id_gets_its_configuration_and_splits(
    own: Own, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load(names: list[str], **options: Any) -> list[Any]:
        asked.append((*names, options["config_name"], options["split"], options["limit"]))
        return []

    monkeypatch.setattr("llm.setup.load_sources", load)
    command = own("--sft_dataset", "who/sft", "--dpo_dataset", "who/dpo", evaluation_sets=False)
    command += ["--sft_dataset_config", "en", "--sft_eval_split", "test", "--max_eval_rows", "7"]
    command += ["--dpo_dataset_config", "hard", "--dpo_train_split", "train_prefs"]
    raw_rows([*command, "--dpo_eval_dataset", "who/other", "--dpo_max_train_rows", "9"])
    assert sorted(asked, key=str) == [
        ("who/dpo", "hard", "train_prefs", 9),
        ("who/other", None, None, 7),
        ("who/sft", "en", "test", 7),
        ("who/sft", "en", "train", None),
    ]


# --- streaming


@pytest.mark.parametrize("evaluation_sets", [True, False])
def test_a_stream_gives_the_rows_that_a_download_would(own: Own, evaluation_sets: bool) -> None:
    command = own(
        *("--sft_max_train_rows", "20", "--dpo_max_train_rows", "10", "--max_eval_rows", "4"),
        evaluation_sets=evaluation_sets,
    )
    streamed, loaded = raw_rows([*command, "--streaming", "true"]), raw_rows(command)
    for task, sizes in ((Task.SFT, (20, 4)), (Task.DPO, (10, 4))):
        for one, other in zip(streamed[task], loaded[task], strict=True):
            assert one.to_list() == other.to_list()
        if evaluation_sets:
            assert tuple(map(len, streamed[task])) == sizes
        else:  # held out of the rows that were read: the share 0.05, at least one row
            assert sum(map(len, streamed[task])) == sizes[0]


def test_a_stream_is_not_read_beyond_its_rows(own: Own, tmp_path: Path) -> None:
    """The second file of the set is no JSON: a stream of the first one's rows never opens it."""
    folder = tmp_path / "set"
    folder.mkdir()
    rows = embedded.generate_corpus(train_rows=10, eval_rows=10).sft_train
    write_jsonl(folder / "train-0.jsonl", rows)
    (folder / "train-1.jsonl").write_text("no JSON\n")
    command = own("--sft_dataset", str(folder), "--max_eval_rows", "4")
    train, _ = raw_rows([*command, "--max_train_rows", "10", "--streaming", "true"])[Task.SFT]
    assert texts(train) == texts(rows)
    with pytest.raises(UserError, match=r"train-1.jsonl line 1 is not JSON"):
        raw_rows(command)


def test_a_streamed_run_is_previewed(own: Own, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--streaming", "true", "--max_train_rows", "20", "--max_eval_rows", "4")
    preview.main(["--rows", "1", *own(*flags)])
    printed = capsys.readouterr().out
    assert "dpo train: 20 of 20 rows kept" in printed
    assert "sft held-out: 4 of 4 rows kept" in printed
    assert "'<eos>'" in printed


# --- what is refused


@pytest.fixture
def flawed(own: Own, tmp_path: Path) -> list[str]:
    """A quarter of the demonstrations have no response; half the held-out ones are trained on."""
    corpus = embedded.generate_corpus(train_rows=40, eval_rows=10)
    broken = [row | {"completion": ""} for row in corpus.sft_train[:10]]
    train = write_jsonl(tmp_path / "flawed.jsonl", [*broken, *corpus.sft_train[10:]])
    leaking = [*corpus.sft_eval[:5], *corpus.sft_train[20:25]]
    held_out = write_jsonl(tmp_path / "leaking.jsonl", leaking)
    flags = ("--sft_dataset", train, "--sft_eval_dataset", held_out)
    return own(*flags, "--algo", "sft", "--kl_rows", "0")


def test_a_set_that_loses_its_rows_stops_the_run_before_training(
    flawed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"10 of 40 dropped is more than --max_dropped_share 0.1"):
        prepare(parse(flawed), silent)
    prepare(parse([*flawed, "--max_dropped_share", "0.25"]), silent)
    with pytest.raises(UserError, match=r"10 dropped \(empty response: .*--max_dropped_share"):
        preview.main(flawed)
    assert "sft train, row 0" in capsys.readouterr().out, "the preview still shows the rows"


def test_rows_that_are_trained_on_and_held_out_are_counted(flawed: list[str]) -> None:
    accepting = [*flawed, "--max_dropped_share", "1"]
    said: list[str] = []
    setup = prepare(parse(accepting), said.append)
    assert setup.held_out[Task.SFT].report.notes == {LEAKED: 5}
    told = f"sft held-out: 10 of 10 rows kept, 0 truncated, 5 noted ({LEAKED})"
    assert any(line.startswith(told) for line in said)
    with pytest.raises(UserError, match=r"5 of 10 leaked is more than --max_leaked_share 0.2"):
        prepare(parse([*accepting, "--max_leaked_share", "0.2"]), silent)


def test_a_random_split_leaks_nothing(own: Own, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{i}", "completion": "c", "chosen": "c", "rejected": "r"} for i in range(40)
    ]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    flags = ("--sft_dataset", source, "--dpo_dataset", source, "--held_out", "0.3")
    for train, held_out in raw_rows(own(*flags, evaluation_sets=False)).values():
        assert len(held_out) == 12
        assert sorted(texts(train) + texts(held_out)) == sorted(texts(rows))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--streaming true", "--streaming reads the first rows: give --dpo_max_train_rows"),
        (
            "--streaming true --dpo_max_train_rows 5 --max_eval_rows 5",
            "--streaming reads the first rows: give --sft_max_train_rows",
        ),
        ("--streaming true --max_train_rows 5", "give --max_eval_rows"),
        ("--sft_dataset rows/v1.5 --sft_eval_dataset rows/v1.5", "--sft_eval_dataset holds the"),
        ("--max_dropped_share 1.1", "--max_dropped_share is 1.1; it must lie in [0, 1]"),
        ("--max_truncated_share -1", "--max_truncated_share is -1.0"),
        ("--max_leaked_share nan", "--max_leaked_share is nan"),
        ("--held_out 0.1", "--held_out is not used: rows to hold out are named"),
        ("--precompute_ref_log_probs false", "the reference is not held in memory"),
        ("--reference_revision v2", "--reference_revision is not used by --reference initial"),
        ("--load_in_4bit true", "--load_in_4bit trains adapters only: give --use_peft true"),
        ("--lora_r 3", "--lora_r is not used without --use_peft true"),
    ],
)
def test_flags_without_a_meaning_are_refused(flags: str, named: str, own: Own) -> None:
    with pytest.raises(UserError) as error:
        parse(own(*flags.split()))
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_a_split_that_is_trained_on_cannot_be_held_out(own: Own) -> None:
    for flags in (
        ("--sft_eval_split", "train"),
        ("--sft_train_split", "train[:5]", "--sft_eval_split", "train[:5]"),
    ):
        with pytest.raises(UserError, match="--sft_eval_split holds the rows that are trained on"):
            parse(own(*flags, evaluation_sets=False))


@pytest.mark.parametrize(
    "flags", ["--streaming true", "--sft_eval_split test", "--load_in_4bit true"]
)
def test_flags_of_own_data_are_refused_for_the_embedded_corpus(flags: str) -> None:
    with pytest.raises(UserError, match="this needs a model of your own"):
        parse(["--use_cpu", "true", *flags.split()])


@pytest.mark.parametrize("flag", ["--reference_cache", "--reference_revision"])
def test_flags_of_the_reference_need_preferences(flag: str, own: Own) -> None:
    command = own("--algo", "sft", flag, "x")
    for name in ("--dpo_dataset", "--dpo_eval_dataset"):
        at = command.index(name)
        del command[at : at + 2]
    with pytest.raises(UserError, match=f"{flag} is not used"):
        parse(command)


def test_a_missing_library_is_named_before_anything_is_opened(
    own: Own, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm.flags.checks, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs bitsandbytes: pip install 'joint-sft-dpo\[qlora"):
        parse(own("--use_peft", "true", "--load_in_4bit", "true"))


def test_the_numbers_of_an_adapter_cannot_be_changed(own: Own, tmp_path: Path) -> None:
    (tmp_path / "model" / "adapter_config.json").parent.mkdir(exist_ok=True)
    command = own()
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"--lora_r: the adapter .* has its own"):
        parse([*command, "--lora_r", "3", "--use_peft", "true"])
    with pytest.raises(UserError, match=r"--use_peft false: .* is an adapter; merge it first"):
        parse([*command, "--use_peft", "false"])
