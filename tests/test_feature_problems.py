"""Problems from files: the policy with a base, the closed form, damaged files, the commands."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _asserts import EXACT, assert_one_line_error
from scipy.special import logit

from theory import gap_experiment, pareto_experiment
from theory.cli import UserError
from theory.feature_file import FeatureFile
from theory.metrics import sequential_limit
from theory.objectives import SoftmaxSFT
from theory.optima import problem_optima
from theory.problems import bernoulli_kl, make_problem
from theory.sweep import Batch
from theory.tasks import Task

SEEDS = pytest.mark.parametrize("seed", range(3))


def one_pair(p: float = 0.8, q: float = 0.3, a: float = 0.5, beta: float = 1.0) -> FeatureFile:
    """One prompt of each kind, two candidates, phi_0 - phi_1 = 1, pi_0(0) = a."""
    features, base = np.array([[[0.5], [-0.5]]]), np.log([[a, 1.0 - a]])
    return FeatureFile(
        dpo_features=features,
        dpo_log_base=base,
        preference=np.array([p]),
        sft_features=features,
        sft_log_base=base,
        sft_labels=np.array([[q, 1.0 - q]]),
        beta=beta,
        radius=10.0,
        step_scale=4.0,
        about={"model": "none"},
    )


def random_file(seed: int, prompts: int = 6, candidates: int = 4, dim: int = 3) -> FeatureFile:
    """Random features, base and labels; prompt i lacks its last i % (candidates - 1) candidates."""
    rng = np.random.default_rng(seed)
    missing = np.arange(candidates) >= candidates - (np.arange(prompts) % (candidates - 1))[:, None]
    features = np.where(missing[..., None], 0.0, rng.standard_normal((prompts, candidates, dim)))
    labels = np.where(missing, 0.0, rng.random((prompts, candidates)) + 0.1)
    return FeatureFile(
        dpo_features=features[::-1].copy(),
        dpo_log_base=np.where(missing, -np.inf, 0.0)[::-1].copy(),
        preference=rng.uniform(0.1, 0.9, prompts),
        sft_features=features,
        sft_log_base=np.where(missing, -np.inf, rng.standard_normal((prompts, candidates))),
        sft_labels=labels / labels.sum(axis=1, keepdims=True),
        beta=0.7,
        radius=20.0,
        step_scale=2.0,
    )


def sft_of(data: FeatureFile) -> SoftmaxSFT:
    return SoftmaxSFT(data.sft_features, data.sft_labels, data.sft_log_base)


def saved(data: FeatureFile, tmp_path: Path, name: str = "own.npz") -> str:
    data.save(tmp_path / name)
    return str(tmp_path / name)


# --- the policy with a base


@SEEDS
def test_a_uniform_base_is_no_base(seed: int) -> None:
    rng = np.random.default_rng(seed)
    features, labels = rng.standard_normal((5, 4, 3)), rng.dirichlet(np.ones(4), size=5)
    plain, based = SoftmaxSFT(features, labels), SoftmaxSFT(features, labels, np.zeros((5, 4)))
    theta = rng.standard_normal((7, 3))
    np.testing.assert_array_equal(plain.value(theta), based.value(theta))
    np.testing.assert_array_equal(plain.gradient(theta), based.gradient(theta))
    np.testing.assert_array_equal(plain.hessian(theta[0]), based.hessian(theta[0]))
    assert plain.constants(3.0) == based.constants(3.0)


@SEEDS
def test_a_constant_per_prompt_in_the_base_changes_nothing(seed: int) -> None:
    data = random_file(seed)
    shift = np.random.default_rng(seed).standard_normal((6, 1))
    moved = sft_of(replace(data, sft_log_base=data.sft_log_base + shift))
    theta = np.random.default_rng(seed).standard_normal((4, 3))
    np.testing.assert_allclose(moved.value(theta), sft_of(data).value(theta), rtol=0, atol=EXACT)
    gradients = moved.gradient(theta), sft_of(data).gradient(theta)
    np.testing.assert_allclose(*gradients, rtol=0, atol=EXACT)


# --- closed forms


@pytest.mark.parametrize(("p", "q", "a", "beta"), [(0.8, 0.3, 0.5, 1.0), (0.6, 0.9, 0.1, 0.3)])
def test_the_certified_minimisers_of_one_pair_are_the_closed_ones(
    p: float, q: float, a: float, beta: float, tmp_path: Path
) -> None:
    """theta_DPO* = logit(p) / beta, theta_SFT* = logit q - logit a.

    The latter because pi_theta(0) = sigmoid(theta + logit a).
    """
    problem = make_problem(saved(one_pair(p, q, a, beta), tmp_path))
    dpo, sft = problem_optima(problem).single
    # Gradients of 1e-13 over curvatures of 1e-2 and more.
    assert dpo.theta[0] == pytest.approx(logit(p) / beta, abs=1e-9)
    assert sft.theta[0] == pytest.approx(logit(q) - logit(a), abs=1e-9)
    for optimum, label in ((dpo, p), (sft, q)):
        assert optimum.interior
        assert optimum.value == pytest.approx(
            -label * np.log(label) - (1 - label) * np.log1p(-label)
        )


def test_the_sequential_limit_of_one_pair_is_bernoulli_s(tmp_path: Path) -> None:
    """Uniform pi_0, beta = 1: the problem `bernoulli`, G_Mix = KL(lam p + (1 - lam) q || q)."""
    optima = problem_optima(make_problem(saved(one_pair(0.8, 0.3), tmp_path)))
    limit, source = sequential_limit(optima, Task.SFT, 0.25)
    assert source == "certified"
    assert limit == pytest.approx(bernoulli_kl(0.25 * 0.8 + 0.75 * 0.3, 0.3), abs=1e-10)


# --- files


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    data = replace(random_file(0), about={"model": "m", "rows": 3})
    path = saved(data, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["own.npz"]
    again = FeatureFile.load(path)
    for field in fields(data):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(data, field.name))
    problem = make_problem(path)
    assert (problem.name, problem.radius, problem.step_scale) == (path, 20.0, 2.0)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF
    path.write_bytes(bytes(content))


def foreign(path: Path) -> None:
    with path.open("wb") as stream:
        np.savez(stream, weights=np.zeros(3))


def other_format(path: Path) -> None:
    with path.open("wb") as stream:
        np.savez(stream, format="features 99")


def pickled(path: Path) -> None:
    with path.open("wb") as stream:
        np.savez(stream, format=np.array([{}], dtype=object))


def without_a_field(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = {n: archive.read(n) for n in archive.namelist() if n != "preference.npy"}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def oversized(path: Path) -> None:
    """A few bytes that claim to be 7 TiB."""
    with zipfile.ZipFile(path) as archive:
        entries = {n: archive.read(n) for n in archive.namelist()}
    small, vast = b"(6,), }" + b" " * 11, b"(999999999999,), }"
    assert small in entries["preference.npy"]
    entries["preference.npy"] = entries["preference.npy"].replace(small, vast)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


DAMAGE: list[Callable[[Path], Any]] = [
    truncated, flipped, foreign, other_format, pickled, without_a_field,
    oversized, lambda path: path.write_bytes(b""), lambda path: path.write_text("phi"), Path.unlink,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_a_damaged_or_foreign_file_is_one_line(
    damage: Callable[[Path], Any], tmp_path: Path
) -> None:
    path = saved(random_file(0), tmp_path)
    damage(Path(path))
    with pytest.raises(UserError) as error:
        make_problem(path)
    assert_one_line_error(str(error.value), path)


def without_a_candidate(name: str, prompt: int) -> dict[str, Any]:
    base = getattr(random_file(0), name).copy()
    base[prompt, 1] = -np.inf
    return {name: base}


@pytest.mark.parametrize(
    ("data", "changes", "mention"),
    [
        (one_pair(), {"beta": -1.0}, "beta"),
        (one_pair(), {"radius": np.inf}, "radius"),
        (one_pair(), {"preference": np.array([1.0])}, "preference"),
        (one_pair(), {"sft_labels": np.array([[0.5, 0.4]])}, "sft_labels must sum to 1"),
        (one_pair(), {"sft_log_base": np.array([[0.0, np.nan]])}, "sft_log_base"),
        (one_pair(), {"sft_log_base": np.array([[0.0, -np.inf]])}, "fewer than two"),
        (one_pair(), {"dpo_features": np.full((1, 2, 1), np.nan)}, "dpo_features .* not finite"),
        (one_pair(), {"dpo_features": np.zeros((1, 2, 2))}, "different dimensions"),
        (one_pair(), {"dpo_features": np.zeros((1, 2))}, "dpo_features"),
        (one_pair(), {"sft_features": np.zeros((1, 2, 1)) + 1j}, "sft_features must hold real"),
        (random_file(0), without_a_candidate("sft_log_base", 0), "sft_labels has a response"),
        (random_file(0), without_a_candidate("dpo_log_base", -1), "chosen or rejected"),
    ],
)
def test_numbers_that_make_no_problem_are_refused(
    data: FeatureFile, changes: dict[str, Any], mention: str
) -> None:
    with pytest.raises(ValueError, match=mention) as error:
        replace(data, **changes)
    assert_one_line_error(str(error.value))


def test_parameters_of_a_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unexpected keyword argument 'dim'") as error:
        make_problem(saved(one_pair(), tmp_path), dim=3)
    assert_one_line_error(str(error.value))


# --- the commands


def test_the_gap_experiment_runs_on_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = saved(one_pair(), tmp_path), tmp_path / "out"
    flags = ["--lam", "0.5", "--steps", "1000", "--seeds", "3", "--jobs", "1"]
    gap_experiment.main(["--problem", path, *flags, "--out", str(out)])
    summary = json.loads((out / "summary.json").read_text())
    references = summary["references"][path]["lam"]["0.5"]
    limit = bernoulli_kl(0.55, 0.3)
    measured = references["sequential_limit"]["dpo_then_sft"]
    assert measured["mix_gap"] == pytest.approx(limit, abs=1e-10)
    gaps = {
        (row["algorithm"], row["split"]): row["mix_gap"]["mean"]
        for row in summary["final"]
        if row["iterate"] == "weighted" and row["variant"] in ("", "dpo_then_sft, split=0.5")
    }
    joint = min(value for (algorithm, _), value in gaps.items() if algorithm == "alright")
    assert joint < gaps["sequential", 0.5] / 3  # it stays near its limit, ALRIGHT falls below
    assert (out / "gap.png").stat().st_size > 0


def test_files_of_the_pareto_experiment_are_named_after_the_stem(tmp_path: Path) -> None:
    path, out = saved(one_pair(), tmp_path), tmp_path / "out"
    flags = ["--lam", "0.5", "--steps", "100", "--seeds", "2", "--jobs", "1", "--out", str(out)]
    pareto_experiment.main(["--problem", path, *flags])
    assert (out / "overview_own.png").is_file()


@pytest.mark.parametrize(
    ("problem", "mentions"),
    [
        ("missing.npz", ["missing.npz", "llm.features"]),
        ("rosenbrock", ["'rosenbrock'", "bernoulli", ".npz"]),
    ],
)
def test_a_wrong_problem_is_one_line(
    problem: str, mentions: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as info:
        gap_experiment.main(["--problem", problem])
    assert info.value.code == 2
    assert_one_line_error(capsys.readouterr().err.rstrip("\n"), "--problem", *mentions)


def test_two_files_of_the_same_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    paths = [saved(one_pair(), tmp_path), saved(one_pair(), tmp_path / "a")]
    with pytest.raises(UserError, match="same file name"):
        gap_experiment.main(["--problem", *paths])


def test_finished_batches_of_another_file_of_the_same_name_do_not_count(tmp_path: Path) -> None:
    batch = Batch(saved(one_pair(), tmp_path), "alright", (0.5,), (0,), 10)
    first = batch.key
    assert batch.key == first
    saved(one_pair(q=0.31), tmp_path)
    assert batch.key != first
