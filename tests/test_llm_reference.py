"""llm.model.reference: which model it is, and that what is kept on disk can be relied on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _text import write_jsonl
from _tiny import PAD_ID, make_policy
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import llm.model.load
import llm.model.reference
from llm.data import embedded
from llm.data.encode import Encoded
from llm.flags.parse import parse
from llm.loss.evaluate import evaluate_objective, with_reference_logps
from llm.model.reference import KEYS, weights_digest
from llm.setup import Setup, prepare
from theory.cli import UserError
from theory.tasks import Task

pytestmark = [
    pytest.mark.usefixtures("temporary_datasets_cache"),
    # transformers 5.23 asks itself, through peft, for an attribute that it has deprecated.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]
LOG2 = 0.6931471805599453
Own = Callable[..., list[str]]


@pytest.fixture
def start(own: Own, tmp_path: Path) -> Callable[..., tuple[Setup, list[str]]]:
    """Prepare a DPO run on the tiny model; returns what it trains on and what was said."""

    def prepared(*flags: str) -> tuple[Setup, list[str]]:
        said: list[str] = []
        command = own("--algo", "dpo", "--kl_rows", "0", *flags)
        return prepare(parse(command), said.append), said

    return prepared


@pytest.fixture
def adapter(tmp_path: Path, own: Own) -> Path:
    """A directory with an adapter over the model of `own` that changes it visibly."""
    own()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["query_key_value"]))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def logps(encoded: Encoded) -> torch.Tensor:
    return torch.tensor([[row[key] for key in KEYS] for row in encoded.rows], dtype=torch.float64)


def live(model: Any, encoded: Encoded) -> torch.Tensor:
    """The log-probabilities of `model` on these rows, computed here and now."""
    rows = [{k: v for k, v in row.items() if k not in KEYS} for row in encoded.rows]
    filled = with_reference_logps(model, rows, batch_size=3, pad_token_id=PAD_ID)
    return torch.tensor([[row[key] for key in KEYS] for row in filled], dtype=torch.float64)


def assert_reference_is(setup: Setup, model: Any) -> None:
    for part in (setup.train, setup.held_out):
        encoded = part[Task.DPO]
        # Sums of about 10 float32 values near 4, in other batches: rounding.
        torch.testing.assert_close(logps(encoded), live(model, encoded), rtol=1e-6, atol=1e-6)


def base_model(tmp_path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def started_from_disk(said: list[str]) -> bool:
    """Whether every set of log-probabilities was read; False if every one was computed."""
    read = sum("log-probabilities are read from" in line for line in said)
    computed = sum("computing the reference's log-probabilities" in line for line in said)
    assert read + computed == 2
    assert read in (0, 2)
    return read == 2


def cached(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "out" / "reference").iterdir())


# --- the cache


def test_a_restart_reads_what_it_would_compute(start: Any, tmp_path: Path) -> None:
    first, said = start()
    assert not started_from_disk(said)
    second, said = start()
    assert started_from_disk(said)
    for part in ("train", "held_out"):
        rows = [getattr(setup, part)[Task.DPO].rows for setup in (first, second)]
        assert rows[0] == rows[1], "bit for bit"
    assert_reference_is(second, base_model(tmp_path))


def changed_weights(tmp_path: Path) -> list[str]:
    model = base_model(tmp_path)
    with torch.no_grad():
        model.get_output_embeddings().weight[3, 0] += 0.5
    model.save_pretrained(tmp_path / "model")
    return []


def changed_rows(tmp_path: Path) -> list[str]:
    corpus = embedded.generate_corpus(train_rows=40, eval_rows=10, seed=9)
    parts = {"dpo": corpus.dpo_train, "dpo_eval": corpus.dpo_eval}
    return [
        token
        for name, rows in parts.items()
        for token in (f"--{name}_dataset", write_jsonl(tmp_path / f"{name}_other.jsonl", rows))
    ]


CHANGES: dict[str, Callable[[Path], list[str]]] = {
    "weights": changed_weights,
    "data": changed_rows,
    "max_length": lambda _: ["--max_length", "14"],
    "dtype": lambda _: ["--dtype", "bfloat16"],
    "precision": lambda _: ["--bf16", "true"],
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_the_values_depend_on_makes_them_new(
    change: str, own: Own, tmp_path: Path
) -> None:
    # Not the fixture `start`: it saves the model anew at every call.
    command, said = own("--algo", "dpo", "--kl_rows", "0"), []
    before = prepare(parse(command), said.append)
    command += CHANGES[change](tmp_path)
    said.clear()
    after = prepare(parse(command), said.append)
    assert not started_from_disk(said)
    assert not torch.equal(logps(after.train[Task.DPO]), logps(before.train[Task.DPO]))
    if change in ("weights", "data", "max_length"):
        assert_reference_is(after, base_model(tmp_path))
    said.clear()
    prepare(parse(command), said.append)
    assert started_from_disk(said)


def test_runs_can_share_their_values(start: Any, tmp_path: Path) -> None:
    shared = ("--reference_cache", str(tmp_path / "shared"))
    assert not started_from_disk(start(*shared)[1])
    assert started_from_disk(start(*shared, "--output_dir", str(tmp_path / "other"))[1])
    assert not (tmp_path / "out" / "reference").exists()
    # Other options of the loss, another size of the batches: the same reference.
    flags = ("--beta", "0.5", "--seed", "3", "--per_device_eval_batch_size", "2")
    assert started_from_disk(start(*shared, *flags)[1])


def altered(path: Path) -> None:
    record = json.loads(path.read_text())
    record["logps"][0][0] += 1e-9
    path.write_text(json.dumps(record))


def cut_short(path: Path) -> None:
    path.write_text(path.read_text()[:-20])


def of_other_rows(path: Path) -> None:
    (other,) = (each for each in path.parent.iterdir() if each != path)
    shutil.copyfile(other, path)


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (altered, "is damaged (its checksum differs): not used"),
        (cut_short, "is damaged: not used"),
        (of_other_rows, "is stale (other rows): not used"),
        (lambda path: path.write_text("[]"), "is damaged: not used"),
    ],
    ids=["altered", "cut short", "stale", "other JSON"],
)
def test_a_file_that_is_not_right_is_named_and_made_anew(
    harm: Callable[[Path], Any], problem: str, start: Any, tmp_path: Path
) -> None:
    start()
    path = cached(tmp_path)[0]
    intact = path.read_bytes()
    harm(path)
    assert path.read_bytes() != intact
    setup, said = start()
    assert [line for line in said if line.startswith("reference cache")] == [
        f"reference cache {path} {problem}"
    ]
    assert_reference_is(setup, base_model(tmp_path))
    assert path.read_bytes() == intact


def test_a_reference_without_finite_values_is_refused(own: Own, tmp_path: Path) -> None:
    command = own("--algo", "dpo", "--kl_rows", "0")
    broken = make_policy()
    broken.get_output_embeddings().weight.data.fill_(torch.nan)
    broken.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="its log-probabilities are not finite; are its weights"):
        prepare(parse(command), lambda _: None)
    with pytest.raises(UserError, match=r"dpo train row 1: the reference's log-prob.* nan"):
        llm.model.reference._check_finite([[-1.0, -2.0], [-1.0, float("nan")]], "dpo train")
    assert not (tmp_path / "out" / "reference").exists()


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_rows_and_all_get_all_values(
    ranks: int, start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `accelerate` gathers is simulated: every rank contributes its part, in any order."""
    setup, _ = start()
    encoded = setup.train[Task.DPO]
    rows = [{k: v for k, v in row.items() if k not in KEYS} for row in encoded.rows]
    config, model = parse(["--use_cpu", "true"]), base_model(tmp_path)
    parts: dict[int, list[Any]] = {}

    def computed(rank: int) -> Any:
        def gather(mine: list[Any]) -> list[Any]:
            parts[rank] = mine
            return [pair for part in reversed(parts.values()) for pair in part]

        training = SimpleNamespace(
            **{"process_index": rank, "world_size": ranks, "fp16": False, "bf16": False},
            **{"device": torch.device("cpu"), "per_device_eval_batch_size": 4},
        )
        monkeypatch.setattr(llm.model.reference, "gather_object", gather)
        shared = replace(config, training=training)
        return llm.model.reference._compute(shared, model, rows, PAD_ID, True)

    values = [computed(rank) for rank in range(ranks)]
    assert max(map(len, parts.values())) - min(map(len, parts.values())) <= 1
    actual = torch.tensor(values[-1], dtype=torch.float64)
    torch.testing.assert_close(actual, logps(encoded), rtol=1e-6, atol=1e-6)


