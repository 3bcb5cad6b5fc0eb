"""Checks of the numbers that a user gives: one for constructors and files, one line a mistake.

Every check raises ValueError with the name of the field, what is wrong and what would be right, and
returns the numbers as float64, arrays in C order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

ROUNDING = 1e-12
"""Relative: what a few hundred float64 operations may leave of a symmetry, a sign or a norm."""
SUM = 1e-9
"""Of the distance of a sum of probabilities from 1: float32 probabilities are too coarse."""


def assign(instance: Any, **values: Any) -> None:
    """Set fields of a frozen dataclass, in its `__post_init__`."""
    for name, value in values.items():
        object.__setattr__(instance, name, value)


def array(name: str, value: ArrayLike, **axes: int | None) -> Array:
    """Finite numbers with the named axes, in order; an axis with None has any length from 1 on."""
    found = _reals(name, value, axes)
    if not np.all(np.isfinite(found)):
        raise ValueError(f"{name} has values that are not finite")
    return found


def number(name: str, value: ArrayLike, zero: bool = False) -> float:
    """A finite number above 0, or with `zero` also 0."""
    found = float(array(name, value))
    if found < 0.0 or (found == 0.0 and not zero):
        raise ValueError(f"{name} is {found:g}; it must be {'at least' if zero else 'above'} 0")
    return found


def fraction(name: str, value: ArrayLike) -> float:
    """A number in [0, 1)."""
    found = number(name, value, zero=True)
    if found >= 1.0:
        raise ValueError(f"{name} is {found:g}; it must be below 1")
    return found


def probabilities(name: str, value: ArrayLike, **axes: int | None) -> Array:
    found = array(name, value, **axes)
    if np.any((found < 0.0) | (found > 1.0)):
        raise ValueError(f"{name} must hold probabilities, between 0 and 1")
    return found


def semidefinite(name: str, value: ArrayLike) -> Array:
    """A symmetric positive semi-definite matrix, up to rounding."""
    matrix = array(name, value, rows=None, columns=None)
    if matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"{name} must be square, not {matrix.shape}")
    slack = ROUNDING * np.abs(matrix).max()
    if np.any(np.abs(matrix - matrix.T) > slack):
        raise ValueError(f"{name} must be symmetric")
    if np.linalg.eigvalsh(matrix)[0] < -slack * len(matrix):
        raise ValueError(f"{name} must be positive semi-definite: it has a negative eigenvalue")
    return matrix


def candidates(prefix: str, features: ArrayLike, log_base: ArrayLike) -> tuple[Array, Array]:
    """`features` (prompts, responses, d) and `log_base` (prompts, responses), which may be -inf."""
    phi = array(f"{prefix}features", features, prompts=None, responses=None, d=None)
    name, axes = f"{prefix}log_base", {"prompts": phi.shape[0], "responses": phi.shape[1]}
    base = _reals(name, log_base, axes)
    if np.any(np.isnan(base) | (base == np.inf)):
        raise ValueError(f"{name} must hold numbers, or -inf where there is no response")
    return phi, base


def labels(prefix: str, value: ArrayLike, log_base: Array) -> Array:
    """A distribution over the existing responses for each prompt."""
    name, (prompts, responses) = f"{prefix}labels", log_base.shape
    found = probabilities(name, value, prompts=prompts, responses=responses)
    if np.any(np.abs(found.sum(axis=1) - 1.0) > SUM):
        raise ValueError(f"the rows of {name} must sum to 1")
    if np.any(found[log_base == -np.inf] > 0.0):
        raise ValueError(f"{name} has a response that does not exist ({prefix}log_base is -inf)")
    return found


def _reals(name: str, value: ArrayLike, axes: dict[str, int | None]) -> Array:
    try:
        found = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{name} is no array of numbers: {error}") from error
    if found.dtype.kind not in "biuf":
        raise ValueError(f"{name} must hold real numbers, not {found.dtype}")
    wanted = tuple(axes.values())
    if not wanted and found.ndim:
        raise ValueError(f"{name} must be one number, not an array of shape {found.shape}")
    if found.ndim != len(wanted) or not all(map(_fits, found.shape, wanted)):
        shape = ", ".join(axis if n is None else f"{axis}={n}" for axis, n in axes.items())
        raise ValueError(f"{name} must have the shape ({shape}), not {found.shape}")
    return np.require(found, np.float64, ["C", "W"])


def _fits(length: int, wanted: int | None) -> bool:
    return length > 0 and wanted in (None, length)
