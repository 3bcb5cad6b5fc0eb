"""What all figures share.

Colours are Okabe and Ito's (distinct under every common colour blindness); an algorithm has the
same colour, marker and label in every figure, and what is no algorithm of the paper has others.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def short_name(problem: str) -> str:
    """A problem's name in titles and file names: a feature file's stem, a function's own name."""
    return Path(problem.rpartition(":")[2]).stem


def middle(lams: Sequence[float]) -> float:
    """The lam closest to 1/2: the one that a single figure shows."""
    return min(lams, key=lambda lam: abs(lam - 0.5))
