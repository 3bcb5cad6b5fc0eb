"""From a file to rows to train on: ours, ours on a second start, and TRL's preparation.

Every contender works in a process of its own that has imported what it needs before the clock
starts, one after the other, each with an empty cache (the second start with that of the first), and
as many processes as the benchmark has threads. Texts are generated: words of syllables with the
frequencies of a natural language, in rows of the lengths of `rows.LENGTHS`.
"""

from __future__ import annotations

import copy
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from llm.benchmark.rows import LENGTHS, Sources
from theory.cli import UserError
from theory.tasks import Task

SUITE = "data"
ROWS, QUICK_ROWS = 200_000, 200
MAX_LENGTH = 1024
SIDES = ("ours", "ours again", "trl")
FIELDS = {Task.DPO: ("prompt", "chosen", "rejected"), Task.SFT: ("prompt", "completion")}
_WORDS, _ZIPF, _SEED = 20_000, 1.1, 20241015
_VOCABULARY = 8000


def measure_data(sources: Sources, workers: int, *, quick: bool) -> list[dict[str, Any]]:
    """A record for each objective and side: rows, wall and CPU seconds, peak memory (MiB)."""
    records = []
    with TemporaryDirectory() as name:
        folder, rows = Path(name), QUICK_ROWS if quick else ROWS
        files = {
            task: getattr(sources, task.label)
            or _generate(folder / f"{task.label}.jsonl", task, rows)
            for task in Task
        }
        tokenizer = sources.tokenizer or _train_tokenizer(folder, files[Task.DPO])
        for task in Task:
            for side in SIDES:
                cache = folder / f"{task.label}-{side.split()[0]}"
                told = [side.split()[0], task.label, str(files[task]), tokenizer, str(workers)]
                records.append({"side": side, "task": task.label} | _run(told, cache))
                print(f"  {task.label} {side}: {records[-1]['seconds']:.1f} s", flush=True)
    return records


def _run(told: list[str], cache: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "llm.benchmark.data", *told],
        env=os.environ | {"HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"--suites data, {' '.join(told[:2])}: {last}")
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return record


def _generate(path: Path, task: Task, count: int) -> str:
    rng = np.random.default_rng([_SEED, task])
    syllables = np.array([a + b for a in "bdfgklmnprst" for b in "aeiou"])
    words = ["".join(rng.choice(syllables, rng.integers(1, 5))) for _ in range(_WORDS)]
    weights = 1.0 / np.arange(1, _WORDS + 1) ** _ZIPF
    bounds = np.cumsum(weights / weights.sum())
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            row = {}
            for field in FIELDS[task]:
                median, sigma = LENGTHS[f"{task.label} {field}_ids"]
                length = int(np.clip(rng.lognormal(np.log(median), sigma), 2, MAX_LENGTH // 2))
                chosen = np.minimum(np.searchsorted(bounds, rng.random(length)), _WORDS - 1)
                row[field] = " " * (field != "prompt") + " ".join(words[i] for i in chosen) + "."
            file.write(json.dumps(row) + "\n")
    return str(path)


def _train_tokenizer(folder: Path, source: str) -> str:
    """A byte-level BPE on the first rows, in a file."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(_first_texts(source), trainer)
    raw.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


def _first_texts(source: str) -> Iterator[str]:
    with open(source, encoding="utf-8") as file:
        for _, line in zip(range(2000), file, strict=False):
            yield from json.loads(line).values()


# --------------------------------------------------------------------------- in its own process


def _prepare_ours(task: Task, source: str, tokenizer: Any, workers: int) -> Callable[[], int]:
    from llm.benchmark.rows import ENCODERS
    from llm.data.sources import load_rows

    def prepare() -> int:
        options: dict[str, Any] = {"max_length": MAX_LENGTH, "name": task.label, "workers": workers}
        return len(ENCODERS[task](load_rows(source), tokenizer, **options).rows)

    return prepare


def _prepare_trl(task: Task, source: str, tokenizer: Any, workers: int) -> Callable[[], int]:
    import datasets
    import trl
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    kind = task.label.upper()
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = GPTNeoXConfig(vocab_size=len(tokenizer), num_attention_heads=2, **sizes)
    model = GPTNeoXForCausalLM(config)
    reference = {"ref_model": copy.deepcopy(model)} if task == Task.DPO else {}
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def prepare() -> int:
        arguments = getattr(trl, f"{kind}Config")(
            output_dir=str(Path(os.environ["HF_DATASETS_CACHE"]) / "trl"),
            max_length=MAX_LENGTH,
            dataset_num_proc=workers,
            report_to="none",
            use_cpu=True,
            bf16=False,
        )
        rows = datasets.load_dataset("json", data_files=source, split="train")
        make = getattr(trl, f"{kind}Trainer")
        trainer = make(
            model, args=arguments, train_dataset=rows, processing_class=tokenizer, **reference
        )
        return len(trainer.train_dataset)

    return prepare


def main(side: str, label: str, source: str, tokenizer_source: str, workers: str) -> None:
    from llm.benchmark.rows import load_tokenizer

    make = _prepare_trl if side == "trl" else _prepare_ours
    tokenizer = load_tokenizer(tokenizer_source)
    prepare = make(Task[label.upper()], source, tokenizer, int(workers))
    begin, before = time.perf_counter(), _cpu()
    rows = prepare()
    seconds = time.perf_counter() - begin
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    peak = max(resource.getrusage(each).ru_maxrss for each in who) / 1024  # of one process
    told = {"rows": rows, "seconds": seconds, "cpu_seconds": _cpu() - before, "peak_mib": peak}
    print(json.dumps(told))


def _cpu() -> float:
    times = os.times()
    return sum(times[:4])


if __name__ == "__main__":
    main(*sys.argv[1:])
