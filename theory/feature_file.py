"""The file between a language model and the theory: candidates, features, labels, pi_0.

`python -m llm.features` writes it, `theory.problems.feature_problem` makes a problem of it. Every
prompt has a finite set of candidate responses; prompts with fewer than the others are padded with
candidates of log pi_0 = -inf.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from theory import checks
from theory.cli import UserError
from theory.records import write_file

Array = NDArray[np.float64]

FORMAT = "joint-sft-dpo features 1"
SUFFIX = ".npz"
DAMAGE = (OSError, ValueError, TypeError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error)
"""What reading a file that is damaged, or lies about its size, may raise."""


def is_feature_file(problem: str) -> bool:
    """Whether the name of a problem is the path of such a file (it may be missing)."""
    return problem.endswith(SUFFIX)


@dataclass(frozen=True, eq=False)
class FeatureFile:
    """n preference prompts and m SFT prompts with up to K candidates, features in R^d, float64.

    Raises:
        ValueError: arrays that do not belong together, are not finite, or labels on candidates
            that do not exist.
    """

    dpo_features: Array
    """phi (n, K, d); candidate 0 is the chosen response and 1 the rejected one."""
    dpo_log_base: Array
    """log pi_0(y|x) (n, K), -inf where there is no candidate."""
    preference: Array
    """(n,), in (0, 1): the probability that candidate 0 is preferred to candidate 1."""
    sft_features: Array
    """phi (m, K, d); candidate 0 is the prompt's own completion."""
    sft_log_base: Array
    """log pi_0(y|x) (m, K)."""
    sft_labels: Array
    """q(y|x) (m, K): the probability that y is demonstrated; rows sum to 1."""
    beta: float
    """Temperature of DPO."""
    radius: float
    """Of the ball that theta stays in."""
    step_scale: float
    """The default c of alpha_t = c / sqrt(t)."""
    about: dict[str, Any] = field(default_factory=dict)
    """Where the numbers come from: model, data, flags."""

    def __post_init__(self) -> None:
        dpo, dpo_base = _candidates("dpo", self.dpo_features, self.dpo_log_base)
        sft, sft_base = _candidates("sft", self.sft_features, self.sft_log_base)
        if dpo.shape[2] != sft.shape[2]:
            raise ValueError("dpo_features and sft_features have different dimensions")
        if not np.all(dpo_base[:, :2] > -np.inf):
            raise ValueError("a chosen or rejected response is no candidate (dpo_log_base is -inf)")
        preference = checks.probabilities("preference", self.preference, pairs=len(dpo))
        if not np.all((preference > 0.0) & (preference < 1.0)):
            raise ValueError("preference must lie strictly between 0 and 1")
        labels = checks.labels("sft_", self.sft_labels, sft_base)
        checks.assign(self, dpo_features=dpo, dpo_log_base=dpo_base, preference=preference)
        checks.assign(self, sft_features=sft, sft_log_base=sft_base, sft_labels=labels)
        for name in ("beta", "radius", "step_scale"):
            checks.assign(self, **{name: checks.number(name, getattr(self, name))})

    @property
    def dim(self) -> int:
        return int(self.sft_features.shape[2])

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "about"}
        about = json.dumps(self.about, sort_keys=True)

        def write(temporary: Path) -> None:
            with temporary.open("wb") as stream:
                np.savez_compressed(stream, format=FORMAT, about=about, **arrays)

        write_file(path, write)

    @classmethod
    def load(cls, path: str | Path) -> FeatureFile:
        """Read and check a file.

        Raises:
            UserError: one line, for a file that is missing, damaged, or something else.
        """
        if not Path(path).is_file():
            raise UserError(f"there is no file {path}: write one with python -m llm.features")
        try:
            with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as archive:
                if str(archive["format"]) != FORMAT:
                    _refuse(path, f"its format is {str(archive['format'])[:40]!r}")
                found: dict[str, Any] = {f.name: archive[f.name] for f in fields(cls)}
            return cls(**found | {"about": json.loads(str(found["about"]))})
        except UserError:
            raise
        except KeyError as error:
            _refuse(path, str(error.args[0]))
        except DAMAGE as error:
            _refuse(path, str(error))

    @staticmethod
    def digest(path: str | Path) -> str:
        """sha256 of the bytes, so that results of another file of this name are not reused."""
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _refuse(path: str | Path, reason: str) -> NoReturn:
    raise UserError(f"{path} is no whole file of python -m llm.features: {reason}")


def _candidates(task: str, features: Array, log_base: Array) -> tuple[Array, Array]:
    phi, base = checks.candidates(f"{task}_", features, log_base)
    if not np.all((base > -np.inf).sum(axis=1) >= 2):
        raise ValueError(f"a {task} prompt has fewer than two candidates")
    return phi, base
