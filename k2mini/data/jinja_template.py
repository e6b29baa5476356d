"""A model's own chat template: a Jinja program of somebody else's, which is run in a sandbox (extra: chat)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from k2mini.data.prompts import ANSWER, Message
from k2mini.errors import need_extra, short

MOST = 2**24  # characters that a template may write, items that its ranges may count


def compile_template(text: str, where: str, variables: Mapping[str, str]) -> Callable[[Sequence[Message], bool], str]:
    """The function that writes messages in a template, with what opens an answer where asked.

    The template finds what transformers gives it (`utils/chat_template_utils.py`): `messages`,
    `add_generation_prompt`, `tools` and `documents` (none), `raise_exception`, `strftime_now`, `tojson`, break and
    continue. What stands in its `{% generation %}` blocks comes between the two characters of `ANSWER`.

    Args:
        where: what an error begins with.
        variables: special tokens, such as `bos_token`.

    Raises ValueError where it is no template; so does the function where the template raises, reaches out of the
    sandbox, or writes or counts without an end.
    """
    try:
        import jinja2
        from jinja2 import nodes
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise need_extra("chat") from None

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_between"), [], [], body).set_lineno(line)

        def _between(self, caller: Callable[[], str]) -> str:
            return ANSWER[0] + caller() + ANSWER[1]

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            sizes = [len(value) if isinstance(value, (str, list, tuple)) else value for value in (left, right)]
            if (
                operator == "**"
                or not all(isinstance(size, (int, float)) for size in sizes)
                or sizes[0] * sizes[1] > MOST
            ):
                raise jinja2.exceptions.SecurityError(f"{short(left)} {operator} {short(right)} may be huge")
            return super().call_binop(context, operator, left, right)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
    sandbox.filters["tojson"] = tojson  # Jinja's own is for HTML
    sandbox.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": lambda *given, **fields: dict(*given, **fields),  # not the class, which has methods
    }
    try:
        template = sandbox.from_string(text)
    except (jinja2.TemplateError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise ValueError(f"{where}{line} is not a template that can be read: {_said(error)}") from None

    def write(messages: Sequence[Message], generation: bool) -> str:
        left = MOST

        def count(number: int) -> None:
            nonlocal left
            left -= number
            if left < 0:
                raise ValueError("it does not come to an end")

        def bounded(*given: int) -> range:
            numbers = range(*given)
            count(len(numbers))
            return numbers

        given = {"tools": None, "documents": None, "range": bounded, **variables}
        parts = []
        try:
            for part in template.generate(messages=messages, add_generation_prompt=generation, **given):
                count(len(part))
                parts.append(part)
        except Exception as error:  # whatever the expressions of a program raise that nobody vouches for
            raise ValueError(f"{where}: {_said(error)}") from None
        return "".join(parts)

    return write


def _said(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error))[:300] or type(error).__name__
