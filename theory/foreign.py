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
    module = sys.modules.get(name.partition(":")[0]) or load_object(name).__module__
    file = getattr(module, "__file__", None)
    if file is None:
        return ""
    top = name.partition(":")[0].partition(".")[0]
    package = getattr(sys.modules.get(top), "__path__", None)
    files = sorted(Path(next(iter(package))).rglob("*.py")) if package else [Path(file)]
    return digest([path.read_text(encoding="utf-8") for path in files])


def pack(value: Any, names: Iterable[str]) -> bytes:
    """`value` for another process, together with the foreign objects among `names`."""
    found = {name: load_object(name) for name in names if is_foreign(name)}
    tops = {name.partition(".")[0].partition(":")[0] for name in found}
    modules = [sys.modules[top] for top in tops]
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        return bytes(cloudpickle.dumps((value, found)))
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)


def unpack(payload: bytes) -> Any:
    value, found = cloudpickle.loads(payload)
    _received.update(found)
    return value
