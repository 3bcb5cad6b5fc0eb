"""The offline default: a generated corpus with a real conflict, a small tokenizer, a tiny model.

Every prompt asks how to do a chore. It has two good answers: a *direct* one that names the tool and
a *cautious* one that sends the reader to an expert. Demonstrations are direct with probability 0.9.
Preferences favour the cautious answer with probability p = 0.1 + 0.8 * conflict: with conflict 0
they agree with the demonstrations, with conflict 1 they ask for the opposite. Both orders occur, so
that at response level f_DPO* is the entropy of p, reached at a finite margin (the BernPair of
`theory.problems`).

The base policy is trained on a neutral corpus first (both answers equally often, tools at random):
it speaks the language, prefers neither answer and has yet to learn which tool a chore takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast, set_seed

CHORES = {
    "clean": "cloth",
    "open": "key",
    "fix": "wrench",
    "paint": "brush",
    "cut": "saw",
    "move": "cart",
    "wash": "soap",
    "measure": "ruler",
    "polish": "wax",
    "dry": "towel",
    "weigh": "scale",
    "tie": "rope",
}
THINGS = [
    "lamp",
    "table",
    "chair",
    "door",
    "window",
    "shelf",
    "clock",
    "mirror",
    "basket",
    "bottle",
    "carpet",
    "curtain",
    "drawer",
    "fence",
    "garden",
    "kettle",
    "ladder",
    "oven",
    "pillow",
    "roof",
    "stove",
    "tent",
    "vase",
    "wagon",
]
QUESTIONS = (
    "how do i {chore} the {thing} ?",
    "please tell me how to {chore} the {thing} .",
    "can you help me {chore} the {thing} ?",
)
DIRECT = " you {chore} the {thing} with a {tool} ."
CAUTIOUS = " ask an expert before you {chore} the {thing} ."
DEMONSTRATED_DIRECT = 0.9
HELD_OUT_SHARE = 0.2
SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>")
# Enough for the base policy to answer every question in both ways.
BASE_STEPS, BASE_LEARNING_RATE, BASE_BATCH_SIZE = 300, 3e-3, 32

SFTRow = dict[str, str]
PreferenceRow = dict[str, str]


@dataclass(frozen=True)
class Corpus:
    """Generated rows. Held-out rows ask about (chore, thing) pairs that training never shows."""

    sft_train: list[SFTRow]
    sft_eval: list[SFTRow]
    dpo_train: list[PreferenceRow]
    dpo_eval: list[PreferenceRow]
    neutral: list[SFTRow]
    """Both answers equally often, tools at random: what the base policy is trained on."""


def cautious_preferred(conflict: float) -> float:
    """p, the probability that the cautious answer is preferred."""
    if not 0.0 <= conflict <= 1.0:
        raise ValueError(f"conflict is {conflict}; it must lie in [0, 1]")
    return 0.1 + 0.8 * conflict


def generate_corpus(
    conflict: float = 1.0, *, train_rows: int = 2000, eval_rows: int = 300, seed: int = 0
) -> Corpus:
    """The corpus for a degree of conflict in [0, 1]; the same seed gives the same rows."""
    rng = np.random.default_rng([seed, 20241015])
    pairs = list(product(CHORES, THINGS))
    rng.shuffle(pairs)
    cut = int(len(pairs) * HELD_OUT_SHARE)
    seen, held_out = pairs[cut:], pairs[:cut]
    prefer_direct = 1.0 - cautious_preferred(conflict)
    return Corpus(
        sft_train=_demonstrations(rng, seen, train_rows, DEMONSTRATED_DIRECT),
        sft_eval=_demonstrations(rng, held_out, eval_rows, DEMONSTRATED_DIRECT),
        dpo_train=_preferences(rng, seen, train_rows, prefer_direct),
        dpo_eval=_preferences(rng, held_out, eval_rows, prefer_direct),
        neutral=_demonstrations(rng, seen, train_rows, 0.5, random_tools=True),
    )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the vocabulary of the corpus."""
    texts = [*QUESTIONS, DIRECT, CAUTIOUS]
    words = {word for text in texts for word in text.split() if not word.startswith("{")}
    words |= set(CHORES) | set(CHORES.values()) | set(THINGS)
    vocabulary = [*SPECIAL_TOKENS, *sorted(words)]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=64,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> GPTNeoXForCausalLM:
    """An untrained GPT-NeoX (Pythia's architecture) of about 0.1 M parameters, float32."""
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=64,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    set_seed(seed)
    return GPTNeoXForCausalLM(config)


def _questions(
    rng: np.random.Generator,
    pairs: list[tuple[str, str]],
    count: int,
    random_tools: bool = False,
) -> list[tuple[str, str, str]]:
    """(prompt, direct answer, cautious answer) for `count` random chores."""
    rows = []
    tools = list(CHORES.values())
    for pair, question in zip(
        rng.integers(len(pairs), size=count),
        rng.integers(len(QUESTIONS), size=count),
        strict=True,
    ):
        chore, thing = pairs[pair]
        tool = tools[rng.integers(len(tools))] if random_tools else CHORES[chore]
        words = {"chore": chore, "thing": thing, "tool": tool}
        texts = (QUESTIONS[question], DIRECT, CAUTIOUS)
        prompt, direct, cautious = (text.format(**words) for text in texts)
        rows.append((prompt, direct, cautious))
    return rows


def _demonstrations(
    rng: np.random.Generator,
    pairs: list[tuple[str, str]],
    count: int,
    direct_share: float,
    random_tools: bool = False,
) -> list[SFTRow]:
    direct_wins = rng.random(count) < direct_share
    return [
        {"prompt": prompt, "completion": direct if wins else cautious}
        for (prompt, direct, cautious), wins in zip(
            _questions(rng, pairs, count, random_tools), direct_wins, strict=True
        )
    ]


def _preferences(
    rng: np.random.Generator, pairs: list[tuple[str, str]], count: int, direct_share: float
) -> list[PreferenceRow]:
    direct_wins = rng.random(count) < direct_share
    rows = []
    for (prompt, direct, cautious), wins in zip(
        _questions(rng, pairs, count), direct_wins, strict=True
    ):
        chosen, rejected = (direct, cautious) if wins else (cautious, direct)
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows
