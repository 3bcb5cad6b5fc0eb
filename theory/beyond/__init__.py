"""The experiments of `python -m theory.beyond_experiment`, one module each."""
