"""Mistakes of a user of the Python interface are one clear line; lists are as good as arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from _asserts import EXACT, assert_one_line_error

from theory.objectives import LogisticDPO, Quadratic, SoftmaxSFT
from theory.optima import ProblemOptima
from theory.optimizers import Adam, Clip, Momentum
from theory.problems import Problem, make_problem
from theory.schedulers import Alright, Maxright, Mix, Sequential
from theory.scheduling import Scheduler
from theory.simulate import StepSize, simulate
from theory.theorems import bounds

NAN, INF = float("nan"), float("inf")

# Valid arguments, as lists; a mistake replaces one of them.
MATRIX: dict[str, Any] = {"matrix": [[2, 1], [1, 2]], "center": [1, 0], "noise": 0.5}
PAIRS: dict[str, Any] = {
    "differences": [[1, 0], [0, 1], [1, 1]],
    "preference": [0.0, 0.5, 1],
    "beta": 1,
    "theta_ref": [0, 0],
}
LABELS: dict[str, Any] = {
    "features": [[[1, 0], [0, 1], [1, 1]]],
    "labels": [[0.5, 0.5, 0]],
    "log_base": [[0, -1, -INF]],
}
OBJECTIVES: dict[type, dict[str, Any]] = {Quadratic: MATRIX, LogisticDPO: PAIRS, SoftmaxSFT: LABELS}
PROBLEM: dict[str, Any] = {
    "name": "own",
    "objectives": [LogisticDPO(**PAIRS), SoftmaxSFT(**LABELS)],
    "radius": 2,
    "step_scale": 1,
    "start": [0.5, -0.5],
}
RUN: dict[str, Any] = {
    "problem": Problem(**PROBLEM),
    "scheduler": Mix(0.5),
    "num_steps": 10,
    "step_size": StepSize(0.5),
    "seeds": (5, 3, 9),
}


@dataclass(frozen=True)
class Asker(Scheduler):
    reads_gram = True


def exact_maxright(refresh_every: int = 1, value_ema: float = 1.0) -> Maxright:
    return Maxright(0.5, (0.0, 0.0), refresh_every, value_ema=value_ema)


ONE_D = Quadratic([[1.0]], [0.0], 0.0)  # type: ignore[arg-type]
CASES: list[tuple[Callable[..., Any], dict[str, Any], list[tuple[dict[str, Any], str]]]] = [
    (Quadratic, MATRIX, [
        ({"matrix": [[1, 2], [2, 1]]}, "matrix must be positive semi-definite"),
        ({"matrix": [[1, 0.1], [0, 1]]}, "matrix must be symmetric"),
        ({"matrix": [[1, 0]]}, "matrix must be square"),
        ({"matrix": [[1, NAN], [NAN, 1]]}, "matrix has values that are not finite"),
        ({"matrix": [[1, 0], [0]]}, "matrix is no array of numbers"),
        ({"matrix": [[1j, 0], [0, 1]]}, "matrix must hold real numbers"),
        ({"center": [1, 0, 0]}, r"center must have the shape \(d=2\), not \(3,\)"),
        ({"noise": -0.1}, "noise is -0.1; it must be at least 0"),
        ({"noise": INF}, "noise has values that are not finite"),
        ({"noise": [0.5]}, r"noise must be one number, not an array of shape \(1,\)"),
    ]),
    (LogisticDPO, PAIRS, [
        ({"differences": [1, 0]}, r"differences must have the shape \(pairs, d\)"),
        ({"differences": np.zeros((0, 2))}, r"differences must have the shape \(pairs, d\)"),
        ({"differences": [["a", "b"]]}, "differences must hold real numbers"),
        ({"preference": [0.5, 0.5, 1.1]}, "preference must hold probabilities"),
        ({"preference": [0.5, 0.5, -0.1]}, "preference must hold probabilities"),
        ({"preference": [0.5, 0.5]}, r"preference must have the shape \(pairs=3\)"),
        ({"preference": [0.5, 0.5, None]}, "preference must hold real numbers"),
        ({"beta": 0}, "beta is 0; it must be above 0"),
        ({"theta_ref": [0]}, r"theta_ref must have the shape \(d=2\)"),
        ({"theta_ref": [0, INF]}, "theta_ref has values that are not finite"),
    ]),
    (SoftmaxSFT, LABELS, [
        ({"labels": [[0.5, 0.4, 0]]}, "the rows of labels must sum to 1"),
        ({"labels": [[1.5, -0.5, 0]]}, "labels must hold probabilities"),
        ({"labels": [[0.5, 0, 0.5]]}, "labels has a response that does not exist"),
        ({"labels": [[0.5, 0.5]]}, r"labels must have the shape \(prompts=1, responses=3\)"),
        ({"log_base": [[0, 0, NAN]]}, "log_base must hold numbers, or -inf"),
        ({"log_base": [[0, 0, INF]]}, "log_base must hold numbers, or -inf"),
        ({"features": [[[1, 0], [0, 1], [1, NAN]]]}, "features has values that are not finite"),
    ]),
    (Problem, PROBLEM, [
        ({"objectives": [LogisticDPO(**PAIRS), ONE_D]}, "different dimensions: 2 and 1"),
        ({"objectives": [LogisticDPO(**PAIRS)]}, "there are 1 objectives; give two"),
        ({"objectives": [LogisticDPO(**PAIRS), "sft"]}, "an objective is a str"),
        ({"start": [0, 0, 0]}, r"start must have the shape \(d=2\)"),
        ({"start": [2, 1]}, "start lies at .* outside the ball of 2"),
        ({"start": [NAN, 0]}, "start has values that are not finite"),
        ({"radius": 0}, "radius is 0; it must be above 0"),
        ({"step_scale": NAN}, "step_scale has values that are not finite"),
        ({"minimisers": ([0.0], [0.0, 0.0])}, r"minimisers must have the shape \(d=2\)"),
    ]),
    (StepSize, {}, [({"scale": -1.0}, "scale is -1"), ({"scale": INF}, "scale has values")]),
    (Momentum, {}, [({"momentum": 1.0}, "momentum is 1; it must be below 1")]),
    (Adam, {}, [({"beta2": -0.1}, "beta2 is -0.1"), ({"epsilon": 0.0}, "epsilon is 0")]),
    (Clip, {}, [({"max_norm": 0.0}, "max_norm is 0; it must be above 0")]),
    (simulate, RUN, [
        *(({"num_steps": n}, "num_steps is") for n in (0, -1)),
        *(({"batch_size": n}, "batch_size is") for n in (0, -1)),
        *(({"record_steps": steps}, "record_steps must increase")
          for steps in ([10, 5], [5, 5, 10], [0, 10], [5, 20], [20], [])),
        *(({"scheduler": scheduler}, "runs, but there are 3")
          for scheduler in (Mix((0.1, 0.2)), Alright((0.1,) * 4), Sequential((1, 2)))),
        ({"values": "guess"}, "values is 'guess'; it must be one of exact, lazy"),
        *(({"values": "lazy", "scheduler": scheduler}, "values='lazy' is for")
          for scheduler in (exact_maxright(7), exact_maxright(value_ema=0.5), Asker())),
    ]),
]  # fmt: skip
MISTAKES = [(make, valid | wrong, m) for make, valid, table in CASES for wrong, m in table]


@pytest.mark.parametrize(("make", "arguments", "mention"), MISTAKES)
def test_a_mistake_is_one_line(
    make: Callable[..., Any], arguments: dict[str, Any], mention: str
) -> None:
    with pytest.raises(ValueError, match=mention) as error:
        make(**arguments)
    assert_one_line_error(str(error.value))


@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize("convert", [np.float32, partial(np.array, order="F")])
def test_lists_and_other_arrays_are_float64_arrays(kind: type, convert: Any) -> None:
    """Of one type, in C order: the compiled loops then come from the cache whatever was given."""
    listed = kind(**OBJECTIVES[kind])
    given = kind(**{name: convert(v) for name, v in OBJECTIVES[kind].items()})
    theta = np.array([0.3, -0.2])
    assert given.value(theta) == pytest.approx(listed.value(theta), abs=EXACT)
    for name in OBJECTIVES[kind]:
        found = getattr(given, name)
        if np.ndim(found):
            assert found.dtype == np.float64
            assert found.flags.c_contiguous


def test_a_start_is_where_runs_and_distances_begin() -> None:
    problem = Problem(**PROBLEM)
    assert problem.start.tolist() == [0.5, -0.5]
    assert replace(problem, start=None).start.tolist() == [0.0, 0.0]  # type: ignore[arg-type]
    trace = simulate(**RUN, record_steps=[1])
    np.testing.assert_array_equal(trace.theta["uniform"][0], [problem.start] * 3)
    for named in (problem, replace(make_problem("toy2d"), start=np.array([1.0, 2.0]))):
        optima = ProblemOptima(named)
        distance = bounds.descent(optima, "mix", 0.5, StepSize(1.0), 10).distance
        assert distance == pytest.approx(float(np.linalg.norm(named.start - optima.mix(0.5).theta)))
