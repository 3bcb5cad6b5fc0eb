"""What all figures share.

Colours are Okabe and Ito's (distinct under every common colour blindness); an algorithm has the
same colour, marker and label in every figure, and what is no algorithm of the paper has others.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import cycle
from typing import Any, NamedTuple

from theory.schedulers import REGISTRY


class Look(NamedTuple):
    """How a line is drawn."""

    colour: str
    marker: str
    label: str


COLOURS = {
    "dpo_then_sft": "#D55E00",
    "sft_then_dpo": "#E69F00",
    "mix": "#0072B2",
    "alright": "#009E73",
    "maxright": "#CC79A7",
}
OTHER_COLOURS = {
    "black": "#000000",
    "indigo": "#332288",
    "wine": "#882255",
    "cyan": "#88CCEE",
    "lilac": "#9A8FE0",
}
"""For what is no algorithm of the paper: apart from each other and from `COLOURS` (15 in CIELAB's
distance, or more) with normal vision and under the three colour blindnesses."""
MARKERS = {"dpo_then_sft": "v", "sft_then_dpo": "^", "mix": "s", "alright": "o", "maxright": "D"}
LABELS = {
    "dpo_then_sft": "DPO then SFT",
    "sft_then_dpo": "SFT then DPO",
    "mix": "Mix",
    "alright": "ALRIGHT",
    "maxright": "MAXRIGHT",
}
OTHER_ALGORITHMS = {
    "alternate": Look(OTHER_COLOURS["indigo"], "o", "alternation"),
    "importance": Look(OTHER_COLOURS["wine"], "D", "importance-sampled"),
}
SPARE_MARKERS = ("P", "X", "*", "h", "<", ">", "p")
GAP_NAMES = {"mix_gap": r"$G_{\mathrm{Mix}}$", "max_gap": r"$G_{\mathrm{Max}}$"}
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.2,
    "legend.frameon": False,
}


def label(name: str) -> str:
    """Of an algorithm or an order; a class that is named by its module goes by its own name."""
    return LABELS.get(name) or (
        REGISTRY[name].label if name in REGISTRY else name.rpartition(":")[2]
    )


def looks(names: Iterable[str]) -> dict[str, Look]:
    """How each line is drawn: the paper's in the order of `COLOURS`, then the others by name.

    Names that the house does not know get the next spare colour and marker: the same set of names
    always looks the same.
    """
    known = {name: Look(COLOURS[name], MARKERS[name], LABELS[name]) for name in COLOURS}
    known |= OTHER_ALGORITHMS
    names = set(names)
    spare = zip(cycle(OTHER_COLOURS.values()), cycle(SPARE_MARKERS), strict=False)
    fresh = {name: Look(*next(spare), label(name)) for name in sorted(names - known.keys())}
    return {name: look for name, look in (known | fresh).items() if name in names}
