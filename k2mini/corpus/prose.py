"""The running text of a Markdown document: what the rules of the filters count."""

from __future__ import annotations

import re
from functools import lru_cache

_NAMES = r"(?:\d+\.? *)?(?:list of references|references(?: cited)?|bibliography|(?:literature|works) cited)[ :]*$"
_SECTION = re.compile(rf"^(#{{1,6}}) *{_NAMES}", re.MULTILINE | re.IGNORECASE)
_BARE = re.compile(rf"^{_NAMES}", re.MULTILINE | re.IGNORECASE)  # as the text of a PDF has it
# Fenced code, formulas, headings, rows of tables, and lines without a letter or digit (rules, underlines).
_STRUCTURE = re.compile(
    r"^(?:[ \t]*(?:(```|~~~).*?^[ \t]*\1[^\n]*$|\$\$.*?\$\$[^\n]*$|#{1,6}[ \t][^\n]*$|\|[^\n]*$)|[^\w\n]+$)",
    re.MULTILINE | re.DOTALL,
)
PARAGRAPHS = re.compile(r"\n[ \t]*\n\s*")


def without_references(text: str) -> str:
    """The text without its lists of references.

    One begins with a heading (References, Bibliography, Literature cited, Works cited) and ends before the next of its
    level or above. The same word alone in a line begins one too, in the second half of a text, up to the next heading.
    """
    place = 0
    while found := _SECTION.search(text, place):
        text, place = _cut(text, found, len(found[1])), found.start()
    bare = [found for found in _BARE.finditer(text) if found.start() > len(text) / 2]
    return _cut(text, bare[0], 6) if bare else text


def _cut(text: str, found: re.Match[str], level: int) -> str:
    after = re.compile(rf"^#{{1,{level}}}[ \t]", re.MULTILINE).search(text, found.end())
    return text[: found.start()] + (text[after.start() :] if after else "")


@lru_cache(maxsize=1)  # five filters ask for that of the same text
def prose(text: str) -> str:
    """Paragraphs and lists, without headings, tables, formulas, code and references."""
    return _STRUCTURE.sub("", without_references(text)).strip()


def is_structure(line: str) -> bool:
    """Whether a line is a heading, a formula's or table's, or a rule."""
    return line.lstrip().startswith(("$", "```")) or _STRUCTURE.fullmatch(line) is not None
