"""LoRA through peft: what is trained, what is saved, what merges; and the token-level preview."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import llm.config
from llm import export, preview
from llm.run import main
from theory.cli import UserError

pytestmark = [
    pytest.mark.usefixtures("temporary_datasets_cache"),
    # transformers 5.23 asks itself, through peft, for an attribute that it has deprecated.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    # The older name is the one that all supported versions know.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
]
LORA = ("--use_peft", "true", "--lora_r", "4", "--lora_target_modules", "query_key_value")
TOKENS = torch.tensor([[5, 9, 14, 3, 1]])


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def test_only_adapters_are_trained_and_the_merged_model_is_the_same_function(
    own: Callable[..., list[str]], tmp_path: Path
) -> None:
    main(own("--algo", "alright", *LORA))
    out, merged = tmp_path / "out", tmp_path / "merged"
    names = load_file(out / "adapter_model.safetensors")
    assert names
    assert all("lora_" in name and "query_key_value" in name for name in names)
    assert any(bool(tensor.any()) for name, tensor in names.items() if "lora_B" in name)

    export.main([str(out), "--out", str(merged)])
    adapted = logits(AutoPeftModelForCausalLM.from_pretrained(out))
    base = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    plain = logits(AutoModelForCausalLM.from_pretrained(merged))
    # Merging adds B A to W before the product instead of after it: float32 rounding.
    torch.testing.assert_close(plain, adapted, rtol=1e-5, atol=1e-5)
    assert (plain - base).abs().max() > 1e-4


def test_adapters_resume_to_the_same_bits(own: Callable[..., list[str]], tmp_path: Path) -> None:
    """With LoRA dropout on: the random state of the dropout is part of the checkpoint."""
    saving = ("--save_strategy", "steps", "--save_steps", "3", "--lora_dropout", "0.5")
    command = own("--algo", "mix", *LORA, *saving)
    main(command)
    straight = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    checkpoint = str(tmp_path / "out" / "checkpoint-3")
    main([*command, "--resume_from_checkpoint", checkpoint])
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == straight


def test_the_model_card_states_what_was_trained(
    own: Callable[..., list[str]], tmp_path: Path
) -> None:
    main(own("--algo", "alright", "--lam", "0.3"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Alright(lam=0.3, seed=42)" in card
    assert f"base_model: {tmp_path / 'model'}" in card
    assert "| dpo train | " in card
    summary = json.loads((tmp_path / "out" / "joint_summary.json").read_text())
    after = summary["held_out"]["after"]["dpo_loss"]
    assert f"{after:.4f}" in card


@pytest.mark.parametrize("name", ["tiny", "pythia-1b", "llama-3-8b"])
def test_every_recipe_is_a_valid_command_line(name: str) -> None:
    recipe = Path(llm.config.__file__).parent / "recipes" / f"{name}.yaml"
    flags = ["--algo", "maxright", "--lam", "0.25", "--use_cpu", "true"]  # bf16 asks for a GPU else
    config = llm.config.parse(["--config", str(recipe), *flags])
    assert config.training.lam == 0.25
    assert config.model.use_peft == (name != "tiny")


def test_a_target_that_the_model_lacks_is_one_line(own: Callable[..., list[str]]) -> None:
    command = own("--algo", "sft", "--use_peft", "true", "--lora_target_modules", "q_proj")
    with pytest.raises(UserError, match="--lora_target_modules"):
        main(command)


def test_exporting_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no adapter"):
        export.main([str(tmp_path), "--out", str(tmp_path / "merged")])


def test_the_preview_marks_exactly_the_response(capsys: pytest.CaptureFixture[str]) -> None:
    preview.main(["--rows", "2", "--max_train_rows", "2"])
    blocks = capsys.readouterr().out.split("tokens\n")[1:]
    assert len(blocks) == 6, "two rows: chosen and rejected each, and two completions"
    for block in blocks:
        lines = block.split("\n\n")[0].splitlines()
        marks = ["trained" in line for line in lines if line[:6].strip().isdigit()]
        first = marks.index(True)
        assert first > 0
        assert all(marks[first:])
        assert "'<eos>'" in next(line for line in reversed(lines) if "trained" in line)
