"""LoRA through peft: what is trained, what is saved, what merges; and the token-level preview."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _tiny import TOKENIZER, make_policy
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, set_seed

from llm import export, preview
from llm.flags.arguments import ModelArguments
from llm.flags.parse import TINY_RECIPE, parse
from llm.model.load import load_policy
from llm.run import main
from llm.setup import prepare
from theory.cli import UserError
from theory.tasks import Task

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


def test_an_adapter_goes_on_being_trained(own: Callable[..., list[str]], tmp_path: Path) -> None:
    """The policy is the output of a run with adapters: it starts where that run ended."""
    first, second = tmp_path / "out", tmp_path / "second"
    main(own("--algo", "sft", *LORA))
    main(own("--algo", "sft", "--output_dir", str(second), "--model_name_or_path", str(first)))
    summaries = [json.loads((out / "joint_summary.json").read_text()) for out in (first, second)]
    held_out = [summary["held_out"] for summary in summaries]
    # The losses are read off the same float32 weights, saved and loaded.
    assert held_out[1]["before"]["sft_loss"] == pytest.approx(held_out[0]["after"]["sft_loss"])
    assert held_out[1]["after"]["sft_loss"] < held_out[0]["after"]["sft_loss"] - 1e-3
    record = json.loads((second / "adapter_config.json").read_text())
    assert record["base_model_name_or_path"] == str(tmp_path / "model")
    assert record["r"] == 4
    export.main([str(second), "--out", str(tmp_path / "merged")])
    adapted = logits(AutoPeftModelForCausalLM.from_pretrained(second))
    plain = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(plain, adapted, rtol=1e-5, atol=1e-5)


def adapter_on(model: Any, where: Path, **options: Any) -> Any:
    """A saved adapter that does something, on a saved model; the adapted model."""
    model.save_pretrained(where / "base")
    TOKENIZER.save_pretrained(where / "base")
    base = AutoModelForCausalLM.from_pretrained(where / "base")
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, **options))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    adapted.save_pretrained(where / "adapter")
    TOKENIZER.save_pretrained(where / "adapter")
    return adapted


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True:UserWarning:peft")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning:peft")
@pytest.mark.parametrize(
    ("targets", "tied"),
    [
        (["query_key_value", "lm_head"], False),
        (["embed_in"], False),
        (["query_key_value"], True),
    ],
)
def test_tied_embeddings_part_where_an_adapter_changes_one_of_them(
    targets: list[str], tied: bool, tmp_path: Path
) -> None:
    """Merged into the one tensor, what was trained for the output would act on the input too."""
    model = make_policy(tie_word_embeddings=True)
    adapted = adapter_on(model, tmp_path, target_modules=targets)
    expected = logits(adapted)
    export.main([str(tmp_path / "adapter"), "--out", str(tmp_path / "merged")])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    assert merged.config.tie_word_embeddings is tied
    ends = merged.get_input_embeddings().weight, merged.get_output_embeddings().weight
    assert (ends[0] is ends[1]) is tied
    assert (logits(model) - expected).abs().max() > 1e-2, "the adapter did nothing"


def test_a_merge_that_is_another_function_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter_on(make_policy(), tmp_path, target_modules=["query_key_value"])
    monkeypatch.setattr(export, "merged", lambda adapted: adapted.unload())
    with pytest.raises(UserError, match=r"differs from the adapted one by \S+ nats a token"):
        export.main([str(tmp_path / "adapter"), "--out", str(tmp_path / "merged")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias:UserWarning:peft")
def test_the_base_is_the_reference_without_the_biases_of_the_adapter(
    own: Callable[..., list[str]], tmp_path: Path
) -> None:
    """peft leaves trained biases on when it takes the adapter off."""
    adapted = adapter_on(make_policy(), tmp_path, target_modules=["query_key_value"], bias="all")
    flags = ("--model_name_or_path", str(tmp_path / "adapter"), "--reference", "base")
    setup = prepare(parse(own("--algo", "dpo", "--kl_rows", "0", *flags)), lambda _: None)
    row = setup.train[Task.DPO].rows[0]
    ids = torch.tensor([row["prompt_ids"] + row["chosen_ids"]])
    with adapted.disable_adapter(), torch.no_grad():
        shifted = adapted.eval()(input_ids=ids).logits
    with torch.no_grad():
        exact = AutoModelForCausalLM.from_pretrained(tmp_path / "base")(input_ids=ids).logits
    sums = [
        logits[0, :-1]
        .log_softmax(-1)
        .gather(1, ids[0, 1:, None])[len(row["prompt_ids"]) - 1 :]
        .sum()
        for logits in (exact, shifted)
    ]
    assert row["ref_chosen_logps"] == pytest.approx(float(sums[0]), abs=1e-4)
    assert abs(float(sums[1] - sums[0])) > 0.1


def test_an_adapter_without_a_tokenizer_has_that_of_its_base(
    own: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = own()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    lora = LoraConfig(r=2, target_modules=["query_key_value"])
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    preview.main([*command, "--model_name_or_path", str(tmp_path / "adapter")])
    assert "sft train: 40 of 40 rows kept" in capsys.readouterr().out


# --- 4-bit weights


@pytest.fixture
def llama(own: Callable[..., list[str]], tmp_path: Path) -> Callable[..., list[str]]:
    """The command line of a QLoRA run on a tiny Llama."""
    pytest.importorskip("bitsandbytes", reason="QLoRA needs the extra `qlora`")
    options = {name: getattr(TOKENIZER, name) for name in ("eos_token_id", "pad_token_id")}
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=64,  # bitsandbytes rounds blocks of 64 weights together
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=TOKENIZER.eos_token_id,
        **options,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    TOKENIZER.save_pretrained(tmp_path / "llama")
    flags = ("--use_peft", "true", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj")
    start = ("--model_name_or_path", str(tmp_path / "llama"), *flags, "--load_in_4bit", "true")
    return lambda *more: own("--algo", "mix", *start, *more)


def test_adapters_over_4_bit_weights_learn_and_merge_into_what_was_trained(
    llama: Callable[..., list[str]], tmp_path: Path
) -> None:
    command = llama("--gradient_checkpointing", "true")
    main(command)
    out, merged = tmp_path / "out", tmp_path / "merged"
    held_out = json.loads((out / "joint_summary.json").read_text())["held_out"]
    assert held_out["before"]["dpo_loss"] == pytest.approx(0.6931, abs=1e-4)
    for name in ("dpo_loss", "sft_loss"):
        assert held_out["after"][name] < held_out["before"][name] - 1e-3
    # Every adapter has learnt: the gradient passes through the 4-bit layers above it.
    trained = load_file(out / "adapter_model.safetensors")
    steps = {name: float(tensor.abs().max()) for name, tensor in trained.items() if "_B" in name}
    assert len(steps) == 4
    assert min(steps.values()) > 1e-3

    export.main([str(out), "--out", str(merged)])
    policy = load_policy(ModelArguments(model_name_or_path=str(out), load_in_4bit=True))
    weight = policy.get_base_model().model.layers[0].mlp.up_proj.weight
    assert (weight.dtype, weight.numel()) == (torch.uint8, 64 * 64 // 2), "two weights a byte"
    adapted = logits(policy)
    plain = AutoModelForCausalLM.from_pretrained(merged)
    assert not hasattr(plain.config, "quantization_config")
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.float32}
    # As for adapters over full weights: rounding of float32.
    torch.testing.assert_close(logits(plain), adapted, rtol=1e-5, atol=1e-5)
    full = logits(load_policy(ModelArguments(model_name_or_path=str(out))))
    assert (full - adapted).abs().max() > 1e-2, "the rounding of the weights was no part of it"


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
    assert "ALRIGHT, lam 0.3, seed 42" in card
    assert f"base_model: {tmp_path / 'model'}" in card
    assert "| dpo train | " in card
    summary = json.loads((tmp_path / "out" / "joint_summary.json").read_text())
    after = summary["held_out"]["after"]["dpo_loss"]
    assert f"{after:.4f}" in card


@pytest.mark.parametrize("name", ["tiny", "pythia-1b", "llama-3-8b"])
def test_every_recipe_is_a_valid_command_line(name: str) -> None:
    recipe = TINY_RECIPE.with_name(f"{name}.yaml")
    flags = ["--algo", "maxright", "--lam", "0.25", "--use_cpu", "true"]  # bf16 asks for a GPU else
    config = parse(["--config", str(recipe), *flags])
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
    assert len(blocks) == 12, "two rows of four sets: chosen, rejected and a completion each"
    for block in blocks:
        lines = block.split("\n\n")[0].splitlines()
        marks = ["trained" in line for line in lines if line[:6].strip().isdigit()]
        first = marks.index(True)
        assert first > 0
        assert all(marks[first:])
        assert "'<eos>'" in next(line for line in reversed(lines) if "trained" in line)
