"""Processes of our own: their environment, their answers, and that none outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from _serve import serve

from llm.processes import Died, Failed, Process, limited, share
from theory.cli import UserError


@pytest.fixture
def process() -> Iterator[Process]:
    started = Process(serve, 10, environment={"TOLD": "here"} | limited(3))
    yield started
    started.close()


def ask(process: Process, *message: Any) -> Any:
    process.send(message)
    return process.answer()


def test_a_process_answers_in_an_environment_of_its_own(process: Process, capfd: Any) -> None:
    assert ask(process, "add", 1) == 11
    assert ask(process, "environment", "TOLD") == "here"
    assert ask(process, "environment", "MKL_NUM_THREADS") == "3"
    assert "TOLD" not in os.environ
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "raised", "told"),
    [
        (UserError("--lam is 2"), UserError, "--lam is 2"),
        (ValueError("no rows\nat all"), Failed, "ValueError: no rows"),
        (KeyError("x"), Failed, "KeyError: 'x'"),
    ],
)
def test_what_goes_wrong_there_is_raised_here(
    error: Exception, raised: type[Exception], told: str, process: Process
) -> None:
    with pytest.raises(raised) as caught:
        ask(process, "raise", error)
    assert str(caught.value) == told
    notes = getattr(caught.value, "__notes__", [])
    assert [note.startswith("Traceback") for note in notes] == [True] * (raised is Failed)


def test_a_process_that_dies_leaves_its_status_and_its_last_words(process: Process) -> None:
    told = "the process ended with status 3: out of everything"
    for _ in range(2):  # and goes on saying so
        with pytest.raises(Died, match=told):
            ask(process, "die", "out of everything")
        told = "the process ended with status 3"


def test_whoever_is_free_is_asked_next_and_answers_come_as_they_come(process: Process) -> None:
    other = Process(serve, 20, environment={})
    try:
        messages = [("add", number) for number in range(7)]
        answers = dict(share([process, other], messages))
        assert set(answers) == set(messages)
        assert all(answer - number in (10, 20) for (_, number), answer in answers.items())
        sleeping = share([process, other], [("sleep", 0), ("add", 1), ("add", 2)])
        assert [next(sleeping), next(sleeping)] == [(("add", 1), 21), (("add", 2), 22)]
    finally:
        other.close()  # and the fixture ends the one that sleeps


PARENT = """
import sys
sys.path.insert(0, sys.argv[1])
from _serve import serve
from llm.processes import Process
processes = [Process(serve, environment={}) for _ in range(2)]
for process in processes:
    process.send(("add", 1))
    process.answer()
processes[0].send(("sleep", 0))
print(*(process._process.pid for process in processes), flush=True)
processes[0].answer()
"""


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM])
def test_no_process_outlives_its_parent_busy_or_idle(by: signal.Signals) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(Path(__file__).parent)], stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert all(map(alive, pids))
    assert len(pids) == 2
    parent.send_signal(by)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 60.0
    while any(map(alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """A zombie, which only waits for its new parent to ask, is not."""
    state = Path(f"/proc/{pid}/stat")
    try:
        return state.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
