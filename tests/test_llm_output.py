"""What a run leaves loads elsewhere: transformers, its pipeline, peft and lm-eval."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from _text import write_jsonl
from _tiny import TOKENIZER, make_policy
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from llm import export
from llm.data import embedded
from llm.loss.losses import token_logps
from llm.run import main

pytestmark = [
    # peft reads an attribute that transformers has renamed.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]
CORPUS = embedded.generate_corpus(train_rows=24, eval_rows=6)
PAIRS = [(row["prompt"], row["completion"]) for row in CORPUS.sft_eval[:4]]
"""Contexts and continuations; their lengths differ by the third."""
PAIRS[2] = (PAIRS[2][0], 2 * PAIRS[2][1])


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The directories of a full run, of a run with adapters, of their merge, and of the base."""
    root = tmp_path_factory.mktemp("outputs")
    make_policy().save_pretrained(root / "base")
    TOKENIZER.save_pretrained(root / "base")
    flags = ["--model_name_or_path", str(root / "base"), "--max_steps", "6", "--use_cpu", "true"]
    flags += ["--learning_rate", "1e-2", "--disable_tqdm", "true", "--report_to", "none"]
    flags += ["--save_strategy", "no"]
    for name, rows in (("sft", CORPUS.sft_train), ("dpo", CORPUS.dpo_train)):
        flags += [f"--{name}_dataset", write_jsonl(root / f"{name}.jsonl", rows)]
    lora = ["--use_peft", "true", "--lora_r", "4", "--lora_target_modules", "query_key_value"]
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr("datasets.config.HF_DATASETS_CACHE", root / "cache")
        main([*flags, "--output_dir", str(root / "full")])
        main([*flags, *lora, "--output_dir", str(root / "adapters")])
    export.main([str(root / "adapters"), "--out", str(root / "merged")])
    return {path.name: path for path in root.iterdir() if path.is_dir()}


def log_probability(model: torch.nn.Module, context: str, continuation: str) -> float:
    """log pi(continuation | context) by this package's own losses (nats)."""
    prompt = TOKENIZER(context)["input_ids"]
    whole = torch.tensor([TOKENIZER(context + continuation)["input_ids"]])
    labels = whole.clone()
    labels[0, : len(prompt)] = -100
    with torch.no_grad():
        return float(token_logps(model.eval()(input_ids=whole).logits, labels)[0].sum())


@pytest.mark.parametrize("kind", ["full", "merged"])
def test_a_run_loads_in_transformers_as_it_is(kind: str, outputs: dict[str, Path]) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(outputs[kind], output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = AutoTokenizer.from_pretrained(outputs[kind])
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()
    base = AutoModelForCausalLM.from_pretrained(outputs["base"])
    assert log_probability(model, *PAIRS[0]) != log_probability(base, *PAIRS[0])


@pytest.mark.parametrize("kind", ["full", "merged", "adapters"])
def test_the_pipeline_continues_a_prompt_greedily(kind: str, outputs: dict[str, Path]) -> None:
    generate = pipeline("text-generation", model=str(outputs[kind]), device="cpu")
    prompt = PAIRS[0][0]
    (answer,) = generate(prompt, max_new_tokens=4, do_sample=False, return_full_text=False)
    name = "merged" if kind == "adapters" else kind
    model = AutoModelForCausalLM.from_pretrained(outputs[name]).eval()
    ids = TOKENIZER(prompt)["input_ids"]
    for _ in range(4):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    expected = TOKENIZER.decode(ids, skip_special_tokens=True)
    start = TOKENIZER.decode(ids[:-4], skip_special_tokens=True)
    assert answer["generated_text"].strip() == expected.removeprefix(start).strip()


def test_adapters_load_in_peft_and_are_the_merged_model(outputs: dict[str, Path]) -> None:
    base = AutoModelForCausalLM.from_pretrained(outputs["base"])
    start = log_probability(base, *PAIRS[0])
    adapted = PeftModel.from_pretrained(base, outputs["adapters"])
    merged = AutoModelForCausalLM.from_pretrained(outputs["merged"])
    for context, continuation in PAIRS:
        assert log_probability(adapted, context, continuation) == pytest.approx(
            log_probability(merged, context, continuation), rel=1e-5
        )
    assert log_probability(adapted, *PAIRS[0]) != pytest.approx(start, rel=1e-4)


@pytest.mark.filterwarnings("ignore")  # lm-eval's own, and those of what it imports
@pytest.mark.parametrize("kind", ["full", "merged", "adapters"])
def test_lm_eval_measures_the_log_probabilities_that_were_trained(
    kind: str, outputs: dict[str, Path]
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    base = outputs["base" if kind == "adapters" else kind]
    options: dict[str, Any] = {"peft": str(outputs[kind])} if kind == "adapters" else {}
    harness = HFLM(str(base), device="cpu", dtype="float32", batch_size=2, **options)
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(PAIRS)]
    measured = [value for value, _ in harness.loglikelihood(requests, disable_tqdm=True)]
    model = AutoModelForCausalLM.from_pretrained(
        outputs["merged" if kind == "adapters" else kind], dtype=torch.float32
    )
    expected = [log_probability(model, *pair) for pair in PAIRS]
    assert measured == pytest.approx(expected, abs=1e-4)
