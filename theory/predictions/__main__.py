"""`python -m theory.predictions`: see the package."""

from theory.cli import run_command
from theory.predictions.experiment import PROG, main

run_command(main, PROG)
