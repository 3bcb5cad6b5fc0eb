"""What the commands share: one clear line for a user's mistake, and a non-zero exit."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn


class UserError(ValueError):
    """A mistake of the user; its message is one line that says what would be right."""


def usable_cores() -> int:
    """Cores that this process may use: those it is bound to, where the system tells."""
    bound = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if bound else os.cpu_count() or 1


class _Help(argparse.HelpFormatter):
    """Shows the default of a flag that has one, unless its text does; lists as they are typed."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        without = default is None or default is False or default == argparse.SUPPRESS
        if without or "default" in text:
            return text
        values = default if isinstance(default, list | tuple) else [default]
        shown = " ".join(map(str, values)).replace("%", "%%")
        return f"{text} (default: {shown})"


class OneLineParser(argparse.ArgumentParser):
    """One line for an error, defaults in the help, no abbreviated flags; typos are guessed at."""

    def __init__(self, **options: Any) -> None:
        defaults: dict[str, Any] = {"formatter_class": _Help, "allow_abbrev": False}
        super().__init__(**defaults | options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = self.parse_known_args(args, namespace)
        self.refuse_unknown(unknown)
        return found

    def refuse_unknown(self, tokens: Iterable[str], others: Iterable[str] = ()) -> None:
        """End with one line if there are `tokens`; `others` are flags of another parser."""
        tokens = list(tokens)
        if tokens:
            known = {*self._option_string_actions, *others}
            self.error(f"unrecognized arguments: {' '.join(tokens)}{did_you_mean(tokens, known)}")


def did_you_mean(names: Iterable[str], known: Iterable[str]) -> str:
    """What to add to a message about unknown names: the known ones that they look like."""
    known = sorted(known)
    names = [name.split("=")[0] for name in names]
    close = [match for n in names for match in get_close_matches(n, known, n=1, cutoff=0.75)]
    return f"; did you mean {', '.join(dict.fromkeys(close))}?" if close else ""


def run_command(main: Callable[[], None], prog: str) -> NoReturn:
    """Run `main` and exit: 0 if it returns, 1 and one line for a `ValueError` or `OSError`."""
    try:
        main()
    except (ValueError, OSError) as error:
        line = " ".join(str(error).split())
        sys.exit(f"{prog}: error: {line}")
    except KeyboardInterrupt:
        sys.stderr.write(f"\n{prog}: interrupted\n")
        sys.exit(130)
    sys.exit(0)


def positive_int(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a positive integer")
    return int(text)


def positive_float(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def unit_float(text: str) -> float:
    """A number in [0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not a number in [0, 1]")
    return value


def check_output_dir(path: Path, flag: str = "--out") -> None:
    """Fail before the work starts if `path` cannot become a directory to write into."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{flag} {path} exists and is not a directory")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be created: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise UserError(f"{flag} {path} is not a directory that you may write into")
