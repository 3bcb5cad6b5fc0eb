"""A page of HTML that needs nothing else: text, tables, figures as SVG, its style.

The templates beside this file are jinja2's. Whatever they show is escaped, so that no name of a
data set and no message of an error can become markup; only a drawing is markup already.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from theory.tables import Strong

SHORT = 24
"""Columns of texts up to this many characters are not broken into lines."""
SCALE = 1.87
"""Pixels of a figure on a wide screen per point of matplotlib."""
_NUMBER = re.compile(r"[-+]?\d[\d.,]*(e[-+]?\d+)?%?( ± [\d.e+-]+)?|-|nan|inf")


class Svg(NamedTuple):
    """A drawing: its view box, its width in pixels on a wide screen, what is in the element."""

    box: str
    width: int
    body: Markup


def page(template: str, **content: Any) -> str:
    """The whole document; the base of the templates needs title, lead, unfinished, findings."""
    return environment().get_template(template).render(**content)


def environment() -> Environment:
    """How every template is read: a name that it does not get is an error."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=text,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["kinds"] = kinds
    templates.tests["strong"] = lambda value: isinstance(value, Strong)
    return templates


def text(value: Any) -> Any:
    """A value in words; numbers in four significant digits, nothing for None."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{text(key)}: {text(each)}" for key, each in value.items()) or "-"
    if isinstance(value, list | tuple):
        return "; ".join(str(text(each)) for each in value) or "-"
    return value


def kinds(rows: Sequence[Sequence[Any]], columns: int) -> list[str | None]:
    """What each column of a table holds: the class in `style.css`."""
    return [_kind([str(text(row[column])) for row in rows]) for column in range(columns)]


def _kind(cells: Sequence[str]) -> str | None:
    if all(map(_NUMBER.fullmatch, cells)):
        return "number"
    return "short" if max(map(len, cells)) <= SHORT else None


def drawn(figure: Figure) -> Svg:
    """Black becomes the colour of the text, white that of the page: to be read on either ground."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "joint-sft-dpo"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    source = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", source[source.index("<svg") :], flags=re.DOTALL)
    # The names inside one drawing must not meet those of the next.
    prefix = f"f{zlib.crc32(svg.encode()):08x}-"
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = svg.replace("url(#", f"url(#{prefix}").replace('href="#', f'href="#{prefix}')
    svg = svg.replace("#000000", "currentColor").replace("#ffffff", "var(--page)")
    box = re.search(r'viewBox="([^"]*)"', svg)
    assert box is not None  # matplotlib writes one
    width = round(SCALE * float(box[1].split()[2]))
    return Svg(box[1], width, Markup(svg[svg.index(">") + 1 :]))
