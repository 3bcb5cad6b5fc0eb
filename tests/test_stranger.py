"""An algorithm that the house does not know, a stranger's or a new one, in every command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from _stranger import ALGORITHM, importable, write_package
from _tiny import own_sources, short_run

from llm.compare.__main__ import main as compare
from llm.report.__main__ import main as report
from llm.run import main as run
from llm.validate.__main__ import main as validate
from theory.convergence_experiment import main as convergence
from theory.gap_experiment import main as gap
from theory.pareto_experiment import main as pareto
from theory.registry import resolve
from theory.schedulers import REGISTRY
from theory.sweep import FINISHED

pytestmark = pytest.mark.usefixtures("temporary_datasets_cache", "same_threads")

NEW = "turns"


@pytest.fixture(autouse=True)
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    write_package(tmp_path)
    with importable(tmp_path):
        monkeypatch.setattr("llm.data.embedded.BASE_STEPS", 4)
        kind = type("Turns", (resolve(ALGORITHM),), {"name": NEW, "label": "Turns"})
        monkeypatch.setitem(REGISTRY, NEW, kind)
        yield


THEORY = {
    "gap": (gap, "--steps 40 --lam 0.5"),
    "pareto": (pareto, "--steps 100 --lam 0.25 0.75"),
    "convergence": (convergence, "--steps 10000 --lam 0.5"),
}


@pytest.mark.parametrize("algo", [ALGORITHM, NEW])
@pytest.mark.parametrize("name", THEORY)
def test_theory_runs_it_next_to_its_own(
    name: str, algo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stranger's in two processes and with an option; the parts of a killed sweep serve again."""
    main, flags = THEORY[name]
    foreign = algo == ALGORITHM
    own = ["--jobs", "2", "--every", "4"] if foreign else ["--jobs", "1"]
    argv = [*flags.split(), "--problem", "quadratic", "--seeds", "2", *own, "--algo", "mix", algo]
    tables = []
    for out in (tmp_path / "straight", tmp_path / "again"):
        main([*argv, "--out", str(out)])
        tables.append(pd.read_parquet(out / "results.parquet"))
        config = json.loads((out / "config.json").read_text())
        assert config["options"] == ([["every", 4]] if foreign else [])
    assert "urns" in capsys.readouterr().out  # some tables have labels, some names
    pd.testing.assert_frame_equal(*tables)
    assert not (tmp_path / "again" / FINISHED).exists()
    assert (tables[0].get("algorithm", tables[0].get("line")) == algo).any()


@pytest.mark.parametrize("algo", [ALGORITHM, NEW])
def test_a_language_model_trains_under_it_and_resumes_bit_for_bit(
    algo: str, tmp_path: Path
) -> None:
    option = ["--every", "4", "--damping", "0.5"] if algo == ALGORITHM else []
    flags = ["--algo", algo, *option, "--optima", "none", "--kl_rows", "0", "--save_steps", "4"]
    out = tmp_path / "run"
    command = short_run(out, *flags, "--save_strategy", "steps")
    run(command)
    weights = (out / "model.safetensors").read_bytes()
    schedule = json.loads((out / "schedule.json").read_text())
    assert schedule["schedule"]["memory"]["taken"] == schedule_steps(schedule)
    assert schedule["decisions"][0][0] > 0.0  # DPO first, then SFT
    for name in ("model.safetensors", "joint_summary.json", "schedule.json"):
        (out / name).unlink()
    shutil.rmtree(out / "checkpoint-8")
    run([*command, "--resume_from_checkpoint", "true"])
    assert (out / "model.safetensors").read_bytes() == weights
    assert json.loads((out / "schedule.json").read_text())["decisions"] == schedule["decisions"]
    report([str(out)])
    assert "Turns" in (out / "report.html").read_text(encoding="utf-8")


def schedule_steps(schedule: dict[str, dict[str, int]]) -> list[int]:
    return [schedule["steps_taken"]["dpo"], schedule["steps_taken"]["sft"]]


@pytest.mark.parametrize(("algo", "jobs"), [(ALGORITHM, "2"), (NEW, "1")])
def test_it_is_compared_validated_and_reported(
    algo: str, jobs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    option = ["--every", "2"] if algo == ALGORITHM else []
    sources = [f"--{name}={source}" for name, source in own_sources(tmp_path).items()]
    shared = ["--eval_strategy", "steps", "--kl_rows", "0", "--beta", "0.5", "--seeds", "2"]
    steps = ["--max_steps", "8", "--eval_steps", "4", "--logging_steps", "4", "--warmup_steps", "0"]
    grid = ["--lams", "0.25", "0.5", "--learning_rates", "1e-2", "--algos", "mix", algo]
    out = tmp_path / "compare"
    argv = [*sources, *shared, *steps, *grid, *option, "--use_cpu", "true", "--jobs", jobs]
    argv += ["--disable_tqdm", "true", "--out", str(out)]
    compare(argv)
    results = pd.read_parquet(out / "results.parquet")
    theirs = results[results["algorithm"] == algo]
    assert len(theirs) == 2 * 2  # budgets x seeds: it has no lam
    assert (theirs["failed"] == "").all()
    assert set(theirs["p_dpo"]) <= ({0.5} if option else {3 / 8, 1 / 3, 0.4, 0.5})
    compare(argv)
    again = json.loads((out / "summary.json").read_text())
    assert again["session"]["runs_trained"] == 0
    pd.testing.assert_frame_equal(pd.read_parquet(out / "results.parquet"), results)
    assert "Turns" in (out / "table.md").read_text()
    validate(["--comparison", str(out), "--studies", "none", "--out", str(tmp_path / "validate")])
    assert (tmp_path / "validate" / "table.md").is_file()
    report([str(out)])
    assert "Turns" in (out / "report.html").read_text(encoding="utf-8")
