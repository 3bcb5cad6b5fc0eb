"""The reference policy of DPO: which model it is, and its log-probabilities, computed once.

They are kept on disk under a fingerprint of everything that determines them: the weights and
configuration of the reference, the token ids (so the data, the tokenizer and the truncation), how
the model is loaded, packing and precision, and the version of this code and of the libraries. A
file is used only if its whole fingerprint and its checksum are right; otherwise the values are
computed again, and a line says so.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftModel

from llm.data.encode import Encoded, fingerprint
from llm.data.rows import with_columns
from llm.flags.arguments import RunConfig
from llm.loss.evaluate import evaluate_objective, with_reference_logps
from llm.loss.objectives import LanguageObjective, Row
from llm.model.load import load_adapted, load_reference
from llm.train.free import REFERENCE, counting, flat
from llm.train.identity import configurations
from theory.cli import UserError
from theory.records import digest, digest_of_code, read_json, write_json

FOLDER = "reference"
"""Of the cache, in the output directory, unless --reference_cache names another one."""
KEYS = ("ref_chosen_logps", "ref_rejected_logps")
LOG2_TOLERANCE = 1e-3
"""At the reference itself the DPO loss is log 2; bfloat16 in other batch shapes differs by less."""

Say = Callable[[str], None]
Logps = list[list[float]]
"""[log ref(y_w|x), log ref(y_l|x)] of every pair, in nats."""


# ------------------------------------------------------------------------------- which model it is


def check_reference(config: RunConfig, policy: Any) -> None:
    """Refuse `--reference base` where no adapter will lie over a base."""
    adapted = config.model.use_peft or isinstance(policy, PeftModel)
    if config.model.reference == "base" and not adapted:
        raise UserError(
            "--reference base is the model under a LoRA adapter: give --use_peft true, or an "
            "adapter as --model_name_or_path"
        )


@contextmanager
def reference_model(config: RunConfig, policy: Any) -> Iterator[Any]:
    """The reference as a model to evaluate. A second one is loaded only for another name.

    `policy` is the initial policy, before fresh adapters are put around it.
    """
    if config.model.reference == "initial":
        yield policy
    elif config.model.reference == "base":
        if isinstance(policy, PeftModel) and _trains_biases(policy):
            yield load_adapted(config.model)[0]
        elif isinstance(policy, PeftModel):
            with policy.disable_adapter():
                yield policy
        else:
            yield policy
    else:
        reference = load_reference(config.model)
        sizes = {each.config.get_text_config().vocab_size for each in (reference, policy)}
        if len(sizes) > 1:
            raise UserError(
                f"--reference {config.model.reference} has another vocabulary than the policy"
            )
        yield reference


def _trains_biases(policy: PeftModel) -> bool:
    """Whether biases of the base itself were trained: these stay when the adapter is off."""
    return any(getattr(c, "bias", "none") != "none" for c in policy.peft_config.values())


def starts_at_reference(config: RunConfig, policy: Any) -> bool:
    """Whether the policy is its own reference before the first step."""
    fresh = not isinstance(policy, PeftModel)
    return config.model.reference == "initial" or (config.model.reference == "base" and fresh)


def mixed_precision(training: Any) -> torch.autocast:
    """The mixed precision of the training: a reference in another one is another model."""
    return torch.autocast(
        training.device.type,
        dtype=torch.float16 if training.fp16 else torch.bfloat16,
        enabled=training.fp16 or training.bf16,
    )


# --------------------------------------------------------------------------- its log-probabilities


def add_reference_logps(
    config: RunConfig,
    reference: Any,
    pad_token_id: int,
    parts: Sequence[Encoded],
    say: Say,
    *,
    packing: bool = True,
) -> list[Encoded]:
    """The preference sets with the reference's log-probabilities in their rows."""
    folder = Path(config.training.reference_cache or Path(config.output_dir) / FOLDER)
    common = {
        "reference": weights_digest(reference, base_only=config.model.reference == "base"),
        **numerics(config),
        "packing": str(packing),
    }
    filled = []
    for part in parts:
        store = LogpStore(folder, part.name, common | {"rows": fingerprint(part)}, say)
        logps = _from_first_rank(config, store.read)
        if logps is None:
            say(
                f"{part.name}: computing the reference's log-probabilities "
                f"({config.model.reference})"
            )
            logps = _compute(config, reference, part.rows, pad_token_id, packing)
            _check_finite(logps, part.name)
            if config.training.process_index == 0:
                store.write(logps)
        columns = dict(zip(KEYS, zip(*logps, strict=True), strict=True))
        filled.append(replace(part, rows=with_columns(part.rows, columns)))
    return filled


