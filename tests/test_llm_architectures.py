"""Every causal architecture of transformers: packed, padded or refused, and never silently wrong.

    python tests/test_llm_architectures.py      # writes docs/architectures.md, in about 2 minutes
    pytest -m architectures                     # all of them; by default one of each kind

Each is built small, from its configuration, with layers of every kind that it has, windows of 8
tokens and weights so large that what a token sees matters. Values and gradients of a batch, in the
layout that `llm.model.isolation` chooses, are held against one row at a time in plain transformers.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from _architectures import VOCABULARY, WINDOW, small_model
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llm.loss.collate import collate_preference, collate_sft
from llm.loss.forward import response_logps
from llm.loss.packing import pack_preference, pack_sft
from llm.model.isolation import layout_problem
from theory.cli import UserError

TABLE = Path(__file__).parents[1] / "docs" / "architectures.md"
HEAD = """# What becomes of every causal architecture

Written by `python tests/test_llm_architectures.py`, with transformers {version}.

Every architecture that transformers loads as a causal language model, built small from its
configuration, with windows of {window} tokens and rows of 6 to 40. *Packed* and *padded* batches
have the values and gradients of one row at a time in plain transformers, in float32 and in bfloat16
(`pytest -m architectures` holds them to it). What packing would change is padded; what padding
would change too is refused in one line, as is what cannot be evaluated. The check at the start of
a run ([llm/model/isolation.py](../llm/model/isolation.py)) looks at the model and the rows at hand
and needs no name: an architecture that is not listed gets the same treatment, and one that is
padded here because of its window is packed where no row is longer than that.

| architecture | SFT | DPO | why |
|---|---|---|---|
"""
ONE_OF_EACH = [
    *("llama", "gpt2", "opt", "mistral", "gemma3_text", "mixtral", "granite", "phi3"),
    *("phimoe", "qwen2_moe", "llama4_text", "doge", "gemma2", "gpt_oss", "stablelm"),
    *("bloom", "mamba2", "lfm2", "falcon_h1", "rwkv", "falcon", "roberta", "xlnet", "xlstm"),
]
KINDS = {"SFT": (pack_sft, collate_sft), "DPO": (pack_preference, collate_preference)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Sums of 20 log-probabilities of order 5 in another order; of their gradients, relative. bfloat16
# has 8 bits in every product; a window or a state that is lost changes both by more than 1.
VALUES = {"float32": 1e-4, "bfloat16": 0.5}
GRADIENTS = {"float32": 1e-4, "bfloat16": 0.05}

Outcome = dict[tuple[str, str], tuple[str, str]]
"""(type, objective) -> packed, padded or refused, and why."""


def rows(kind: str) -> list[dict[str, Any]]:
    rng = np.random.default_rng(1)
    made = []
    for lengths in ((2, 4, 3), (5, 12, 17), (14, 26, 20)):
        prompt, chosen, rejected = (rng.integers(3, VOCABULARY, n).tolist() for n in lengths)
        responses = {"completion_ids": chosen}
        if kind == "DPO":
            responses = {"chosen_ids": chosen, "rejected_ids": rejected}
        made.append({"prompt_ids": prompt} | responses)
    return made


def plain(model: Any, kind: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """log pi of every response and a gradient, one row at a time; transformers alone."""
    sides = ["completion_ids"] if kind == "SFT" else ["chosen_ids", "rejected_ids"]
    pairs = [(row["prompt_ids"], row[side]) for side in sides for row in rows(kind)]
    sums = []
    for prompt, response in pairs:
        logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0]
        logps = logits.float().log_softmax(-1)[len(prompt) - 1 : -1]
        sums.append(logps.gather(1, torch.tensor(response)[:, None]).sum())
    return differentiated(model, torch.stack(sums))


def differentiated(model: Any, sums: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    (sums * torch.linspace(1.0, 2.0, len(sums))).sum().backward()
    named = model.named_parameters()
    return sums.detach(), {n: p.grad.float() for n, p in named if p.grad is not None}


def outcome(architecture: str) -> Outcome:
    """What becomes of it; asserts that what is accepted is right."""
    original = small_model(architecture)
    result = {}
    for dtype, kind in ((dtype, kind) for dtype in DTYPES for kind in KINDS):
        model = copy.deepcopy(original).to(DTYPES[dtype])
        try:
            why = layout_problem(model, "it", rows(kind), 0, packing=True)
        except UserError as error:
            result[dtype, kind] = ("refused", str(error).removeprefix("it ").split(", by ")[0])
            continue
        pack, pad = KINDS[kind]
        batch = pack(rows(kind)) if why is None else pad(rows(kind), 0)
        result[dtype, kind] = ("packed", "") if why is None else ("padded", why.split(", by ")[0])
        assert_right(model.train(), batch, kind, dtype)
    return result


def assert_right(model: Any, batch: dict[str, Any], kind: str, dtype: str) -> None:
    expected, expected_gradients = plain(model, kind)
    actual, gradients = differentiated(model, response_logps(model, batch).sums())
    difference = float((actual - expected).abs().max())
    assert difference <= VALUES[dtype], f"{dtype} {kind}: values differ by {difference}"
    names = gradients.keys() | expected_gradients.keys()  # an expert without tokens may have none
    zero = torch.zeros(())
    pairs = ((gradients.get(n, zero), expected_gradients.get(n, zero)) for n in names)
    off = sum(float((mine - theirs).square().sum()) for mine, theirs in pairs)
    size = sum(float(g.square().sum()) for g in expected_gradients.values())
    assert off <= GRADIENTS[dtype] ** 2 * size, f"{dtype} {kind}: gradients, {(off / size) ** 0.5}"


def line(architecture: str) -> str:
    """Its line of the table."""
    try:
        found = outcome(architecture)
    except AssertionError:
        raise
    except Exception:
        return f"| {architecture} | | | no small one can be built from its configuration alone |"
    cells = []
    for kind in KINDS:
        exact, rounded = (found[dtype, kind][0] for dtype in DTYPES)
        cells.append(exact if exact == rounded else f"{exact}; bfloat16 {rounded}")
    whys = dict.fromkeys(why for _, why in found.values() if why)
    return f"| {architecture} | {' | '.join(cells)} | {'; '.join(whys)} |"


def written() -> dict[str, str]:
    """The lines of the table by architecture."""
    lines = [each for each in TABLE.read_text(encoding="utf-8").splitlines() if each[:2] == "| "]
    return {each.split(" | ")[0][2:]: each for each in lines[1:]}


@pytest.mark.filterwarnings("ignore")  # those of the architectures' own code
@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(name, marks=[] if name in ONE_OF_EACH else pytest.mark.architectures)
        for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    ],
)
def test_it_is_right_or_refused_and_the_table_says_which(architecture: str) -> None:
    now = line(architecture)
    if f"transformers {transformers.__version__}," in TABLE.read_text(encoding="utf-8"):
        assert now == written()[architecture], "python tests/test_llm_architectures.py"


def test_the_table_lists_every_architecture() -> None:
    if f"transformers {transformers.__version__}," in TABLE.read_text(encoding="utf-8"):
        assert list(written()) == sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def write_table() -> None:
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lines = [line(name) for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)]
    head = HEAD.format(version=transformers.__version__, window=WINDOW)
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(head + "".join(f"{each}\n" for each in lines), encoding="utf-8")


if __name__ == "__main__":
    write_table()
