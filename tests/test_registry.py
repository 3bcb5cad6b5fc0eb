"""From names to schedulers, built in and a stranger's: flags, and the way to other processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _asserts import assert_is_plain_data, assert_one_line_error
from _drive import drive
from _stranger import ALGORITHM, importable, write_package

from theory import foreign
from theory.costs import Costs, cost_per_step
from theory.foreign import pack, source_digest
from theory.registry import (
    flags_of,
    label_of,
    make_scheduler,
    name_of,
    resolve,
    scheduler_for_run,
    scheduler_options,
    typical_scheduler,
)
from theory.schedulers import REGISTRY, Mix, Sequential, SFTAlone
from theory.scheduling import Scheduler
from theory.sweep import Batch, run_sweep

FLAGS = {
    "sequential": {"split": 0.5, "order": "sft_then_dpo"},
    "mix": {"lam": MISSING},
    "alright": {"lam": MISSING},
    "maxright": {"lam": MISSING, "refresh_every": 10, "scale_steps": False, "value_ema": 1.0},
    "importance": {"lam": MISSING, "dpo_probability": 0.5},
    "alternate": {"lam": MISSING, "cycle": 2},
    "dpo": {},
    "sft": {},
}
"""What a user may set, with its default."""


@pytest.fixture
def stranger(tmp_path: Path) -> Iterator[Path]:
    with importable(tmp_path):
        yield write_package(tmp_path)
    foreign.source_digest.cache_clear()


@pytest.mark.parametrize("name", REGISTRY)
def test_the_fields_of_an_algorithm_are_its_flags(name: str) -> None:
    flags = flags_of(name)
    assert {flag.name: flag.default for flag in flags.values()} == FLAGS[name]
    assert all(flag.help or flag.name == "lam" for flag in flags.values())
    assert name_of(REGISTRY[name]) == name
    assert typical_scheduler(name, {"lam": 0.3, "unused": 1}).runs == ()


@pytest.mark.parametrize("name", REGISTRY)
def test_what_a_class_says_of_itself_is_what_it_does(name: str) -> None:
    scheduler = typical_scheduler(name, {"lam": 0.3})
    losses_read: list[int] = []

    class Counts:
        def __call__(self) -> Any:
            losses_read.append(1)
            return np.array([1.0, 2.0])

        def gram(self) -> Any:
            raise AssertionError("undeclared")

    state, decisions = scheduler.init(), []
    for _ in range(20):
        weights, state = scheduler.select(state, Counts())
        state = scheduler.observe(state, np.where(weights > 0.0, 1.5, np.nan))
        decisions.append(weights.tolist())
    stepped = {i for weights in decisions for i in range(2) if weights[i] > 0.0}
    assert stepped <= set(type(scheduler).trains)
    assert bool(losses_read) == type(scheduler).probes_losses == (scheduler.probes_per_step > 0.0)
    if type(scheduler).steady:
        stages = {int(scheduler.stage_start(step)) for step in range(20)}
        assert len({tuple(weights) for weights in decisions}) <= len(stages)


def test_a_flag_that_is_a_share_of_the_steps_becomes_a_number_of_steps() -> None:
    scheduler = scheduler_for_run("sequential", {"split": 0.3}, num_steps=50, seed=1)
    assert scheduler == Sequential(15, "sft_then_dpo")
    assert scheduler_for_run("mix", {"lam": 0.2}, num_steps=50, seed=1) == Mix(0.2)


def test_an_option_that_is_missing_unused_or_unknown_is_named() -> None:
    for name, options, words in (
        ("maxright", {}, ("needs", "lam", "optimum")),
        ("sequential", {}, ("needs", "first_steps")),
        ("mix", {"lam": 0.5, "momentum": 0.9}, ("does not use momentum", "'mix'", "lam")),
        ("adam", {}, ("unknown algorithm 'adam'", *REGISTRY)),
    ):
        with pytest.raises(ValueError, match=words[0]) as error:
            make_scheduler(name, **options)
        assert_one_line_error(str(error.value), *words)
    assert SFTAlone() == make_scheduler("sft")


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        ("", "nowhere.at_all:Class", "cannot import nowhere.at_all"),
        ("1 / 0", "stranger.schedules:Turns", "ZeroDivisionError"),
        ("", "stranger.schedules:Turns", "has no 'Turns'"),
        ("Turns = 3", "stranger.schedules:Turns", "no subclass"),
        (
            "from theory.scheduling import Scheduler\nclass Turns(Scheduler):\n    x: int = 3",
            "stranger.schedules:Turns",
            "no dataclass",
        ),
    ],
)
def test_a_name_that_leads_to_no_scheduler_is_one_line(
    source: str, name: str, message: str, stranger: Path
) -> None:
    (stranger / "schedules.py").write_text(source)
    with pytest.raises(ValueError, match=message) as error:
        resolve(name)
    assert_one_line_error(str(error.value), name)


def test_a_field_that_no_flag_can_hold_is_named() -> None:
    @dataclass(frozen=True)
    class Odd(Scheduler):
        table: dict[str, float] | None = None

    Odd.__dataclass_fields__["table"].type = dict  # annotations of a test are not global
    Odd.__annotations__["table"] = dict
    with pytest.raises(ValueError, match=r"table is of type .*a flag is bool, int, float or str"):
        flags_of(Odd)


def test_a_strangers_class_is_an_algorithm_like_ours(stranger: Path) -> None:
    kind = resolve(ALGORITHM)
    assert (name_of(kind), label_of(kind)) == (ALGORITHM, "Turns")
    assert scheduler_options(ALGORITHM) == {"every", "damping", "loud", "seed"}
    flags = flags_of(ALGORITHM)
    assert {n: f.kind for n, f in flags.items()} == {"every": int, "damping": float, "loud": bool}
    scheduler = scheduler_for_run(ALGORITHM, {"every": 4}, num_steps=10, seed=7)
    assert scheduler.describe() == "Turns, every 4, damping 0, loud False, seed 7"
    assert cost_per_step(scheduler, costs=Costs(), p_dpo=0.25) == 0.25 * 8.0 + 0.75 * 3.0
    # Its memory goes through JSON, in the middle of a run.
    expected, _ = drive(scheduler, 20)
    before, state = drive(scheduler, 9)
    after, _ = drive(scheduler, 11, state=assert_is_plain_data(state))
    np.testing.assert_array_equal(np.concatenate([before, after]), expected)


def test_a_sweep_sends_a_strangers_class_by_value(stranger: Path, tmp_path: Path) -> None:
    """Two processes, and one that cannot import its module, give what this process gives."""
    batches = [
        Batch(problem, ALGORITHM, (0.5,), (0, 1), 60) for problem in ("quadratic", "bernoulli")
    ]
    here = run_sweep(batches, jobs=1, progress=False)
    there = run_sweep(batches, jobs=2, parts=tmp_path / "parts", progress=False)
    assert here.equals(there)
    payload = tmp_path / "payload"
    payload.write_bytes(pack(batches[0], batches[0].names))
    program = (
        "import sys; from theory.foreign import unpack\n"
        "frame = unpack(open(sys.argv[1], 'rb').read()).run()\n"
        "print(float(frame['f_dpo'].sum()))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, str(payload)],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert float(ran.stdout) == here[here["problem"] == "quadratic"]["f_dpo"].sum()


def test_results_of_other_source_are_not_kept(stranger: Path) -> None:
    batch = Batch("quadratic", ALGORITHM, (0.5,), (0,), 10)
    before, digest = batch.key, source_digest(ALGORITHM)
    (stranger / "rules.py").write_text("# other rules\n" + (stranger / "rules.py").read_text())
    source_digest.cache_clear()
    assert source_digest(ALGORITHM) != digest
    assert batch.key != before
