"""A model's own chat template: a Jinja program of somebody else's, which is run in a sandbox (extra: chat)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from k2mini.data.prompts import ANSWER, Message
from k2mini.errors import need_extra

# A block whose text a filter gets is one that Jinja has: `generation` is the filter.
_BLOCKS = [(r"(\{%[-+]?\s*)generation(?=\s*[-+]?%\})", r"\1filter generation")]
_BLOCKS += [(r"(\{%[-+]?\s*)endgeneration(?=\s*[-+]?%\})", r"\1endfilter")]


def compile_template(text: str, where: str, variables: Mapping[str, str]) -> Callable[[Sequence[Message], bool], str]:
    """The function that writes messages in a template, with what opens an answer where asked.

    The template finds what transformers gives it (`utils/chat_template_utils.py`). What stands in its
    `{% generation %}` blocks comes between the two characters of `ANSWER`. The sandbox keeps it from
    files, programs and Python's own objects; nothing bounds its time and memory but that a range has 100,000 numbers.

    Args:
        where: what an error begins with.
        variables: special tokens, such as `bos_token`.

    Raises ValueError where it is no template; so does the function where the template raises or reaches out of the
    sandbox.
    """
    try:
        import jinja2
    except ImportError:
        raise need_extra("chat") from None

    def failed(error: Exception, line: str = "") -> ValueError:
        return ValueError(f"{where}{line}: {' '.join(str(error).split())[:300] or type(error).__name__}")

    for tag, block in _BLOCKS:
        text = re.sub(tag, block, text)
    try:
        template = _sandbox().from_string(text)
    except (jinja2.TemplateError, RecursionError) as error:
        raise failed(error, f", line {getattr(error, 'lineno', '?')}") from None

    def write(messages: Sequence[Message], generation: bool) -> str:
        given = {"add_generation_prompt": generation, "tools": None, "documents": None}
        try:
            return template.render(messages=messages, **given, **variables)
        except Exception as error:  # whatever the expressions of a program raise that nobody vouches for
            raise failed(error) from None

    return write


def _sandbox() -> Any:
    """Jinja's environment with what transformers adds to it."""
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    loops = ["jinja2.ext.loopcontrols"]  # break and continue
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=loops)
    sandbox.filters |= {"tojson": tojson, "generation": lambda said: f"{ANSWER[0]}{said}{ANSWER[1]}"}
    sandbox.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": lambda *given, **fields: dict(*given, **fields),  # not the class, which has methods
    }
    return sandbox
