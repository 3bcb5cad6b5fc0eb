"""The page of one run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llm.report.command import command
from llm.report.figures import (
    TASKS,
    UNITS,
    WINDOWS,
    curve,
    decisions_figure,
    losses_figure,
    norms_figure,
    time_figure,
)
from llm.report.page import drawn
from llm.report.record import Data, RunRecord, sum_of_steps

TEMPLATE = "run.html.jinja"
SHOUTED = {"dpo", "sft", "kl", "se"}
DATA_NAMES = {"sft": "demonstrations", "dpo": "preferences"}


def content(record: RunRecord) -> Data:
    """What the template shows."""
    summary, state = record.summary, record.state
    found: Data = {"record": record, "summary": summary, "command": command(record)}
    found |= {"title": f"{record.folder.resolve().name}: {record.label}"}
    found |= {"lead": f"{_what(record)} {_how_it_ended(record)}", "windows": WINDOWS}
    found |= {"unfinished": _unfinished(record), "decisions": [], "shares": None}
    if state is not None and state["decisions"]:
        found |= {"decisions": list(_decision_rows(state)), "shares": _shares(record)}
    if summary is not None:
        found |= {"values": _value_rows(summary), "seconds": _second_rows(summary)}
        found |= {"rows": _data_rows(record), "reasons": list(_reasons(summary))}
    return found | _drawings(record)


def _drawings(record: RunRecord) -> Data:
    """Of the log; None where nothing was logged."""
    points = {task: len(curve(record.lines, f"eval_{task}_loss")[0]) for task in TASKS}
    norms = any(len(curve(record.log, f"{task}_grad_norm")[0]) > 1 for task in TASKS)
    times = any("time_forward" in line for line in record.log)
    limit = record.training.get("max_grad_norm")
    found = {
        "losses": losses_figure(record.lines, record.optimum) if max(points.values()) > 1 else None,
        "norms": norms_figure(record.log, limit) if norms else None,
        "times": time_figure(record.log) if times else None,
    }
    drawings = {name: each and drawn(each) for name, each in found.items()}
    return drawings | {"with_path": all(points.values())}


def _shares(record: RunRecord) -> Any:
    state = record.state or {}
    if len(state["steps_taken"]) < 2:
        return None
    return drawn(decisions_figure(state["decisions"], record.probes))


def _unfinished(record: RunRecord) -> str | None:
    if record.summary is not None:
        return None
    wanted = record.training["max_steps"]
    of = f" of {wanted}" if wanted > 0 else ""
    return (
        f"Unfinished: no summary was written; the last log line is of step {record.last_step}{of}. "
        "Checkpoints, if there are any, continue with --resume_from_checkpoint true."
    )


def _what(record: RunRecord) -> str:
    own = record.config["model"]["model_name_or_path"]
    data = record.config["data"]
    sources = {
        task: _named(data[f"{task}_dataset"]) if own else "the generated corpus"
        for task in record.tasks
    }
    parts = [f"{DATA_NAMES[task]} ({source})" for task, source in sources.items() if source]
    how = record.label if record.summary is None else record.schedule
    return f"{own or 'The embedded tiny model'} was trained on {' and '.join(parts)} by {how}."


def _how_it_ended(record: RunRecord) -> str:
    steps = sum_of_steps(record)
    if record.summary is None:
        return f"The run has not finished; {steps} steps are recorded."
    held_out = record.summary["held_out"]
    parts = []
    for task in TASKS:
        name = f"{task}_loss"
        if name in held_out["after"]:
            before, after = held_out["before"][name], held_out["after"][name]
            word = "fell" if after < before else "rose"
            loss = "loss" if "perplexity" in record.summary else f"f_{task.upper()}"
            parts.append(f"held-out {loss} {word} from {before:.4g} to {after:.4g} {UNITS[task]}")
    if "perplexity" in record.summary:
        parts.append(f"perplexity is {record.summary['perplexity']['after']:.4g}")
    distance = record.summary.get("combined", {}).get("after", {}).get("ideal_distance")
    if distance is not None:
        parts.append(f"the distance to both optima is {distance:.4g}")
    return f"After {steps} steps " + ", ".join(parts) + "."


def _value_rows(summary: Data) -> Iterator[tuple[Any, ...]]:
    """Every held-out value before and after; optimum and gap where there are any."""
    held_out, optimum = summary["held_out"], summary["optimum"] or {}
    combined = summary.get("combined", {})
    moments = ("before", "after")
    for task in TASKS:
        name = f"{task}_loss"
        if name in held_out["after"]:
            values = [held_out[moment].get(name) for moment in moments]
            best = optimum.get(task)
            gap = None if best is None else values[1] - best
            yield f"f_{task.upper()} ({UNITS[task]})", *values, best, gap
    for name, label in (
        ("f_mix", f"f_Mix at lam {summary['lam']:g}"),
        ("ideal_distance", "ideal distance"),
    ):
        if name in combined.get("after", {}):
            yield label, *(combined[moment].get(name) for moment in moments), None, None
    losses = {f"{task}_loss" for task in TASKS}
    for name, value in held_out["after"].items():
        if name not in losses:
            words = [word.upper() if word in SHOUTED else word for word in name.split("_")]
            yield " ".join(words), held_out["before"].get(name), value, None, None


def _decision_rows(state: Data) -> Iterator[tuple[Any, ...]]:
    for task, steps in state["steps_taken"].items():
        yield task.upper(), steps, state["tokens_seen"][task], state["consumed"].get(task)


def _second_rows(summary: Data) -> Iterator[tuple[Any, ...]]:
    seconds = summary["seconds"]
    phases = seconds.get("phases", {})
    whole = sum(phases.values())
    for name, value in phases.items():
        if value:
            yield name, value, f"{value / whole:.1%}"
    yield "training", seconds["training"], None
    yield "everything (loading, reference, optima, evaluation)", seconds["total"], None


def _data_rows(record: RunRecord) -> Iterator[tuple[Any, ...]]:
    for name, counts in (record.summary or {})["rows"].items():
        numbers = (counts["total"], counts["kept"], counts["truncated"])
        totals = (sum(counts[kind].values()) for kind in ("dropped", "notes"))
        yield name, _source(record, name), *numbers, *totals


def _reasons(summary: Data) -> Iterator[str]:
    for name, counts in summary["rows"].items():
        for kind, word in (("dropped", "dropped"), ("notes", "noted")):
            yield from (f"{name}: {n} {word}, {why}" for why, n in counts[kind].items())


def _source(record: RunRecord, name: str) -> str:
    """Where the rows called `sft train`, `dpo held-out`, ... come from."""
    task, part = name.split(maxsplit=1)
    data = record.config["data"]
    source = data.get(f"{task}_dataset")
    if part == "held-out":
        own_split = data.get(f"{task}_eval_split")
        source = data.get(f"{task}_eval_dataset") or source
        source = f"{_named(source)} [{own_split}]" if source and own_split else source
    return _named(source) or "generated"


def _named(source: str | list[str] | None) -> str:
    """Several sources in one line."""
    return " ".join(source) if isinstance(source, list) else source or ""
