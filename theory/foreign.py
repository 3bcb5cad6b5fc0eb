"""Objects of a user's own, named `package.module:attribute`, here and in other processes.

A worker of a sweep need not find the module: it gets the object by value (`pack`), which works
with every backend of joblib, on this machine and on others.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import cloudpickle

from theory.records import digest

_received: dict[str, Any] = {}
"""Objects that came by value, by name."""


def is_foreign(name: str) -> bool:
    return ":" in name and not name.endswith(".npz")


def load_object(name: str) -> Any:
    """The object at `package.module:attribute`; a ValueError, in one line, if it cannot be had."""
    if name in _received:
        return _received[name]
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except AttributeError as error:
        if attribute in str(error):
            raise ValueError(f"{name}: {module} has no {attribute!r}") from None
        raise _cannot_import(name, module, error) from error
    except Exception as error:  # whatever a stranger's module raises while it is imported
        raise _cannot_import(name, module, error) from error


def _cannot_import(name: str, module: str, error: Exception) -> ValueError:
    said = " ".join(f"{type(error).__name__}: {error}".split())
    return ValueError(f"{name}: cannot import {module}: {said}")


@cache
def source_digest(name: str) -> str:
    """Of the source that an object is made of: of its module's whole package, where it has one."""
    load_object(name)
    top = sys.modules[_top(name)]
    folders = [Path(folder) for folder in getattr(top, "__path__", ())]
    files = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    if not files and getattr(top, "__file__", None) is None:  # a notebook's
        return digest(cloudpickle.dumps(load_object(name)).hex())
    files = files or [Path(str(top.__file__))]
    return digest([path.read_text(encoding="utf-8") for path in files])


def pack(value: Any, names: Iterable[str]) -> bytes:
    """`value` for another process, together with the foreign objects among `names`."""
    found = {name: load_object(name) for name in names if is_foreign(name)}
    modules = [sys.modules[top] for top in {_top(name) for name in found}]
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        return bytes(cloudpickle.dumps((value, found)))
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)


def unpack(payload: bytes) -> Any:
    value, found = cloudpickle.loads(payload)
    _received.update({name: what for name, what in found.items() if _top(name) not in sys.modules})
    return value


def _top(name: str) -> str:
    """The outermost package or module of a name."""
    return name.partition(":")[0].partition(".")[0]
