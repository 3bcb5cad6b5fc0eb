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

from theory.cli import UserError
from theory.records import write_file

Array = NDArray[np.float64]

FORMAT = "joint-sft-dpo features 1"
SUFFIX = ".npz"


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
        _check_prompts("dpo", self.dpo_features, self.dpo_log_base)
        _check_prompts("sft", self.sft_features, self.sft_log_base)
        if self.dpo_features.shape[2] != self.dim:
            raise ValueError("the two sets of features have different dimensions")
        if not np.all(self.dpo_log_base[:, :2] > -np.inf):
            raise ValueError("a chosen or rejected response is no candidate")
        pairs, preferred = len(self.dpo_features), self.preference
        if preferred.shape != (pairs,) or not np.all((preferred > 0.0) & (preferred < 1.0)):
            raise ValueError(f"preference must hold {pairs} probabilities in (0, 1)")
        labels = self.sft_labels
        if labels.shape != self.sft_log_base.shape or not np.all(labels >= 0.0):
            raise ValueError("sft_labels must hold a probability for each candidate")
        if not np.allclose(labels.sum(axis=1), 1.0, rtol=0.0, atol=1e-9):
            raise ValueError("the rows of sft_labels must sum to 1")
        if np.any(labels[self.sft_log_base == -np.inf] > 0.0):
            raise ValueError("a demonstrated response is no candidate")
        for name in ("beta", "radius", "step_scale"):
            if not 0.0 < getattr(self, name) < np.inf:
                raise ValueError(f"{name} must be positive and finite")

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
                arrays = {f.name: archive[f.name] for f in fields(cls)}
            return cls(**{name: _field(name, value) for name, value in arrays.items()})
        except UserError:
            raise
        except KeyError as error:
            _refuse(path, str(error.args[0]))
        except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            _refuse(path, str(error))

    @staticmethod
    def digest(path: str | Path) -> str:
        """sha256 of the bytes, so that results of another file of this name are not reused."""
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _refuse(path: str | Path, reason: str) -> NoReturn:
    raise UserError(f"{path} is no whole file of python -m llm.features: {reason}")


def _field(name: str, value: NDArray[Any]) -> Any:
    if name == "about":
        return json.loads(str(value))
    if name in ("beta", "radius", "step_scale"):
        return float(value)
    return np.ascontiguousarray(value, dtype=np.float64)


def _check_prompts(name: str, features: Array, log_base: Array) -> None:
    if features.ndim != 3 or features.shape[1] < 2 or 0 in features.shape:
        raise ValueError(f"{name}_features must be (prompts, candidates, dimensions)")
    if log_base.shape != features.shape[:2]:
        raise ValueError(f"{name}_log_base must have a value for each candidate")
    if not np.all(np.isfinite(features)):
        raise ValueError(f"{name}_features are not finite")
    if np.any(np.isnan(log_base)) or np.any(log_base == np.inf):
        raise ValueError(f"{name}_log_base must be numbers, or -inf for no candidate")
    if not np.all((log_base > -np.inf).sum(axis=1) >= 2):
        raise ValueError(f"a {name} prompt has fewer than two candidates")
