"""The command line of a validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from theory.cli import OneLineParser, UserError, positive_float, positive_int

PROG = "python -m llm.validate"
STUDIES = ("curvature", "switches", "clipping", "lockout")


@dataclass(frozen=True)
class ValidateConfig:
    """One validated command line."""

    comparison: Path
    out: Path
    studies: tuple[str, ...]
    study_seeds: int
    study_steps: int
    clip_norm: float | None
    periods: tuple[int, ...]
    probe_rows: int
    krylov_steps: int
    jobs: int | None
    """Processes; None: one per device or core of the machine."""
    compare_argv: tuple[str, ...] | None
    """Flags of a comparison to run first; None: read one."""

    def to_json(self) -> dict[str, Any]:
        paths = {"comparison": str(self.comparison), "out": str(self.out)}
        record = asdict(self) | paths
        del record["jobs"]  # the machine's own
        return record


def parse(argv: Sequence[str]) -> ValidateConfig:
    """Read our own flags; with --run, all others are for llm.compare, which checks them."""
    own, rest = _parser().parse_known_args(argv)
    if rest and not own.run:
        raise UserError(f"{rest[0]} is not used without --run (a finished comparison is read)")
    if own.study_seeds < 2:
        raise UserError("--study_seeds 1 gives no intervals: at least 2")
    studies = () if own.studies == ["none"] else tuple(dict.fromkeys(own.studies))
    if "none" in studies:
        raise UserError("--studies none cannot be combined with a study")
    jobs = ("--jobs", str(own.jobs)) if own.jobs else ()
    return ValidateConfig(
        comparison=Path(own.comparison),
        out=Path(own.out),
        studies=studies,
        study_seeds=own.study_seeds,
        study_steps=own.study_steps,
        clip_norm=own.clip_norm,
        periods=tuple(sorted(set(own.periods))),
        probe_rows=own.probe_rows,
        krylov_steps=own.krylov_steps,
        jobs=own.jobs,
        compare_argv=(*rest, *jobs) if own.run else None,
    )


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog=PROG,
        description="Hold a comparison of language models against theory.",
    )
    add = parser.add_argument
    add("--comparison", default="runs/compare", help="directory of llm.compare's results")
    add("--run", action="store_true", help="run that comparison first; takes its flags")
    add("--out", default="runs/validate", help="directory for the results")
    add(
        "--studies",
        nargs="+",
        choices=[*STUDIES, "none"],
        default=list(STUDIES),
        help="what to measure beyond the comparison",
    )
    add("--study_seeds", type=positive_int, default=4, help="runs of each setting of a study")
    add("--study_steps", type=positive_int, default=200, help="steps of a run of a study")
    add(
        "--clip_norm",
        type=positive_float,
        help="max_grad_norm of the clipping study; default: the smaller of the mean gradient norms",
    )
    add(
        "--periods",
        nargs="+",
        type=positive_int,
        default=[1, 10, 50],
        help="refresh_every of the lock-out study",
    )
    add("--probe_rows", type=positive_int, default=96, help="rows of each set for curvature")
    add("--jobs", type=positive_int, help="processes; default: one per CUDA device, else per core")
    add("--krylov_steps", type=positive_int, default=14, help="Hessian products of a solve")
    return parser
