"""The command line of `llm.benchmark`, validated before anything is measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llm.benchmark.data import SUITE
from llm.benchmark.plan import SUITES
from llm.benchmark.rows import Sources
from llm.benchmark.shapes import SHAPES, Shape
from theory.cli import OneLineParser, positive_float, positive_int

PROG = "python -m llm.benchmark"
ROUNDS = 3
CUDA_SECONDS = 450.0


@dataclass(frozen=True)
class BenchmarkConfig:
    """Everything that determines the measurement."""

    suites: tuple[str, ...]
    shape: Shape
    device: str
    rounds: int
    threads: int
    sources: Sources
    peak_tflops: float | None
    time_limit: float
    out: Path


def parse(argv: Sequence[str] | None) -> BenchmarkConfig:
    parser = _parser()
    given = parser.parse_args(argv)
    if given.quick and (given.shape or given.rounds):
        parser.error("--quick has a shape and a number of rounds of its own")
    name = "tiny" if given.quick else given.shape or "small"
    shape = SHAPES[name]
    if given.full_finetuning:
        if not shape.lora_rank:
            parser.error(f"--full_finetuning: all weights of shape {name} are trained already")
        shape = replace(shape, lora_rank=0, lora_targets=())
    shape = _with_batches(shape, given.sft_batch_size, given.dpo_batch_size)
    if given.tokenizer and not (given.sft_dataset or given.dpo_dataset):
        parser.error("--tokenizer is for --sft_dataset and --dpo_dataset")
    if not given.tokenizer and (given.sft_dataset or given.dpo_dataset):
        parser.error("--sft_dataset and --dpo_dataset need --tokenizer")
    cuda = given.device == "cuda"
    limit = given.time_limit or (CUDA_SECONDS if cuda else math.inf)
    suites = tuple(dict.fromkeys(given.suites))
    some = "" if set(suites) == set(SUITES) else "-" + "-".join(suites)
    return BenchmarkConfig(
        suites=suites,
        shape=shape,
        device=given.device,
        rounds=1 if given.quick else given.rounds or ROUNDS,
        threads=given.threads,
        sources=Sources(given.sft_dataset, given.dpo_dataset, given.tokenizer),
        peak_tflops=given.peak_tflops,
        time_limit=limit,
        out=Path(given.out or (f"runs/gpu/{name}{some}" if cuda else "runs/llm_benchmark")),
    )


def _with_batches(shape: Shape, sft: int | None, dpo: int | None) -> Shape:
    changes = {key: value for key, value in (("sft", sft), ("dpo", dpo)) if value is not None}
    return replace(
        shape, alone=replace(shape.alone, **changes), joint=replace(shape.joint, **changes)
    )


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog=PROG,
        description="Measure speed and memory of the joint trainer next to TRL's trainers and the "
        "paper's way of a step, in paired rounds; write JSON, a table and a figure.",
    )
    add = parser.add_argument
    add(
        "--suites",
        nargs="+",
        choices=(*SUITES, SUITE),
        default=list(SUITES),
        help=f"default: all but {SUITE}, which takes minutes of its own",
    )
    add("--shape", choices=list(SHAPES), help="the model (default: small)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--rounds", type=positive_int, help=f"measured rounds, after a first one ({ROUNDS})")
    add("--threads", type=positive_int, default=1, help="threads of every contender (default: 1)")
    add("--quick", action="store_true", help="a tiny model and one round, to see that it works")
    add("--sft_dataset", help="real demonstrations, as for llm.run (default: generated rows)")
    add("--dpo_dataset", help="real pairs, as for llm.run (default: generated rows)")
    add("--tokenizer", help="directory, hub id or tokenizer.json for the real rows")
    add("--sft_batch_size", type=positive_int, help="demonstrations of a step")
    add("--dpo_batch_size", type=positive_int, help="pairs of a step")
    add("--full_finetuning", action="store_true", help="no LoRA where the shape has it")
    add("--peak_tflops", type=positive_float, help="dense speed for the goodput (default: by name)")
    add(
        "--time_limit",
        type=positive_float,
        help=f"seconds after which no contender is started (CUDA: {CUDA_SECONDS:.0f}, else none)",
    )
    add(
        "--out",
        help="directory (default: runs/llm_benchmark; CUDA: runs/gpu/SHAPE-SUITES)",
    )
    return parser
