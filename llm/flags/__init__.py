"""The command line of `llm`: arguments, parser, and what is refused before a file is opened."""

import llm.name  # noqa: F401  (the other package's `llm/__init__.py` may have replaced ours)
