"""A run on conversations: its ends stop generation, and its day is kept when it is resumed."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from _text import assistant, make_tokenizer, user, write_jsonl
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from llm.data import templates
from llm.model.load import stop_at
from llm.run import main
from llm.setup import DATE_FILE
from theory.cli import UserError

pytestmark = pytest.mark.usefixtures("temporary_datasets_cache")
END = "<|im_end|>"
TEMPLATE = (
    "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ '[' + m.role + ']' + m.content + '"
    + END
    + "' }}{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    tokenizer.add_special_tokens({"additional_special_tokens": [END]})
    tokenizer.save_pretrained(tmp_path / "model")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    turns = [user("hi"), assistant("yo"), user("so"), assistant("no")]
    source = write_jsonl(tmp_path / "chats.jsonl", [{"messages": turns}] * 12)
    return [
        *("--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out")),
        *("--algo", "sft", "--sft_dataset", source, "--max_steps", "4", "--save_steps", "2"),
        *("--use_cpu", "true", "--disable_tqdm", "true", "--report_to", "none"),
        *("--lr_scheduler_type", "constant", "--per_device_train_batch_size", "2"),
    ]


def test_a_run_on_conversations(
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    main(command)
    out = tmp_path / "out"
    tokenizer = make_tokenizer()
    assert GenerationConfig.from_pretrained(out).eos_token_id == [
        tokenizer.eos_token_id,
        len(tokenizer),  # the end of a turn, which the tokenizer of the run has behind all others
    ]
    printed = capsys.readouterr().out
    assert "11 answers trained on" not in printed
    assert "22 answers trained on" in printed
    assert "columns not used: none" in printed
    summary = json.loads((out / "joint_summary.json").read_text("utf-8"))
    assert summary["rows"]["sft train"]["turns"] == 22
    # the next day
    tomorrow = datetime.date.today() + datetime.timedelta(days=1)
    day = SimpleNamespace(today=lambda: tomorrow, fromisoformat=datetime.date.fromisoformat)
    monkeypatch.setattr(templates, "datetime", SimpleNamespace(date=day))
    longer = [*command, "--max_steps", "6"]
    (out / "joint_summary.json").unlink()
    main([*longer, "--resume_from_checkpoint", "true"])
    (out / "joint_summary.json").unlink()
    (out / DATE_FILE).unlink()
    with pytest.raises(UserError, match="its sft data is"):
        main([*longer, "--max_steps", "8", "--resume_from_checkpoint", "true"])


def test_ends_are_added_to_those_of_the_model() -> None:
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=1))
    assert stop_at(model, []).generation_config.eos_token_id == 1
    assert stop_at(model, [7, 1]).generation_config.eos_token_id == [1, 7]
    assert stop_at(model, [3, 7]).generation_config.eos_token_id == [1, 7, 3]
    model.generation_config.eos_token_id = None
    assert stop_at(model, [3]).generation_config.eos_token_id == [3]
