"""The commands' manners: one line per mistake, exit codes, values of flags, output directories."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from theory import cli
from theory.cli import (
    OneLineParser,
    UserError,
    check_output_dir,
    positive_int,
    run_command,
    unit_float,
)


def exit_of(error: BaseException | None) -> int | str | None:
    def main() -> None:
        if error is not None:
            raise error

    with pytest.raises(SystemExit) as info:
        run_command(main, "prog")
    return info.value.code


# --- run_command


def test_a_command_that_returns_exits_with_0() -> None:
    assert exit_of(None) == 0


@pytest.mark.parametrize("kind", [UserError, ValueError, OSError, FileNotFoundError])
def test_a_users_mistake_is_one_line(kind: type[Exception]) -> None:
    # A string as exit code: Python prints it to stderr and exits with 1.
    assert exit_of(kind("it\n  wants   a number")) == "prog: error: it wants a number"


def test_an_interrupt_exits_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_of(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "\nprog: interrupted\n"


def test_a_bug_keeps_its_traceback() -> None:
    def main() -> None:
        raise RuntimeError("not the user's fault")

    with pytest.raises(RuntimeError, match="not the user's fault"):
        run_command(main, "prog")


def test_the_exit_of_a_parser_passes_through() -> None:
    assert exit_of(SystemExit(2)) == 2


# --- values of flags


@given(st.integers(1, 10**12))
def test_positive_int_reads_what_int_writes(value: int) -> None:
    assert positive_int(str(value)) == value


@pytest.mark.parametrize("text", ["0", "-1", "1.0", "1e4", "", " ", "nan", "²", "1_000"])
def test_positive_int_refuses(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="not a positive integer"):
        positive_int(text)


@given(st.floats(0.0, 1.0))
def test_unit_float_reads_what_repr_writes(value: float) -> None:
    assert unit_float(repr(value)) == value


@pytest.mark.parametrize("text", ["-1e-9", "1.0000001", "nan", "inf", "-inf", "", "half"])
def test_unit_float_refuses(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"not a number in \[0, 1\]"):
        unit_float(text)


# --- the output directory


def test_an_output_directory_is_made_with_its_parents_and_may_exist(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    check_output_dir(path)
    assert path.is_dir()
    (path / "kept").touch()
    check_output_dir(path)
    assert (path / "kept").exists()


@pytest.mark.parametrize("below", ["", "sub", "sub/sub"])
def test_a_file_in_the_way_of_an_output_directory_is_the_users_mistake(
    below: str, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_text("kept")
    with pytest.raises(UserError, match=r"^--out ") as info:
        check_output_dir(path / below)
    assert "\n" not in str(info.value)
    assert str(path) in str(info.value)
    assert path.read_text() == "kept"


def test_a_directory_without_write_permission_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(UserError, match=r"^--out .* write"):
        check_output_dir(tmp_path)


def test_a_directory_that_cannot_be_made_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=r"^--out .* cannot be created: Permission denied$"):
        check_output_dir(tmp_path / "new")


# --- the parser


def test_the_help_shows_defaults_as_they_are_typed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    parser = OneLineParser(prog="prog")
    parser.add_argument("--seed", type=int, default=0, help="a number")
    parser.add_argument("--lams", nargs="+", default=[0.25, 0.5], help="weights")
    parser.add_argument("--rates", nargs="+", help="numbers; default: three of them")
    parser.add_argument("--out", help="a directory")
    parser.add_argument("--quick", action="store_true", help="in short")
    parser.add_argument("--share", default="100%", help="of 50%% and more")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    lines = {line.split("  ")[-1].strip() for line in capsys.readouterr().out.splitlines()}
    assert lines >= {
        "a number (default: 0)",
        "weights (default: 0.25 0.5)",
        "numbers; default: three of them",
        "a directory",
        "in short",
        "of 50% and more (default: 100%)",
    }
