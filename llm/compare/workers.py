"""The processes that train: one per device, or this one. Each holds the prepared problem.

They start with the first run that is to be trained, read the problem from a file, and have one CUDA
device each, or one thread of the CPU.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import transformers

from llm.compare.runs import Record, Run, train
from llm.compare.settings import CompareConfig, check_jobs
from llm.flags.arguments import RunConfig
from llm.flags.parse import parse as parse_run
from llm.model.load import load_policy, with_adapters
from llm.processes import Died, Process, limited, share
from llm.setup import Setup
from theory.cli import UserError
from theory.records import write_file

PREPARED = ".prepared"
"""The problem, below --out, while there are worker processes."""


@dataclass(frozen=True)
class Job:
    """A run, where to work, and the settings of the shared run that it replaces."""

    run: Run
    folder: Path
    keep_model: bool = False
    flags: Mapping[str, Any] = field(default_factory=dict)


class Workers:
    """Trains jobs in `config.jobs` processes, or in this one if that is 1."""

    def __init__(self, config: CompareConfig, setup: Setup) -> None:
        self.config, self._setup = config, setup
        self._devices = check_jobs(config)
        self._processes: list[Process] = []

    def train(self, jobs: Sequence[Job]) -> Iterator[tuple[Run, Record]]:
        """The records, in the order in which the runs end."""
        if self.config.jobs == 1:
            for job in jobs:
                yield job.run, _train(self._setup, self.config.run, job)
            return
        self._start(min(len(jobs), self.config.jobs))
        try:
            for job, record in share(self._processes, jobs):
                yield job.run, record
        except Died as error:
            raise UserError(
                f"a worker process died (out of memory?): {error}; finished runs are kept: "
                "try fewer --jobs"
            ) from error

    def close(self) -> None:
        """End the processes and remove the prepared problem."""
        for process in self._processes:
            process.close()
        self._processes.clear()
        (self.config.out / PREPARED).unlink(missing_ok=True)

    def _start(self, wanted: int) -> None:
        """Have at least so many processes."""
        prepared, run = self.config.out / PREPARED, self.config.run
        if wanted and not self._processes:
            write_file(prepared, lambda path: path.write_bytes(_pack(self._setup, run)))
        for number in range(len(self._processes), wanted):
            own = {"CUDA_VISIBLE_DEVICES": self._devices[number]} if self._devices else limited(1)
            command = (self.config.argv, self.config.algos)
            process = Process(_serve, prepared, *command, environment=own)
            self._processes.append(process)


def with_flags(config: RunConfig, flags: Mapping[str, Any]) -> RunConfig:
    """The shared run with some of its settings, and of its schedule's options, replaced."""
    known = {f.name for f in fields(config.training)}
    own = {name: value for name, value in flags.items() if name in known}
    options = {name: value for name, value in flags.items() if name not in known}
    schedule = config.training.schedule | options
    return replace(config, training=replace(config.training, **own, schedule=schedule))


def _serve(
    connection: Connection, prepared: Path, argv: Sequence[str], algorithms: Sequence[str]
) -> None:
    """In a process of its own: load the problem, then train what is asked for."""
    config = parse_run(argv, algorithms)
    setup = _unpack(prepared.read_bytes(), config)
    while True:
        connection.send(_train(setup, config, connection.recv()))


def _train(setup: Setup, config: RunConfig, job: Job) -> Record:
    with _hushed():
        return train(setup, with_flags(config, job.flags), job.run, job.folder, job.keep_model)


@contextmanager
def _hushed() -> Iterator[None]:
    """What transformers has to say of the model is the same for every run, and breaks the bar."""
    before = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
        if bars:
            transformers.logging.enable_progress_bar()


def _pack(setup: Setup, config: RunConfig) -> bytes:
    """The setup for another process. A policy with files is loaded there; the embedded has none."""
    policy = setup.new_policy() if config.embedded else None
    return pickle.dumps((replace(setup, new_policy=type(None)), policy))


def _unpack(data: bytes, config: RunConfig) -> Setup:
    setup, policy = pickle.loads(data)
    if policy is None:
        return replace(
            setup, new_policy=lambda: with_adapters(load_policy(config.model), config.model)
        )
    return replace(setup, new_policy=lambda: copy.deepcopy(policy))
