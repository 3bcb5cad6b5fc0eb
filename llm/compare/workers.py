"""The processes that train: one per device, or this one. Each holds the prepared problem.

They start with the first run that is to be trained, read the problem from a file, and have one CUDA
device each, or one thread of the CPU.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import transformers

from llm.compare.runs import Record, Run, train
from llm.compare.settings import CompareConfig, check_jobs
from llm.flags.arguments import RunConfig
from llm.flags.parse import parse as parse_run
from llm.model.load import load_policy, with_adapters
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
        self._executor: ProcessPoolExecutor | None = None

    def train(self, jobs: Sequence[Job]) -> Iterator[tuple[Run, Record]]:
        """The records, in the order in which the runs end."""
        if self.config.jobs == 1:
            for job in jobs:
                yield job.run, _train(self._setup, self.config.run, job)
        elif jobs:
            executor = self._executor = self._executor or self._start()
            futures: dict[Future[Record], Run] = {
                executor.submit(_train_in_worker, job): job.run for job in jobs
            }
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            except BrokenProcessPool as error:
                raise UserError(
                    "a worker process died (out of memory?); finished runs are kept: "
                    "try fewer --jobs"
                ) from error

    def close(self) -> None:
        """End the processes and remove the prepared problem."""
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
            self._executor = None
            (self.config.out / PREPARED).unlink(missing_ok=True)

    def _start(self) -> ProcessPoolExecutor:
        prepared, run = self.config.out / PREPARED, self.config.run
        write_file(prepared, lambda path: path.write_bytes(_pack(self._setup, run)))
        context = multiprocessing.get_context("spawn")
        names = context.SimpleQueue()
        for job in range(self.config.jobs):
            names.put(self._devices[job] if self._devices else "")
        return ProcessPoolExecutor(
            self.config.jobs,
            mp_context=context,
            initializer=_start_worker,
            initargs=(names, prepared, self.config.argv, self.config.algos),
        )


def with_flags(config: RunConfig, flags: Mapping[str, Any]) -> RunConfig:
    """The shared run with some of its settings, and of its schedule's options, replaced."""
    known = {f.name for f in fields(config.training)}
    own = {name: value for name, value in flags.items() if name in known}
    options = {name: value for name, value in flags.items() if name not in known}
    schedule = config.training.schedule | options
    return replace(config, training=replace(config.training, **own, schedule=schedule))


# --- in the worker


_worker: Callable[[Job], Record] | None = None


def _start_worker(
    names: Any, prepared: Path, argv: Sequence[str], algorithms: Sequence[str]
) -> None:
    """Take a device, end with the parent, and load the problem."""
    global _worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    name = names.get()
    if name:
        os.environ["CUDA_VISIBLE_DEVICES"] = name  # before the first call of CUDA
    else:
        torch.set_num_threads(1)
    config = parse_run(argv, algorithms)
    setup = _unpack(prepared.read_bytes(), config)
    _worker = partial(_train, setup, config)


def _end_with_parent() -> None:
    """A killed parent cannot end its workers, and they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _train_in_worker(job: Job) -> Record:
    assert _worker is not None  # the initializer has run
    return _worker(job)


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
