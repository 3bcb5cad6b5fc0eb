"""The name that this package shares: another distribution is called `llm` as well.

pip puts both into one folder, where the later one's files replace the other's. That shows in the
folder above, which then holds the other's metadata; an editable install of ours lies elsewhere.
"""

from __future__ import annotations

import sys
from pathlib import Path


def check_alone(package: Path = Path(__file__).parent) -> None:
    """Raise ImportError, shown as one line, if the other `llm` is installed over this one."""
    for other in package.parent.glob("llm-*.*-info"):
        sys.tracebacklimit = 0
        raise ImportError(
            f"another package named llm is installed in this environment ({other}), and its files "
            "are mixed with those of joint-sft-dpo: use a fresh environment"
        )


check_alone()
