"""The readable table of a measurement, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from theory.tables import markdown_table


def table(document: dict[str, Any]) -> str:
    """Ratios next to their targets, costs next to the model, throughput, and what failed."""
    config, machine = document["config"], document["machine"]
    parts = [
        "# Speed and memory of the joint trainer",
        f"`{document['command']}`",
        f"Shape {config['shape']['name']} on {machine['device']}, {config['threads']} thread(s); "
        f"{document['clock']}, {config['rounds']} measured round(s) after a first one, more where "
        "they are short; median and 95% interval over rounds, one peak each for memory. Rows: "
        + document["rows"]["source"],
        "## Ratios",
        markdown_table(
            ("comparison", "ratio of", "median", "95% interval", "target", "met"),
            map(_ratio_cells, document["comparisons"]),
        ),
    ]
    if document["costs"]:
        parts += [
            "## Cost of a step against the cost model",
            markdown_table(
                ("algorithm", "measured (s)", "expected (s)", "ratio", "95% interval", "probes"),
                map(_cost_cells, document["costs"]),
            ),
        ]
    if document["throughput"]:
        tflops = document["machine"]["peak_tflops"]
        parts += [
            f"## Throughput (goodput: share of {tflops:.3g} TFLOP/s, "
            f"{machine['peak_tflops_source']})",
            markdown_table(
                ("suite", "contender", "s/step", "tokens/s", "pairs/s", "goodput", "peak MiB",
                 "MiB before the model"),
                map(_speed_cells, document["throughput"]),
            ),
        ]  # fmt: skip
        parts += _reference(document["throughput"])
    if document.get("data"):
        parts += [
            "## From a file to rows to train on",
            markdown_table(
                ("objective", "contender", "rows", "seconds", "CPU seconds", "peak MiB"),
                map(_data_cells, document["data"]),
            ),
        ]
    failed = [f"- {name}: {why}" for name, why in document["failed"].items()]
    if failed:
        parts += ["## Not measured", "\n".join(failed)]
    return "\n\n".join(parts) + "\n"


def _ratio_cells(line: dict[str, Any]) -> list[str]:
    signs = {"at least": "≥ {:.3g}", "at most": "≤ {:.3g}", "within": "1 ± {:.3g}"}
    target = "" if line["target"] is None else signs[line["sense"]].format(line["target"])
    interval = "" if line["what"] == "memory" else _interval(line)
    of = f"{line['what']}: {line['over']} / {line['under']}"
    met = {None: "", True: "yes", False: "no"}[line["met"]]
    return [line["label"], of, f"{line['median']:.3f}", interval, target, met]


def _data_cells(line: dict[str, Any]) -> list[str]:
    seconds = (f"{line[key]:.1f}" for key in ("seconds", "cpu_seconds"))
    return [line["task"], line["side"], str(line["rows"]), *seconds, f"{line['peak_mib']:.0f}"]


def _cost_cells(line: dict[str, Any]) -> list[str]:
    ratio = line["ratio"]
    reused = ", reused" if line["reuses_probe"] else ""
    return [
        line["name"].removeprefix("ours/"),
        f"{line['seconds_per_step']:.4f}",
        f"{line['expected']:.4f}",
        f"{ratio['median']:.3f}",
        _interval(ratio),
        f"{line['probes']} in {line['steps']} steps{reused}",
    ]


def _speed_cells(line: dict[str, Any]) -> list[str]:
    return [
        line["suite"],
        line["name"],
        f"{line['seconds_per_step']:.4f}",
        f"{line['tokens_per_second']:,.0f}",
        f"{line['pairs_per_second']:.2f}",
        f"{100 * line['goodput']:.1f}%",
        f"{line['peak_mib']:,.0f}",
        f"{line['before_mib']:,.0f}",
    ]


def _reference(lines: Sequence[dict[str, Any]]) -> list[str]:
    """What filling the reference cache costs, next to what training on a pair costs."""
    return [
        f"Filling the reference cache: {line['reference_seconds_per_pair']:.4f} s a pair, once; "
        f"that is {line['reference_seconds_per_pair'] * line['pairs_per_second']:.2f} of what one "
        "training step costs on it."
        for line in lines
        if line["name"] == "ours/dpo" and "reference_seconds_per_pair" in line
    ][:1]


def _interval(ratio: dict[str, Any]) -> str:
    low, high = ratio["low"], ratio["high"]
    finite = low is not None and high is not None and low > 0.0 and high < float("inf")
    return f"[{low:.3f}, {high:.3f}]" if finite else "one round"
