"""A page of HTML that needs nothing else: text, tables, figures as SVG, its style.

Whatever is not `Html` already is escaped, so that no name of a data set and no message of an error
can become markup.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby
from typing import Any

import matplotlib as mpl

from llm.report.style import CSS

SHORT = 24
"""Columns of texts up to this many characters are not broken into lines."""
SCALE = 1.87
"""Pixels of a figure on a wide screen per point of matplotlib."""
Cells = Sequence[Any]


class Html(str):
    """Text that is markup already."""


def text(value: Any) -> Html:
    """A value as escaped text; numbers in four significant digits, nothing for None."""
    if isinstance(value, Html):
        return value
    if value is None:
        return Html("-")
    if isinstance(value, bool):
        return Html("yes" if value else "no")
    if isinstance(value, float):
        return Html(f"{value:.4g}")
    if isinstance(value, dict):
        return Html(", ".join(f"{text(key)}: {text(each)}" for key, each in value.items()) or "-")
    if isinstance(value, list | tuple):
        return Html("; ".join(map(text, value)) or "-")
    return Html(escape(str(value)))


def join(parts: Iterable[str]) -> Html:
    return Html("\n".join(text(part) for part in parts))


def paragraph(value: str, kind: str = "") -> Html:
    return Html(f'<p class="{kind}">{text(value)}</p>' if kind else f"<p>{text(value)}</p>")


def bullets(values: Iterable[str]) -> Html:
    return Html(f"<ul>{''.join(f'<li>{text(value)}</li>' for value in values)}</ul>")


def preformatted(value: str) -> Html:
    return Html(f"<pre>{text(value)}</pre>")


def details(summary: str, body: Html) -> Html:
    return Html(f"<details><summary>{text(summary)}</summary>{body}</details>")


def section(title: str, *parts: str) -> Html:
    return Html(f"<section><h2>{text(title)}</h2>\n{join(parts)}\n</section>")


_NUMBER = re.compile(r"[-+]?\d[\d.,]*(e[-+]?\d+)?%?( ± [\d.e+-]+)?|-|nan|inf")


def table(head: Cells, rows: Iterable[Cells]) -> Html:
    """A table whose first column names the rows; columns of numbers stand to the right."""
    cells = [[text(cell) for cell in row] for row in (head, *rows)]
    kinds = [_kind_of_column(column[1:]) for column in zip(*cells, strict=True)]
    top, *body = cells
    line = "".join(
        f'<th scope="col"{kind}>{cell}</th>' for cell, kind in zip(top, kinds, strict=True)
    )
    lines = [
        f'<tr><th scope="row"{kinds[0]}>{first}</th>'
        + "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(rest, kinds[1:], strict=True))
        + "</tr>"
        for first, *rest in body
    ]
    return Html(
        f'<div class="wide"><table><thead><tr>{line}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _kind_of_column(cells: Cells) -> str:
    plain = [re.sub(r"<[^>]*>", "", cell) for cell in cells]
    if all(map(_NUMBER.fullmatch, plain)):
        return ' class="number"'
    return ' class="short"' if max(map(len, plain)) <= SHORT else ""


def markdown(source: str) -> Html:
    """Headings, tables, lists and paragraphs of a Markdown text that this project wrote."""
    parts = []
    for kind, group in groupby(source.splitlines(), key=_kind_of_line):
        lines = list(group)
        if kind == "table":
            rows = [
                [_inline(cell.strip()) for cell in line.strip("|").split("|")] for line in lines
            ]
            parts.append(table(rows[0], rows[2:]))  # the line between is a rule
        elif kind == "list":
            parts.append(bullets(line.removeprefix("- ") for line in lines))
        elif kind == "heading":
            parts += [Html(f"<h3>{text(line.lstrip('#').strip())}</h3>") for line in lines]
        elif kind == "text":
            parts += [paragraph(line) for line in lines]
    return join(parts)


def _inline(source: str) -> Html:
    bold = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text(source.strip()))
    return Html(bold)


def _kind_of_line(line: str) -> str:
    starts = {"|": "table", "- ": "list", "#": "heading"}
    kinds = (kind for start, kind in starts.items() if line.startswith(start))
    return next(kinds, "text" if line.strip() else "nothing")


def figure(drawing: Any, caption: str) -> Html:
    """A matplotlib figure as SVG in the page: black becomes the colour of the text, white that of
    the page, so that it can be read on either ground."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "joint-sft-dpo"}):
        drawing.savefig(buffer, format="svg", metadata={"Date": None})
    source = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", source[source.index("<svg") :], flags=re.DOTALL)
    # The names inside one drawing must not meet those of the next.
    prefix = f"f{zlib.crc32(svg.encode()):08x}-"
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = svg.replace("url(#", f"url(#{prefix}").replace('href="#', f'href="#{prefix}')
    svg = svg.replace("#000000", "currentColor").replace("#ffffff", "var(--page)")
    box = re.search(r'viewBox="([^"]*)"', svg)
    assert box is not None  # matplotlib writes one
    width = SCALE * float(box[1].split()[2])
    head = (
        f'<svg role="img" aria-label="{text(caption)}" viewBox="{box[1]}" '
        f'style="width: {width:.0f}px" xmlns="http://www.w3.org/2000/svg" '
        'xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    body = svg[svg.index(">") + 1 :]
    return Html(f"<figure>{head}{body}<figcaption>{text(caption)}</figcaption></figure>")


def page(title: str, lead: str, body: Iterable[str], *, unfinished: str | None = None) -> str:
    """The whole document."""
    banner = paragraph(unfinished, "banner") if unfinished else Html("")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{text(title)}</title>
<style>
{CSS}</style>
</head>
<body>
<main>
<header>
<h1>{text(title)}</h1>
{banner}
{paragraph(lead, "lead")}
</header>
{join(body)}
</main>
</body>
</html>
"""
