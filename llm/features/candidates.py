"""The finite response sets: labels first, then samples of the model, then neighbours' completions.

A neighbour is an SFT prompt whose features are the most similar (cosine of the centred mean hidden
state). Its completion is a fluent answer to another question, where a sample is the model's own
answer to this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm.features.pooling import Pooled, pool
from llm.loss.objectives import Row
from llm.model.samples import sample_reference
from theory.tasks import Task

LABELS = {Task.DPO: ("chosen_ids", "rejected_ids"), Task.SFT: ("completion_ids",)}
"""The responses that the data name; they come first in every candidate set."""

Response = tuple[int, ...]


@dataclass(frozen=True)
class CandidateSet:
    """A prompt and its distinct candidate responses, the labels of the data first."""

    prompt: Response
    responses: tuple[Response, ...]


@dataclass(frozen=True)
class Extraction:
    """The candidate sets of one task and what each candidate is to the model, in one row each."""

    sets: tuple[CandidateSet, ...]
    pooled: Pooled

    @property
    def sizes(self) -> list[int]:
        return [len(candidates.responses) for candidates in self.sets]


@dataclass(frozen=True)
class Extractor:
    """A frozen model and how to run it."""

    model: Any
    eos_token_id: int
    pad_token_id: int
    batch_size: int
    seed: int

    def extract(
        self,
        rows: dict[Task, Sequence[Row]],
        *,
        candidates: int,
        samples: int,
        say: Callable[[str], None],
    ) -> dict[Task, Extraction]:
        """Candidate sets of up to `candidates` responses, `samples` of them drawn from the model.

        `rows` as encoded by `llm.data`. The rest are completions of the nearest SFT prompts. A
        response that repeats another of its set counts once; one that does not fit behind the
        prompt is cut at the model's positions.
        """
        similar = self._neighbours(rows, candidates)
        extractions = {}
        for task, task_rows in rows.items():
            drawn = self._samples(task_rows, samples)
            sets = []
            for i, row in enumerate(task_rows):
                own = [row[key] for key in LABELS[task]]
                others = (rows[Task.SFT][j]["completion_ids"] for j in similar[task][i])
                wanted = [*own, *drawn[i], *others]
                sets.append(self._candidate_set(row["prompt_ids"], wanted, candidates))
            kept = [c for c in sets if len(c.responses) >= 2]
            say(_line(task, kept, len(sets) - len(kept)))
            pooled = self._pool(_sequences(kept), f"features of {task.label}")
            extractions[task] = Extraction(tuple(kept), pooled)
        return extractions

    def _candidate_set(
        self, prompt: Sequence[int], wanted: Sequence[Sequence[int]], most: int
    ) -> CandidateSet:
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        room = None if positions is None else positions - len(prompt)
        cut = (tuple(response)[:room] for response in wanted)
        distinct = tuple(dict.fromkeys(response for response in cut if response))
        return CandidateSet(tuple(prompt), distinct[:most])

    def _neighbours(
        self, rows: dict[Task, Sequence[Row]], count: int
    ) -> dict[Task, NDArray[np.int64]]:
        """For each prompt the SFT rows with the most similar prompts, itself excluded."""
        pool_of = self._prompt_features(rows[Task.SFT], Task.SFT)
        centre = pool_of.mean(axis=0)
        keys = _unit(pool_of - centre)
        nearest = {}
        for task, task_rows in rows.items():
            queries = keys
            if task != Task.SFT:
                queries = _unit(self._prompt_features(task_rows, task) - centre)
            similarity = queries @ keys.T
            if task == Task.SFT:
                np.fill_diagonal(similarity, -np.inf)
            nearest[task] = np.argsort(-similarity, axis=1, kind="stable")[:, :count]
            if task == Task.SFT:
                nearest[task] = nearest[task][:, : len(keys) - 1]
        return nearest

    def _prompt_features(self, rows: Sequence[Row], task: Task) -> NDArray[np.float64]:
        prompts: list[Row] = [
            {"prompt_ids": [], "completion_ids": list(row["prompt_ids"])} for row in rows
        ]
        return self._pool(prompts, f"prompts of {task.label}").hidden

    def _samples(self, rows: Sequence[Row], each: int) -> list[list[list[int]]]:
        """`each` samples of the model for each row, temperature 1."""
        if each == 0:
            return [[] for _ in rows]
        pairs = [
            {"prompt_ids": row["prompt_ids"]}
            | dict.fromkeys(("chosen_ids", "rejected_ids"), max(_responses(row), key=len))
            for row in rows
        ]
        drawn = sample_reference(
            self.model,
            pairs,
            each * len(rows),
            eos_token_id=self.eos_token_id,
            pad_token_id=self.pad_token_id,
            batch_size=self.batch_size,
            seed=self.seed,
        ).rows
        # Sample number k is of row k modulo the number of rows.
        return [
            [drawn[i + k * len(rows)]["completion_ids"] for k in range(each)]
            for i in range(len(rows))
        ]

    def _pool(self, rows: Sequence[Row], name: str) -> Pooled:
        return pool(
            self.model,
            rows,
            batch_size=self.batch_size,
            pad_token_id=self.pad_token_id,
            name=name,
        )


def _sequences(sets: Sequence[CandidateSet]) -> list[Row]:
    return [
        {"prompt_ids": list(candidates.prompt), "completion_ids": list(response)}
        for candidates in sets
        for response in candidates.responses
    ]


def _responses(row: Row) -> Iterator[Sequence[int]]:
    return (ids for key, ids in row.items() if key.endswith("_ids") and key != "prompt_ids")


def _unit(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0.0, norms, 1.0)


def _line(task: Task, sets: Sequence[CandidateSet], dropped: int) -> str:
    sizes = [len(candidates.responses) for candidates in sets]
    line = (
        f"{task.label}: {len(sets)} prompts with {np.mean(sizes or [0]):.1f} candidates on average"
    )
    return line + (f", {dropped} dropped (fewer than two)" if dropped else "")
