"""One process per device. Every finished run is kept, so that a killed comparison goes on.

Workers get the prepared problem from a file, and each has one CUDA device, or one thread of the
CPU. A record appears whole or not at all, under a name that is a digest of all that decides it.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from llm.compare.runs import Record, Run, train
from llm.compare.settings import RUNS, CompareConfig, check_jobs
from llm.config import RunConfig
from llm.config import parse as parse_run
from llm.identity import OPTIMISER_SETTINGS, settings
from llm.models import load_policy, with_adapters
from llm.setup import Setup
from llm.single_runs import EVALUATION_SETTINGS, STEP_SETTINGS, problem
from theory.cli import UserError
from theory.records import digest, digest_of_files, read_json, write_file, write_json
from theory.tasks import Task

RESULT, PREPARED = "result.json", ".prepared"
MAXRIGHT_SETTINGS = ("refresh_every", "scale_steps", "value_ema", "value_source", "value_rows")
OWN_SETTINGS = {"learning_rate", "seed", "data_seed"}
"""Settings that a `Run` holds."""
CODE = ("llm/*.py", "llm/compare/runs.py", "theory/schedulers.py", "theory/randomness.py")
"""What a result depends on: results of other code are not taken for results."""

Train = Callable[[Run, Path], Record]


class Pool:
    """Trains runs in `config.jobs` processes, or in this one if that is 1.

    Used as a context: on leaving, the processes end and the prepared problem is removed.
    """

    def __init__(self, config: CompareConfig, setup: Setup) -> None:
        self.config, self.folder = config, config.out / RUNS
        self.shared = shared_fingerprint(config.run, setup)
        self.trained = 0
        self._executor: ProcessPoolExecutor | None = None
        self._train: Train = partial(_train_here, setup, config.run, config.keep_models)
        self._found = check_jobs(config)
        self._setup = setup

    def __enter__(self) -> Pool:
        if self.config.jobs > 1:
            prepared = self.config.out / PREPARED
            write_file(prepared, lambda path: path.write_bytes(_pack(self._setup, self.config.run)))
            context = multiprocessing.get_context("spawn")
            names = context.SimpleQueue()
            for job in range(self.config.jobs):
                names.put(self._found[job] if self._found else "")
            self._executor = ProcessPoolExecutor(
                self.config.jobs,
                mp_context=context,
                initializer=_start_worker,
                initargs=(names, prepared, self.config.argv, self.config.keep_models),
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
        (self.config.out / PREPARED).unlink(missing_ok=True)

    def run(self, stage: str, runs: Sequence[Run]) -> list[Record]:
        """The records of the runs, in their order; what is on disk is not trained again."""
        done = {run: record for run in set(runs) if (record := self._kept(run)) is not None}
        pending = [run for run in dict.fromkeys(runs) if run not in done]
        bar = tqdm(total=len(done) + len(pending), initial=len(done), desc=stage, unit="run")
        with bar:
            for run, record in self._results(pending):
                write_json(self._place(run) / RESULT, {"shared": self.shared} | record)
                done[run] = record
                self.trained += 1
                bar.set_postfix_str(f"{run.label}{' failed' if record['failed'] else ''}")
                bar.update()
        # What the disk gives back is plain JSON: fresh records are to look the same.
        return [json.loads(json.dumps(done[run])) for run in runs]

    def _results(self, runs: Sequence[Run]) -> Iterator[tuple[Run, Record]]:
        if self._executor is None:
            for run in runs:
                yield run, self._train(run, self._place(run))
            return
        futures: dict[Future[Record], Run] = {
            self._executor.submit(_train_in_worker, run, self._place(run)): run for run in runs
        }
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process died (out of memory?); finished runs are kept: try fewer --jobs"
            ) from error

    def _place(self, run: Run) -> Path:
        return self.folder / f"{run.label}-{run.key(self.shared)}"

    def _kept(self, run: Run) -> Record | None:
        """The record on disk, if it is one of this run (and its model is there, if wanted)."""
        place = self._place(run)
        try:
            record = read_json(place / RESULT)
            same = record.pop("shared") == self.shared and Run.from_json(record["run"]) == run
        except (OSError, ValueError, KeyError, TypeError):
            return None
        wanted = self.config.keep_models and not record["failed"]
        return record if same and (not wanted or any(place.glob("*.safetensors"))) else None


def shared_fingerprint(config: RunConfig, setup: Setup) -> str:
    """Of everything but the fields of a `Run`: problem, settings, code, libraries, device type."""
    training = config.training
    names = {*OPTIMISER_SETTINGS, *STEP_SETTINGS, *EVALUATION_SETTINGS, *MAXRIGHT_SETTINGS}
    identity = {
        "problem": problem(setup, config),
        "batches": [training.batch_size(task) for task in Task] + [training.max_tokens_per_batch],
        "training": settings(training, sorted(names - OWN_SETTINGS)),
        "evaluation": training.per_device_eval_batch_size,
        "kl_rows": training.kl_rows,
        "code": code_digest(),
        "libraries": [torch.__version__, transformers.__version__],
        "device": training.device.type,
    }
    return digest(identity)


def code_digest() -> str:
    root = Path(__file__).parents[2]
    return digest_of_files(path for pattern in CODE for path in root.glob(pattern))


# --- in the worker


_worker: Train | None = None


def _start_worker(names: Any, prepared: Path, argv: Sequence[str], keep_models: bool) -> None:
    """Take a device, end with the parent, and load the problem."""
    global _worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    name = names.get()
    if name:
        os.environ["CUDA_VISIBLE_DEVICES"] = name  # before the first call of CUDA
    else:
        torch.set_num_threads(1)
    config = parse_run(argv)
    setup = _unpack(prepared.read_bytes(), config)
    _worker = partial(_train_here, setup, config, keep_models)


def _end_with_parent() -> None:
    """A killed parent cannot end its workers, and they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _train_in_worker(run: Run, folder: Path) -> Record:
    assert _worker is not None  # the initializer has run
    return _worker(run, folder)


def _train_here(
    setup: Setup, config: RunConfig, keep_models: bool, run: Run, folder: Path
) -> Record:
    with _hushed():
        return train(setup, config, run, folder, keep_models)


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