# --- the fingerprint of the weights


def test_the_digest_sees_every_bit_and_not_the_place(tmp_path: Path) -> None:
    make_policy().save_pretrained(tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "copy")
    model = base_model(tmp_path)
    digest = weights_digest(model)
    assert weights_digest(AutoModelForCausalLM.from_pretrained(tmp_path / "copy")) == digest
    assert weights_digest(base_model(tmp_path).bfloat16()) != digest
    stretched = base_model(tmp_path)
    stretched.config.rope_parameters["rope_theta"] = 500.0  # the same weights, used otherwise
    assert weights_digest(stretched) != digest
    weight = next(model.parameters()).data.view(-1)
    weight[0] = torch.nextafter(weight[0], torch.tensor(torch.inf))  # the last bit
    assert weights_digest(model) != digest


def test_the_digest_of_an_adapted_model_covers_the_scale_of_its_adapter(tmp_path: Path) -> None:
    def adapted(alpha: int, seed: int = 0) -> Any:
        base = make_policy()
        torch.manual_seed(seed)
        config = LoraConfig(r=2, lora_alpha=alpha, target_modules=["query_key_value"])
        return get_peft_model(base, config)

    assert weights_digest(adapted(4)) == weights_digest(adapted(4))
    assert weights_digest(adapted(4)) != weights_digest(adapted(8))
    assert weights_digest(adapted(4)) != weights_digest(adapted(4, seed=1))
    under = [weights_digest(adapted(4, seed=seed), base_only=True) for seed in (0, 1)]
    assert under[0] == under[1]


