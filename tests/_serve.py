"""What processes of the tests serve. They import this file, so that it imports next to nothing."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

FOR_EVER = 10_000.0


def serve(connection: Any, offset: int = 0) -> None:
    """A message is a command and what it needs."""
    print("something for nobody")
    while True:
        command, value = connection.recv()
        if command == "add":
            connection.send(value + offset)
        elif command == "environment":
            connection.send(os.environ.get(value))
        elif command == "raise":
            raise value
        elif command == "die":
            sys.stderr.write(f"first line\n{value}\n")
            sys.stderr.flush()
            os._exit(3)
        else:
            time.sleep(FOR_EVER)


def refuse(connection: Any) -> None:
    raise ValueError("not here")


def pace(connection: Any) -> None:
    """A contender of `llm.benchmark` that trains nothing."""
    connection.recv_bytes()  # a job; not unpickled, which would import torch
    connection.send({"before_mib": 1.0, "notes": {}})
    while b"finish" not in connection.recv_bytes():
        connection.send({"seconds": time.monotonic(), "steps": 2})
    connection.send({"peak_mib": 2.0})
