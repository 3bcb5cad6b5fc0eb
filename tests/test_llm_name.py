"""llm.name: another distribution called `llm` in the same folder is told in one line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
THEIRS = "from .hookspecs import hookimpl\n"


def site(folder: Path, *, other: bool, replaced: bool) -> Path:
    """site-packages with ours and, where `other` says so, a stand-in for the other `llm`."""
    for name in ("llm", "theory"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "joint_sft_dpo-0.1.0.dist-info").mkdir()
    (folder / "llm_gguf-0.1.dist-info").mkdir()
    if other:
        (folder / "llm-0.27.1.dist-info").mkdir()
        (folder / "llm" / "hookspecs.py").write_text("hookimpl = None\n")
    if replaced:
        (folder / "llm" / "__init__.py").write_text(THEIRS)
    return folder


def imported(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=folder.parent, env=environment, capture_output=True, text=True, timeout=120
    )


def assert_told(done: subprocess.CompletedProcess[str], folder: Path) -> None:
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert "another package named llm is installed in this environment" in done.stderr
    assert str(folder / "llm-0.27.1.dist-info") in done.stderr


@pytest.mark.parametrize("replaced", [False, True], ids=["ours came last", "theirs came last"])
def test_both_orders_of_installation_are_told_in_one_line(replaced: bool, tmp_path: Path) -> None:
    folder = site(tmp_path / "site", other=True, replaced=replaced)
    assert_told(imported(folder, "-m", "llm.run", "--help"), folder)
    if not replaced:  # the other's own command
        assert_told(imported(folder, "-c", "from llm import get_model"), folder)


def test_alone_or_beside_an_editable_install_nothing_is_said(tmp_path: Path) -> None:
    folder = site(tmp_path / "site", other=False, replaced=False)
    theirs = tmp_path / "theirs"
    (theirs / "llm-0.27.1.dist-info").mkdir(parents=True)  # as beside an editable install of ours
    done = imported(folder, "-c", f"import sys; sys.path.append({str(theirs)!r}); import llm.flags")
    assert (done.returncode, done.stderr) == (0, "")
