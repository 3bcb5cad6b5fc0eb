"""The page of one run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llm.report.command import command
from llm.report.figures import (
    TASKS,
    UNITS,
    curve,
    decisions_figure,
    losses_figure,
    norms_figure,
    time_figure,
)
from llm.report.page import (
    Html,
    bullets,
    details,
    figure,
    join,
    paragraph,
    preformatted,
    section,
    table,
)
from llm.report.record import Data, RunRecord, sum_of_steps
from theory.plotting.style import LABELS

NAMES = LABELS | {
    "sequential": "sequential training",
    "importance": "importance sampling",
    "alternate": "alternation",
    "dpo": "DPO alone",
    "sft": "SFT alone",
}
SHOUTED = {"dpo", "sft", "kl", "se"}


def title(record: RunRecord) -> str:
    return f"{record.folder.resolve().name}: {NAMES.get(record.algorithm, record.algorithm)}"


def lead(record: RunRecord) -> str:
    """One sentence: what was trained on what, and how it ended."""
    return f"{_what(record)} {_how_it_ended(record)}"


def unfinished(record: RunRecord) -> str | None:
    if record.summary is not None:
        return None
    wanted = record.training["max_steps"]
    of = f" of {wanted}" if wanted > 0 else ""
    return (
        f"Unfinished: no summary was written; the last log line is of step {record.last_step}{of}. "
        "Checkpoints, if there are any, continue with --resume_from_checkpoint true."
    )


def body(record: RunRecord) -> Iterator[Html]:
    yield from _losses(record)
    yield from _decisions(record)
    yield from _gradients_and_time(record)
    yield from _rows(record)
    yield _settings(record)


def _what(record: RunRecord) -> str:
    model = record.config["model"]["model_name_or_path"] or "The embedded tiny model"
    data = record.config["data"]
    embedded = record.config["model"]["model_name_or_path"] is None
    names = {"sft": "demonstrations", "dpo": "preferences"}
    parts = []
    for task in TASKS:
        if record.algorithm in (*TASKS,) and record.algorithm != task:
            continue
        source = "the generated corpus" if embedded else data[f"{task}_dataset"]
        if source is not None:
            parts.append(f"{names[task]} ({source})")
    lam = record.training.get("lam")
    how = NAMES.get(record.algorithm, record.algorithm)
    if record.algorithm in ("mix", "alright", "maxright", "importance", "alternate"):
        how += f" at lam {0.5 if lam is None else lam:g}"
    return f"{model} was trained on {' and '.join(parts)} by {how}."


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


# --------------------------------------------------------------------------------------- sections


def _losses(record: RunRecord) -> Iterator[Html]:
    parts: list[Html] = []
    if any(len(curve(record.lines, f"eval_{task}_loss")[0]) > 1 for task in TASKS):
        caption = "Losses on held-out rows (points) and means of what was trained on (thin)."
        if record.optimum is not None:
            caption += " Dotted: what training on that objective alone reaches."
        if all(len(curve(record.lines, f"eval_{task}_loss")[0]) for task in TASKS):
            caption += " Last panel: both held-out losses from the star to the circle."
        parts.append(figure(losses_figure(record.lines, record.optimum), caption))
    if record.summary is not None:
        head = ("held-out", "before", "after", "optimum", "gap")
        parts.append(table(head, _value_rows(record.summary)))
        if record.summary["optimum"] is None and "perplexity" not in record.summary:
            parts.append(
                paragraph("No gaps: the run was not given the optima (--optima estimate).", "note")
            )
    elif not parts:
        parts.append(paragraph("No held-out loss was logged.", "note"))
    yield section("Objectives", *parts)


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
    for name, value in held_out["after"].items():
        if name not in ("dpo_loss", "sft_loss"):
            words = [word.upper() if word in SHOUTED else word for word in name.split("_")]
            yield " ".join(words), held_out["before"].get(name), value, None, None


def _decisions(record: RunRecord) -> Iterator[Html]:
    state = record.state
    if state is None or not state["decisions"]:
        return
    parts = []
    if len(state["steps_taken"]) > 1:
        caption = (
            "Which objective the steps went to: share of DPO in the weights, averaged over up to "
            "40 windows."
        )
        if record.probes:
            caption += " Ticks: probes of both losses."
        parts.append(figure(decisions_figure(state["decisions"], record.probes), caption))
    rows = [
        (task.upper(), steps, state["tokens_seen"][task], state["consumed"].get(task))
        for task, steps in state["steps_taken"].items()
    ]
    parts.append(table(("objective", "steps", "tokens", "rows drawn"), rows))
    schedule = state["identity"]["schedule"]
    probes = f"; {len(record.probes)} probes of both losses" if record.probes else ""
    parts.append(paragraph(f"Schedule: {schedule}{probes}.", "note"))
    if record.summary is None:
        parts.append(paragraph("As of the newest checkpoint.", "note"))
    yield section("Decisions of the schedule", *parts)


def _gradients_and_time(record: RunRecord) -> Iterator[Html]:
    drawings, parts = [], []
    if any(len(curve(record.log, f"{task}_grad_norm")[0]) > 1 for task in TASKS):
        limit = record.training.get("max_grad_norm")
        caption = "Norm of the gradient of each objective before clipping, in steps on it alone."
        drawings.append(figure(norms_figure(record.log, limit), caption))
    if any("time_forward" in line for line in record.log):
        caption = "Where the time between two log lines went."
        drawings.append(figure(time_figure(record.log), caption))
    if drawings:
        parts.append(Html(f'<div class="pair">{join(drawings)}</div>'))
    if record.summary is not None:
        parts.append(table(("cost", "seconds", "share of training"), _second_rows(record.summary)))
    if parts:
        yield section("Gradients, time and cost", *parts)


def _second_rows(summary: Data) -> Iterator[tuple[Any, ...]]:
    seconds = summary["seconds"]
    phases = seconds.get("phases", {})
    whole = sum(phases.values())
    for name, value in phases.items():
        if value:
            yield name, value, f"{value / whole:.1%}"
    yield "training", seconds["training"], None
    yield "everything (loading, reference, optima, evaluation)", seconds["total"], None


def _rows(record: RunRecord) -> Iterator[Html]:
    if record.summary is None:
        yield section("Data", paragraph("Row counts are written when a run ends.", "note"))
        return
    head = ("data", "source", "rows", "kept", "truncated", "dropped", "noted")
    rows, reasons = [], []
    for name, counts in record.summary["rows"].items():
        dropped, notes = counts["dropped"], counts["notes"]
        numbers = (counts["total"], counts["kept"], counts["truncated"])
        rows.append((name, _source(record, name), *numbers, *map(_total, (dropped, notes))))
        reasons += [f"{name}: {n} dropped, {reason}" for reason, n in dropped.items()]
        reasons += [f"{name}: {n} noted, {note}" for note, n in notes.items()]
    told = bullets(reasons) if reasons else paragraph("No row was dropped or noted.", "note")
    yield section("Data", table(head, rows), told)


def _total(counts: dict[str, int]) -> int:
    return sum(counts.values())


def _source(record: RunRecord, name: str) -> str:
    """Where the rows called `sft train`, `dpo held-out`, ... come from."""
    task, part = name.split(maxsplit=1)
    data = record.config["data"]
    source = data.get(f"{task}_dataset")
    if part == "held-out":
        own_split = data.get(f"{task}_eval_split")
        source = data.get(f"{task}_eval_dataset") or source
        source = f"{source} [{own_split}]" if source and own_split else source
    return source or "generated"


def _settings(record: RunRecord) -> Html:
    parts = [preformatted(command(record))]
    parts.append(details("Every recorded setting", join(_tables(record.config))))
    return section("Settings", paragraph("As flags, without the defaults:"), *parts)


def _tables(config: Data) -> Iterator[Html]:
    for part, values in config.items():
        yield table((part, "value"), values.items())
