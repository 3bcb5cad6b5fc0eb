"""Completions of the reference, y ~ ref, for the KL to it (`llm.loss.kl`): drawn once and kept.

Responses are cut at `max_new_tokens`: it is the KL of the responses up to there, a lower bound of
the whole (data processing). A response that ends contains its end-of-sequence token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from llm.data.encode import fingerprint_rows
from llm.flags.arguments import RunConfig
from llm.loss.evaluate import device_of, evaluating, row_length
from llm.loss.kl import ReferenceSamples, score
from llm.loss.objectives import Row
from llm.model.isolation import rotary_limit
from llm.model.reference import mixed_precision, numerics
from theory.records import digest, read_json, write_json

FILE = "kl_samples.json"
MOST_NEW_TOKENS = 128


def sample_reference(
    reference: Any,
    rows: Sequence[Row],
    count: int,
    *,
    eos_token_id: int,
    pad_token_id: int,
    batch_size: int,
    seed: int,
    packing: bool = True,
    max_new_tokens: int | None = None,
) -> ReferenceSamples:
    """Draw one completion for each of `count` prompts of `rows`, in turn, from the reference.

    Temperature 1 and the whole distribution, whatever generation settings the model comes with.
    The global random state is left as it was.

    Args:
        reference: a model of transformers (or peft) with `generate`.
        rows: preference rows, best held-out ones; their prompts repeat if there are fewer.
        max_new_tokens: default the longest response among the rows, at most 128.
    """
    longest = max(len(row[key]) for row in rows for key in ("chosen_ids", "rejected_ids"))
    limit = max_new_tokens or min(longest, MOST_NEW_TOKENS)
    positions = getattr(reference.config.get_text_config(), "max_position_embeddings", None)
    prompts = [rows[i % len(rows)]["prompt_ids"] for i in range(count)]
    factors = rotary_limit(reference)
    if factors is not None and max(map(row_length, rows)) <= factors:
        positions = factors  # no sample leaves the range in which the rows were examined
    if positions is not None:
        limit = max(1, min(limit, positions - max(map(len, prompts))))
    samples: list[Row] = []
    devices = [device_of(reference)] if device_of(reference).type == "cuda" else []
    with evaluating(reference), torch.random.fork_rng(devices), _plain_generation(reference):
        torch.manual_seed(seed)
        for start in range(0, count, batch_size):
            batch = prompts[start : start + batch_size]
            completions = _complete(reference, batch, limit, eos_token_id, pad_token_id)
            samples += [
                {"prompt_ids": list(prompt), "completion_ids": completion}
                for prompt, completion in zip(batch, completions, strict=True)
            ]
    logps = score(reference, samples, batch_size, pad_token_id, packing).tolist()
    scored = (row | {"ref_logps": value} for row, value in zip(samples, logps, strict=True))
    return ReferenceSamples(tuple(scored), packing)


def samples_of_run(
    config: RunConfig,
    reference: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    say: Callable[[str], None],
    *,
    packing: bool = True,
) -> ReferenceSamples | None:
    """Samples of the `reference` of `config` on the prompts of `rows`; None with `--kl_rows 0`.

    An earlier start of the same run has left them in the output directory: the same rows with the
    same log-probabilities of the reference, the same options, precision, code and libraries.
    """
    training = config.training
    if training.kl_rows == 0:
        return None
    options: dict[str, Any] = {
        "eos_token_id": int(tokenizer.eos_token_id),
        "pad_token_id": int(tokenizer.pad_token_id),
        "batch_size": training.per_device_eval_batch_size,
        "seed": training.seed,
        "packing": packing,
    }
    key = _key(rows, options | {"count": training.kl_rows} | numerics(config))
    path = Path(config.output_dir) / FILE
    samples = _read(path, key, packing)
    if samples is None:
        say(f"drawing {training.kl_rows} responses from the reference, for the KL to it")
        with mixed_precision(training):
            reference.to(device=training.device)
            samples = sample_reference(reference, rows, training.kl_rows, **options)
        if training.process_index == 0:
            write_json(path, {"key": key, "rows": list(samples.rows)})
    return samples


def _read(path: Path, key: str, packing: bool) -> ReferenceSamples | None:
    try:
        saved = read_json(path)
        return ReferenceSamples(tuple(saved["rows"]), packing) if saved["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _key(rows: Sequence[Row], options: dict[str, Any]) -> str:
    logps = [[row["ref_chosen_logps"], row["ref_rejected_logps"]] for row in rows]
    return digest([fingerprint_rows(rows), logps, options])


def _complete(
    model: Any, prompts: Sequence[Sequence[int]], limit: int, eos_token_id: int, pad_token_id: int
) -> list[list[int]]:
    """One sample for each prompt, up to and with its end; prompts are padded on the left."""
    width = max(map(len, prompts))
    input_ids = torch.full((len(prompts), width), pad_token_id)
    mask = torch.zeros_like(input_ids)
    for i, prompt in enumerate(prompts):
        input_ids[i, width - len(prompt) :] = torch.tensor(list(prompt))
        mask[i, width - len(prompt) :] = 1
    output = model.generate(
        input_ids=input_ids.to(device_of(model)),
        attention_mask=mask.to(device_of(model)),
        do_sample=True,
        top_k=0,
        max_new_tokens=limit,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )
    completions = output[:, width:].tolist()
    return [_up_to(completion, eos_token_id) for completion in completions]


def _up_to(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


@contextmanager
def _plain_generation(model: Any) -> Iterator[None]:
    """Without the temperature, penalties and cuts that a model brings for its users."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
