"""llm.flags.schedule: the options of an algorithm are flags, ours and a stranger's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from _stranger import ALGORITHM, importable, write_package

from llm.flags.parse import parse
from llm.flags.schedule import VALUE_FLAGS, schedule_arguments, scheduler_of
from theory.cli import UserError
from theory.registry import flags_of, resolve
from theory.schedulers import REGISTRY, Maxright, Mix, Sequential
from theory.scheduling import Scheduler

CPU = ["--use_cpu", "true"]
VALUES = {
    "lam": "0.25",
    "refresh_every": "5",
    "scale_steps": "true",
    "value_ema": "0.5",
    "order": "dpo_then_sft",
    "split": "0.75",
    "dpo_probability": "0.125",
    "cycle": "4",
    "every": "7",
    "damping": "0.5",
    "loud": "true",
    "value_source": "train",
    "value_rows": "8",
}
"""A value for every flag that a schedule may take, none of them its default."""


@pytest.fixture(autouse=True, scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("stranger")
    with importable(folder):
        yield write_package(folder)


def built(*flags: str, num_steps: int = 100) -> Scheduler:
    training = parse([*CPU, *flags]).training
    return scheduler_of(training, num_steps=num_steps, optimum=(0.0, 0.0))


ALGORITHMS = (*REGISTRY, ALGORITHM)


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_every_flag_of_an_algorithm_reaches_its_scheduler(algo: str) -> None:
    """By its name in either spelling, by --schedule, and from a file."""
    for flag in flags_of(algo).values():
        text = VALUES[flag.name]
        value = yaml.safe_load(text)
        spelled = [[f"--{flag.name}", text], [f"--{flag.name.replace('_', '-')}", text]]
        if flag.name != "lam":
            spelled.append(["--schedule", json.dumps({flag.name: value})])
        for flags in spelled:
            scheduler = built("--algo", algo, *flags)
            expected = round(value * 100) if flag.of_steps else value
            assert getattr(scheduler, flag.field) == expected


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_no_flag_that_an_algorithm_does_not_use_is_ignored(algo: str, tmp_path: Path) -> None:
    """Also in a file whose algorithm the command line changes."""
    used = {*flags_of(algo), *(VALUE_FLAGS if resolve(algo).probes_losses else ())}
    strangers = {} if algo == ALGORITHM else flags_of(ALGORITHM)
    for flag in VALUES.keys() - used - strangers.keys():
        recipe = tmp_path / "own.yaml"
        recipe.write_text(yaml.safe_dump({flag: yaml.safe_load(VALUES[flag])}))
        for flags in ([f"--{flag}", VALUES[flag]], ["--config", str(recipe)]):
            with pytest.raises(UserError, match=f"--{flag} is not used by --algo {algo}"):
                parse([*CPU, "--algo", algo, *flags])


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_defaults_are_those_of_the_class(algo: str) -> None:
    scheduler = built("--algo", algo, "--seed", "5")
    assert scheduler.runs == ()
    assert getattr(scheduler, "seed", 5) == 5
    assert parse([*CPU, "--algo", algo]).tasks == resolve(algo).trains


def test_the_defaults_that_people_rely_on() -> None:
    """refresh_every = 10 as in the authors' scripts; SFT first; equal weights."""
    assert built("--algo", "maxright") == Maxright(0.5, (0.0, 0.0), refresh_every=10)
    assert built("--algo", "sequential") == Sequential(50, "sft_then_dpo")
    assert built("--algo", "sequential", "--split", "0.333") == Sequential(33, "sft_then_dpo")
    assert built("--algo", "mix") == Mix(0.5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--algo maxright --schedule {", "--schedule is no JSON"),
        ("--algo maxright --schedule [1]", "--schedule takes a mapping"),
        ('--algo maxright --schedule {"refresh_every":"5"}', "refresh_every is '5'.*type int"),
        ('--algo maxright --schedule {"scale_steps":1}', "scale_steps is 1.*type bool"),
        ('--algo maxright --schedule {"momentum":1}', "--momentum is not used"),
        ('--algo sequential --schedule {"split":2}', "--split is 2"),
        ("--algo stranger.schedules:Nobody", "has no 'Nobody'"),
        ("--algo nowhere:Nobody", "cannot import nowhere"),
        ("--algo ppo", "unknown algorithm 'ppo'"),
    ],
)
def test_what_cannot_be_meant_is_refused(flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse([*CPU, *flags.split()])


def test_an_option_may_not_take_the_name_of_another_flag(stranger: Path) -> None:
    source = (stranger / "schedules.py").read_text(encoding="utf-8")
    (stranger / "greedy.py").write_text(source.replace("damping", "beta"), encoding="utf-8")
    with pytest.raises(UserError, match="its option beta is another flag already"):
        schedule_arguments(["stranger.greedy:Turns"])
