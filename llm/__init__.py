"""Joint SFT and DPO post-training of causal language models (arXiv 2410.15483)."""

import logging

import llm.name  # noqa: F401  (first: it says why other imports would fail)

# Where bitsandbytes (QLoRA) is installed, importing peft on a machine without a GPU would print a
# line about a kernel that it misses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