def _compute(
    config: RunConfig, reference: Any, rows: Sequence[Row], pad_token_id: int, packing: bool
) -> Logps:
    """Every rank takes its share of the rows; all ranks get all values."""
    training = config.training
    rank, world = training.process_index, training.world_size
    reference.to(device=training.device)
    with mixed_precision(training):
        mine = with_reference_logps(
            reference,
            rows[rank::world],
            batch_size=training.per_device_eval_batch_size,
            pad_token_id=pad_token_id,
            packing=packing,
        )
    indices = range(rank, len(rows), world)
    numbered = [(i, [row[key] for key in KEYS]) for i, row in zip(indices, mine, strict=True)]
    shared = gather_object(numbered) if world > 1 else numbered
    return [pair for _, pair in sorted(shared)]


def _from_first_rank(config: RunConfig, read: Callable[[], Logps | None]) -> Logps | None:
    """What the first rank finds on its disk: all ranks compute, or none does."""
    found = [read() if config.training.process_index == 0 else None]
    if config.training.world_size > 1:
        broadcast_object_list(found)
    return found[0]


def _check_finite(logps: Logps, name: str) -> None:
    for i, pair in enumerate(logps):
        if not all(map(math.isfinite, pair)):
            raise UserError(
                f"{name} row {i}: the reference's log-probabilities are {pair}; are its weights "
                "damaged, or its precision too low?"
            )


# ----------------------------------------------------------------------------------------- on disk


@dataclass(frozen=True)
class LogpStore:
    """The log-probabilities of one set of rows in one file, named by the fingerprint `key`."""

    folder: Path
    name: str
    key: dict[str, str]
    say: Say

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name.replace(' ', '-')}-{digest(self.key)[:16]}.json"

    def read(self) -> Logps | None:
        """The values; None if there are none, or none to rely on (which is said)."""
        if not self.path.exists():
            return None
        try:
            record = read_json(self.path)
            logps = [list(map(float, pair)) for pair in record["logps"]]
            problem = self._problem(record["key"], record["checksum"], logps)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            problem = "is damaged"
        if problem is not None:
            self.say(f"reference cache {self.path} {problem}: not used")
            return None
        self.say(f"{self.name}: the reference's log-probabilities are read from {self.path}")
        return logps

    def write(self, logps: Logps) -> None:
        write_json(self.path, {"key": self.key, "checksum": _checksum(logps), "logps": logps})

    def _problem(self, key: dict[str, str], checksum: str, logps: Logps) -> str | None:
        names = self.key.keys() | key.keys()
        differing = sorted(name for name in names if key.get(name) != self.key.get(name))
        if differing:
            return f"is stale (other {', '.join(differing)})"
        return None if checksum == _checksum(logps) else "is damaged (its checksum differs)"


def _checksum(logps: Logps) -> str:
    return hashlib.sha256(np.asarray(logps, dtype="<f8").tobytes()).hexdigest()


def weights_digest(model: Any, *, base_only: bool = False) -> str:
    """sha256 over the configuration and every byte of the weights (about 2 GB a second).

    `base_only` leaves out LoRA adapters, which are switched off under `--reference base`.
    """
    settings = configurations(model, base_only=base_only)
    weights = hashlib.sha256(json.dumps(flat(settings)).encode())
    for name, value in model.state_dict().items():
        if base_only and "lora_" in name:
            continue
        tensor = value.detach().cpu().contiguous()
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        weights.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return weights.hexdigest()


def numerics(config: RunConfig) -> dict[str, str]:
    """What the same weights and tokens still need to give the same log-probabilities."""
    training = config.training
    mixed = "float16" if training.fp16 else "bfloat16" if training.bf16 else "no"
    return {
        **counting(config.model, free=REFERENCE),
        "precision": f"{mixed} autocast on {training.device.type}, tf32 {training.tf32}",
        "code": _code_digest(),
        "libraries": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }


@cache
def _code_digest() -> str:
    """Of all that turns tokens and weights into log-probabilities."""
    return digest_of_code("llm.loss", "llm.model")


# -------------------------------------------------------------------------------- the first values


def check_start(
    config: RunConfig, policy: Any, objective: LanguageObjective, rows: Sequence[Row], pad: int
) -> None:
    """At its own reference the policy has rewards of 0 and, for `sigmoid`, a loss of log 2."""
    size = config.training.per_device_eval_batch_size
    policy.to(device=config.training.device)
    with mixed_precision(config.training):
        start = evaluate_objective(
            policy, objective, rows[: 4 * size], batch_size=size, pad_token_id=pad
        )
    if abs(start["reward_margin"]) > LOG2_TOLERANCE:
        raise UserError(
            f"the policy starts with a mean reward margin of {start['reward_margin']:.2e} against "
            "itself as the reference: is something in the model random in evaluation mode?"
        )
    if config.training.loss_type == "sigmoid" and abs(start["loss"] - np.log(2)) > LOG2_TOLERANCE:
        raise UserError(f"the DPO loss starts at {start['loss']:.4f}, not at log 2 = 0.6931")
