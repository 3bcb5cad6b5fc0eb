"""The house: which module may import which, read from the source.

Every import counts, lazy ones and those for type checking alike. A room is a folder of a package,
or a module beside the folders.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("theory", "llm")
LAYERS = (
    ("theory",),
    ("llm.name", "llm.data", "llm.loss"),
    ("llm.train",),
    ("llm.model", "llm.flags"),
    ("llm.setup", "llm.single_runs", "llm.processes"),
    (
        *("llm.run", "llm.optima", "llm.export", "llm.preview"),
        *("llm.compare", "llm.validate", "llm.features", "llm.benchmark", "llm.report"),
    ),
)
"""From the ground up: nothing imports from a floor above its own."""
Edges = dict[str, set[str]]


@cache
def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imported(name: str, path: Path) -> Iterator[str]:
    """The modules of the house that one imports; `from package import name` may mean a module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            candidates = [(alias.name,) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative imports are not read here"
            candidates = [(f"{node.module}.{a.name}", str(node.module)) for a in node.names]
        else:
            continue
        for names in candidates:
            yield from [found for found in names if found in modules() and found != name][:1]


@cache
def edges() -> Edges:
    return {name: set(imported(name, path)) for name, path in modules().items()}


def room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def between_rooms() -> Edges:
    rooms: Edges = {}
    for module, targets in edges().items():
        own = rooms.setdefault(room(module), set())
        own |= {room(target) for target in targets} - {room(module)}
    return rooms


def of(package: str, graph: Edges) -> Edges:
    return {a: {b for b in targets if b.startswith(package)} for a, targets in graph.items()
            if a.startswith(package)}  # fmt: skip


def circle(graph: Edges) -> list[str]:
    """The names on a circle, if there is one."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        names: list[str] = error.args[1]
        return names
    return []


def floor(module: str) -> int:
    """The place of a module's room in `LAYERS`; a room that has none is on no floor, -1."""
    places = [
        i for i, names in enumerate(LAYERS) if {module.split(".")[0], room(module)} & {*names}
    ]
    return places[0] if places else -1


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circle_between_modules(package: str) -> None:
    assert circle(of(package, edges())) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circle_between_rooms(package: str) -> None:
    assert circle(of(package, between_rooms())) == []


def test_theory_never_imports_llm() -> None:
    targets = [t for module in of("theory", edges()) for t in edges()[module]]
    assert targets
    assert not [target for target in targets if room(target).split(".")[0] == "llm"]


def test_no_floor_stands_on_a_higher_one() -> None:
    pairs = [(module, target) for module, targets in edges().items() for target in targets]
    assert [pair for pair in pairs if 0 <= floor(pair[0]) < floor(pair[1])] == []


def test_every_room_of_llm_has_a_floor() -> None:
    assert [name for name in modules() if name != "llm" and floor(name) < 0] == []


def test_circles_and_lazy_imports_are_seen(tmp_path: Path) -> None:
    """The readers above can fail."""
    (tmp_path / "a.py").write_text(
        "from typing import TYPE_CHECKING\nimport theory.cli\nif TYPE_CHECKING:\n"
        "    from theory.sweep import Batch\ndef f():\n    from theory import metrics\n"
    )
    found = set(imported("a", tmp_path / "a.py"))
    assert found == {"theory.cli", "theory.sweep", "theory.metrics"}
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}
