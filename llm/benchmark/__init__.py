"""Speed and memory of the trainer next to TRL and to the paper's way: `python -m llm.benchmark`."""