# --- which model it is


@pytest.mark.parametrize("reference", ["initial", "base"])
def test_an_adapter_as_policy_has_the_reference_that_is_named(
    reference: str, adapter: Path, start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = count_loads(monkeypatch)
    setup, _ = start("--model_name_or_path", str(adapter), "--reference", reference)
    policy = setup.new_policy()
    assert len(loaded) == 1, "one model in memory, the policy itself"
    assert isinstance(policy, PeftModel)
    adapted = PeftModel.from_pretrained(base_model(tmp_path), str(adapter))
    other = base_model(tmp_path)
    expected, different = (adapted, other) if reference == "initial" else (other, adapted)
    assert_reference_is(setup, expected)
    held_out = setup.held_out[Task.DPO]
    assert (logps(held_out) - live(different, held_out)).abs().max() > 0.1

    objective = setup.objectives[Task.DPO]
    values = evaluate_objective(policy, objective, held_out.rows, batch_size=3, pad_token_id=PAD_ID)
    starts_at_log2 = values["loss"] == pytest.approx(LOG2, abs=1e-6)
    assert starts_at_log2 == (reference == "initial")
    if reference == "initial":
        assert values["reward_margin"] == pytest.approx(0.0, abs=1e-6)
    trained = {name for name, each in policy.named_parameters() if each.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)


def test_an_earlier_run_with_adapters_can_be_the_reference(
    adapter: Path, start: Any, tmp_path: Path
) -> None:
    setup, _ = start("--reference", str(adapter))
    assert_reference_is(setup, PeftModel.from_pretrained(base_model(tmp_path), str(adapter)))
    assert not isinstance(setup.new_policy(), PeftModel)


def test_a_fresh_adapter_lies_over_its_reference(start: Any, tmp_path: Path) -> None:
    lora = ("--use_peft", "true", "--lora_target_modules", "query_key_value")
    setup, _ = start(*lora, "--reference", "base")
    assert_reference_is(setup, base_model(tmp_path))
    assert_reference_is(setup, setup.new_policy())


def test_a_base_without_an_adapter_is_refused(start: Any) -> None:
    with pytest.raises(UserError, match="--reference base is the model under a LoRA adapter"):
        start("--reference", "base")


# --- copies of the policy


def count_loads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    loaded: list[Any] = []
    load = llm.model.load.AutoModelForCausalLM.from_pretrained

    def recorded(name: Any, **options: Any) -> Any:
        loaded.append(name)
        return load(name, **options)

    monkeypatch.setattr(llm.model.load.AutoModelForCausalLM, "from_pretrained", recorded)
    return loaded


def test_every_copy_of_the_policy_is_fresh_and_the_first_is_not_loaded_twice(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = count_loads(monkeypatch)
    setup, _ = start()
    first = setup.new_policy()
    assert len(loaded) == 1
    untrained = {name: value.clone() for name, value in first.state_dict().items()}
    for parameter in first.parameters():
        parameter.data.zero_()
    for _ in range(2):
        torch.testing.assert_close(setup.new_policy().state_dict(), untrained, rtol=0, atol=0)
    assert len(loaded) == 3
