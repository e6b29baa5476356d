"""The filters, in their order, with their thresholds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from k2mini.corpus.document import Document
from k2mini.corpus.filters.boilerplate import boilerplate
from k2mini.corpus.filters.c4 import c4
from k2mini.corpus.filters.language import check_languages, language
from k2mini.corpus.filters.mojibake import mojibake
from k2mini.corpus.filters.quality import quality
from k2mini.corpus.filters.references import references
from k2mini.corpus.filters.repetition import repetition
from k2mini.corpus.filters.words import words

Filter = Callable[..., str | None]  # (document, *, thresholds): why it is rejected, or None; it may change the text
# What repairs and cuts comes before what counts; how many words are left is asked last (too many, also first)
_ORDER: tuple[Filter, ...] = (mojibake, boilerplate, references, language, repetition, quality, c4, words)
FILTERS: dict[str, Filter] = {function.__name__: function for function in _ORDER}


def choose(overrides: Sequence[str], without: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The filters to run, in their order, each with all of its thresholds.

    Args:
        overrides: such as `language.minimum=0.7`.
        without: filters that are not run.

    Raises ValueError naming what is unknown, or a value that is of another kind than the default.
    """
    if unknown := [name for name in without if name not in FILTERS]:
        raise ValueError(f"there is no filter {unknown[0]!r}; there are {', '.join(FILTERS)}")
    chosen = {
        name: dict(getattr(function, "__kwdefaults__", None) or {})
        for name, function in FILTERS.items()
        if name not in without
    }
    for override in overrides:
        where, _, value = override.partition("=")
        name, _, threshold = where.partition(".")
        if threshold not in chosen.get(name, {}):
            known = ", ".join(f"{one}.{key}" for one, thresholds in chosen.items() for key in thresholds)
            raise ValueError(f"{override!r} sets no threshold of a filter that is run; there are {known}")
        chosen[name][threshold] = _value(value, chosen[name][threshold], where)
        if where == "language.keep":
            check_languages(value)
    return chosen


def _value(text: str, default: Any, where: str) -> Any:
    try:
        value = {"true": True, "false": False}[text.lower()] if isinstance(default, bool) else type(default)(text)
    except (KeyError, ValueError):
        value = None
    if not (value if isinstance(value, str) else value is not None and 0 <= value < math.inf):
        kinds = {bool: "true or false", int: "a whole number from 0", float: "a number from 0", str: "a name"}
        raise ValueError(f"{where} is {text!r}, not {kinds[type(default)]}")
    return value


def clean(document: Document, chosen: dict[str, dict[str, Any]], counts: Counter[str]) -> str | None:
    """Run the chosen filters over a document, which they change.

    Args:
        counts: gets `NAME: changed` where a filter changed the text, `NAME: rejected` where it rejected the document.

    Returns: why the document is rejected, beginning with the filter's name; None where it is kept.
    """
    most = chosen.get("words", {}).get("maximum", math.inf)
    if len(document.text) > 2 * most and (reason := words(document, minimum=0, maximum=most)):
        counts["words: rejected"] += 1  # before the others take minutes and gigabytes over it
        return f"words: {reason}"
    for name, thresholds in chosen.items():
        before = document.text
        if reason := FILTERS[name](document, **thresholds):
            counts[f"{name}: rejected"] += 1
            return f"{name}: {reason}"
        if document.text != before:
            counts[f"{name}: changed"] += 1
    return None
