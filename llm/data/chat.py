"""Chat templates by name (`llm/recipes/chat`) or from a file, for a tokenizer that has none.

The named ones are what the model cards of their families give. An end mark that is no token of the
tokenizer is written as its EOS, so that generation stops.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jinja2

from llm.data.errors import DataError

FOLDER = Path(__file__).parents[1] / "recipes" / "chat"
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.jinja")))
_END_MARKS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")
_OWN_TAGS = re.compile(r"{%-?\s*(end)?generation\s*-?%}")
"""Tags of transformers that plain Jinja does not know."""


def set_chat_template(tokenizer: Any, template: str | None) -> None:
    """Give the tokenizer the template of that name, or in that file; None leaves its own.

    Raises:
        DataError: no such name or file; a file that is no Jinja template.
    """
    if template is None:
        return
    if template not in NAMES:
        tokenizer.chat_template = _read(Path(template).expanduser())
        return
    source = _read(FOLDER / f"{template}.jinja")
    vocabulary = tokenizer.get_vocab()
    for mark in _END_MARKS:
        if mark not in vocabulary:
            source = source.replace(f"'{mark}'", "eos_token")
    if tokenizer.bos_token is None:
        source = source.replace("{{ bos_token }}", "")
    tokenizer.chat_template = source


def _read(path: Path) -> str:
    try:
        source = path.read_text("utf-8").strip("\n")
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_OWN_TAGS.sub("", source))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"--chat_template {path} is no file that can be read, and none of {', '.join(NAMES)}"
        ) from error
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"--chat_template {path} line {error.lineno}: {error.message}") from error
    return source
