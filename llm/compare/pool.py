"""Runs and their records: every finished run is kept, so that a killed comparison goes on.

A record appears whole or not at all, under a name that is a digest of all that decides it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from llm.compare.runs import Record, Run
from llm.compare.settings import RUNS, CompareConfig
from llm.compare.workers import Job, Workers, with_flags
from llm.flags.arguments import RunConfig
from llm.setup import Setup
from llm.single_runs import problem
from llm.train.free import COMPARISON, counting
from theory.records import digest, digest_of_code, read_json, write_json

RESULT = "result.json"
CODE = (
    *("llm.data", "llm.loss", "llm.model", "llm.train", "llm.setup", "llm.single_runs"),
    *("llm.compare.runs", "theory.scheduling", "theory.schedulers", "theory.randomness"),
)
"""What a result depends on: results of other code are not taken for results."""


class Pool:
    """Runs that share `config` (with `flags` in place of its settings), trained by `workers`.

    `trained` counts the runs that were not found on disk.
    """

    def __init__(
        self,
        config: CompareConfig,
        setup: Setup,
        workers: Workers,
        flags: Mapping[str, Any] | None = None,
    ) -> None:
        self.config, self.folder, self.flags = config, config.out / RUNS, dict(flags or {})
        self.shared = shared_fingerprint(with_flags(config.run, self.flags), setup)
        self.trained = 0
        self._workers = workers

    def run(self, stage: str, runs: Sequence[Run]) -> list[Record]:
        """The records of the runs, in their order; what is on disk is not trained again."""
        done = {run: record for run in set(runs) if (record := self._kept(run)) is not None}
        pending = [run for run in dict.fromkeys(runs) if run not in done]
        jobs = [Job(run, self.place(run), self.config.keep_models, self.flags) for run in pending]
        bar = tqdm(total=len(done) + len(pending), initial=len(done), desc=stage, unit="run")
        with bar:
            for run, record in self._workers.train(jobs):
                write_json(self.place(run) / RESULT, {"shared": self.shared} | record)
                done[run] = record
                self.trained += 1
                bar.set_postfix_str(f"{run.label}{' failed' if record['failed'] else ''}")
                bar.update()
        # What the disk gives back is plain JSON: fresh records are to look the same.
        return [json.loads(json.dumps(done[run])) for run in runs]

    def place(self, run: Run) -> Path:
        """Where a run works and leaves its record."""
        return self.folder / f"{run.label}-{run.key(self.shared)}"

    def _kept(self, run: Run) -> Record | None:
        """The record on disk, if it is one of this run (and its model is there, if wanted)."""
        place = self.place(run)
        try:
            record = read_json(place / RESULT)
            same = record.pop("shared") == self.shared and Run.from_json(record["run"]) == run
        except (OSError, ValueError, KeyError, TypeError):
            return None
        wanted = self.config.keep_models and not record["failed"]
        return record if same and (not wanted or any(place.glob("*.safetensors"))) else None


def shared_fingerprint(config: RunConfig, setup: Setup) -> str:
    """Of everything but the fields of a `Run`: problem, settings, code, libraries, device type."""
    identity = {
        "problem": problem(setup, config),
        "settings": counting(config.training, free=COMPARISON),
        "code": code_digest(),
        "libraries": [torch.__version__, transformers.__version__],
        "device": config.training.device.type,
    }
    return digest(identity)


def code_digest() -> str:
    return digest_of_code(*CODE)
