"""Processes of our own: each has its environment, answers what it is asked, ends with its parent.

`llm.compare` has one per device, `llm.benchmark` one per contender. Why no pool of a library serves
both, or either:

- The workers of a pool are alike. joblib and `concurrent.futures` give all the same environment and
  a call to whichever is free; here a process has a device or a number of threads of its own, set
  before it imports torch, and the benchmark asks a certain one for its next round, of which the
  trainer's state is in that process alone.
- joblib's loky ends a worker whose memory has grown by 300 MB since its first call and starts
  another in its place (`_MAX_MEMORY_LEAK_SIZE`). Training a model does that; the device would have
  to be found again, and the problem loaded again.
- A worker of loky goes on after its parent was killed, until its call is over, which may be hours
  of a device. (On POSIX it is given no sentinel of its parent.)
- loky has one executor for all of a process, which a call with other arguments ends: `theory.sweep`
  makes such calls.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from theory.cli import UserError

THREADS = tuple(f"{name}_NUM_THREADS" for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR"))


class Failed(RuntimeError):
    """What went wrong in the process: kind and first line; a note has the whole traceback."""


class Died(Failed):
    """The process ended without an answer: its status and its last words."""


class _Failure(NamedTuple):
    message: str
    mistake: bool
    """Of the user."""
    trace: str


class Process:
    """A process that runs `serve(connection, *arguments)`, a function that it can import.

    `serve` answers every message that it receives with one that it sends. It ends when it returns
    or when there is no more to receive (EOFError), and an exception of it is the last answer.
    `environment` holds from the first import on. What the process prints is kept for `Died`.
    """

    def __init__(
        self, serve: Callable[..., None], *arguments: Any, environment: Mapping[str, str]
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._log = tempfile.NamedTemporaryFile("r", errors="replace")  # noqa: SIM115  (`close`)
        self._process = context.Process(
            target=_run, args=(serve, theirs, self._log.name, arguments)
        )
        self._busy = True  # it imports, until its first answer
        with _changed(environment):
            self._process.start()
        theirs.close()

    def send(self, message: Any) -> None:
        """Ask; a process that is dead says so in its answer."""
        self._busy = True
        with suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(message)

    def answer(self) -> Any:
        """Wait for the answer.

        Raises:
            UserError: of the process.
            Failed: any other exception of the process, or it is dead.
        """
        try:
            answer = self.connection.recv()
        except (EOFError, ConnectionResetError):
            raise Died(self._last_words()) from None
        self._busy = False
        if not isinstance(answer, _Failure):
            return answer
        if answer.mistake:
            raise UserError(answer.message)
        error = Failed(answer.message)
        error.add_note(answer.trace)
        raise error

    def close(self) -> None:
        """End the process: at once if it owes an answer, else by itself."""
        if self._busy:
            self._process.kill()
        self.connection.close()
        self._process.join()
        self._log.close()

    def _last_words(self) -> str:
        self._process.join()
        self._busy = False
        lines = self._log.read().strip().splitlines() or ["no message"]
        return f"the process ended with status {self._process.exitcode}: {lines[-1]}"


def share(processes: Sequence[Process], messages: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """(message, answer) as the answers come; whoever is free is asked the next."""
    pending = iter(messages)
    asked: dict[Any, tuple[Process, Any]] = {}

    def ask(process: Process) -> None:
        for message in islice(pending, 1):
            asked[process.connection] = process, message
            process.send(message)

    for process in processes:
        ask(process)
    while asked:
        for connection in wait(list(asked)):
            process, message = asked.pop(connection)
            answer = process.answer()
            ask(process)
            yield message, answer


def limited(threads: int) -> dict[str, str]:
    """The environment in which numerical libraries use so many threads."""
    return dict.fromkeys(THREADS, str(threads))


@contextmanager
def _changed(environment: Mapping[str, str]) -> Iterator[None]:
    """A process takes the environment that its parent has when it starts."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# --- in the process


def _run(
    serve: Callable[..., None], connection: Connection, log: str, arguments: Sequence[Any]
) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    try:
        serve(connection, *arguments)
    except EOFError:
        pass  # nothing more is asked
    except Exception as error:
        mistake = isinstance(error, UserError)
        first = (str(error).strip().splitlines() or [""])[0]
        message = str(error) if mistake else f"{type(error).__name__}: {first}"
        connection.send(_Failure(message, mistake, traceback.format_exc()))


def _end_with_parent() -> None:
    """A killed parent cannot end its processes, and they would work on, or wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
