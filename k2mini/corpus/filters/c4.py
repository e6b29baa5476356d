"""What marks a web page that is no text: the rules of C4 (Raffel et al. 2020, section 2.2), made for Markdown."""

from __future__ import annotations

import re

from k2mini.corpus.document import Document
from k2mini.corpus.prose import is_structure, prose

_BROWSER = r"\b(?:enable|disable|turn|require|support|browser)"
_NOTICE = re.compile(
    rf"javascript.*{_BROWSER}|{_BROWSER}.*javascript|terms of use|(?:privacy|cookie) policy|uses? (?:of )?cookies",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"\w[^\w\s]*[.?!][\"'”’)\]]*(?=\s|$)")


def c4(
    document: Document, *, curly: float = 0.1, sentences: int = 3, notice: int = 30, longest_word: int = 1000
) -> str | None:
    """Take out lines that are notices, and reject documents with placeholder text, code or no sentences.

    Args:
        curly: curly brackets a word of running text.
        sentences: how many must end in a full stop, question mark or exclamation mark.
        notice: words that a line on JavaScript in a browser, cookies or terms of use has at most; it is taken out.
        longest_word: characters; a line with a longer word is taken out.

    It differs from C4, which would cost papers their structure: there one curly bracket rejects a page (here formulas
    and code have them), and lines with the word JavaScript or without terminal punctuation are dropped (here a line may
    be a paragraph, and headings, lists, tables, captions and lines of a PDF stay; sentences are asked of the whole).
    """
    if "lorem ipsum" in document.text.casefold():
        return "there is 'lorem ipsum'"
    lines = document.text.split("\n")
    kept = [line for line in lines if not _is_waste(line, notice, longest_word) or is_structure(line)]
    if len(kept) < len(lines):
        document.text = re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()
    text = prose(document.text)
    bare = re.sub(r"\$[^$\n]*\$|`[^`\n]*`", "", text)
    if (share := (bare.count("{") + bare.count("}")) / max(1, len(bare.split()))) > curly:
        return f"{share:.2g} curly brackets a word (most: {curly:g})"
    if (count := len(_SENTENCE.findall(text))) < sentences:
        return f"sentences: {count} (least: {sentences})"
    return None


def _is_waste(line: str, notice: int, longest_word: int) -> bool:
    found = line.split(None, notice)  # at most one part more
    too_long = len(line) > longest_word and max(map(len, line.split()), default=0) > longest_word
    return too_long or (len(found) <= notice and _NOTICE.search(line) is not None)
