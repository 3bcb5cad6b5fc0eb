"""How many operations a step needs at least, and how near a measured time comes to that.

Per example with P prompt, C chosen (or completion) and R rejected tokens, N_b backbone and N_h head
matrix weights, of the backbone's N_m in the last layer's MLP, L layers of width d, forward and
backward (3 forwards; 2 with LoRA, whose frozen weights need no gradients):

    S      = 3 [2 N_b (P+C)   - 2 N_m P     + 2 N_h C     + 2 L d (P+C)^2]
    D_lean = 3 [2 N_b (P+C+R) - 2 N_m (P+1) + 2 N_h (C+R) + 2 L d ((P+C)^2 + (P+R)^2 - P^2)]

The last MLP is needed at the tokens that predict a response token: of the prompt at its end, of a
response at all but its end. Goodput is S or D_lean over time and peak speed: no credit for padding,
repeated prompts, logits of tokens that nothing is trained on, recomputation or reference passes.
For comparison, the least that a step with padding, a live reference and all logits does (times its
padding, and checkpointing):

    D_naive = 4 [2 (N_b + N_h)(2P+C+R) + 2 L d ((P+C)^2 + (P+R)^2)]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM

from llm.benchmark.shapes import Shape
from llm.loss.forward import last_layer
from llm.loss.objectives import Row


@dataclass(frozen=True)
class Work:
    """Floating-point operations per example of one shape."""

    backbone: int
    head: int
    layers: int
    width: int
    """Heads x head size."""
    last_mlp: int = 0
    """Part of the backbone."""
    passes: int = 3
    """Forward passes that a forward and a backward cost."""

    @classmethod
    def of(cls, shape: Shape) -> Work:
        """Counts the matrix weights of the model, without allocating it."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shape.config())
        linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
        head, last_mlp = model.get_output_embeddings(), set(last_layer(model).mlp.modules())
        return cls(
            backbone=sum(m.weight.numel() for m in linear if m is not head),
            head=head.weight.numel(),
            layers=shape.layers,
            width=shape.hidden_size,
            last_mlp=sum(m.weight.numel() for m in linear if m in last_mlp),
            passes=2 if shape.lora_rank else 3,
        )

    def lean(self, row: Row) -> float:
        """S or D_lean of a row."""
        prompt, *responses = (len(ids) for ids in row.values())
        squares = sum((prompt + n) ** 2 for n in responses) - prompt**2 * (len(responses) - 1)
        idle = 2.0 * self.last_mlp * (prompt - 1 + len(responses))
        whole = self._forward(prompt + sum(responses), sum(responses), squares)
        return self.passes * (whole - idle)

    def naive(self, row: Row) -> float:
        """The same row without padding, with all logits, repeated prompts and a live reference."""
        prompt, *responses = (len(ids) for ids in row.values())
        tokens = sum(prompt + n for n in responses)
        squares = sum((prompt + n) ** 2 for n in responses)
        reference = len(responses) - 1
        return (self.passes + reference) * self._forward(tokens, tokens, squares)

    def _forward(self, tokens: int, scored: int, squares: int) -> float:
        attention = 2.0 * self.layers * self.width * squares  # causal: half of the square
        return 2.0 * self.backbone * tokens + 2.0 * self.head * scored + attention
