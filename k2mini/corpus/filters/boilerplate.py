"""Headers and footers: lines that come again from page to page, alike or with a page number that counts up."""

from __future__ import annotations

import re
from collections import defaultdict
from itertools import pairwise

from k2mini.corpus.document import Document
from k2mini.corpus.prose import is_structure

_GONE = "\0"
_NO_PAGES = re.compile(r"\.(?:md|x?html?|n?xml)(?:\.gz)?$", re.IGNORECASE)
_PARTS = re.compile(  # of a text, which count up as pages do
    r"(?:algorithm|answer|appendix|axiom|case|chapter|corollary|definition|example|exercise|fig\.|figure|lemma|lesson"
    r"|part|plate|problem|proposition|question|remark|section|solution|step|table|theorem|unit) ?(?:0|[a-z]\b)|proof\b"
)


def boilerplate(document: Document, *, repeats: int = 3, most_words: int = 20, apart: int = 100) -> None:
    """Take out lines of at most `most_words` words that come `repeats` times, `apart` words or more after one another.

    They are spread as pages are: over half of the text or more, no gap longer than three in the mean. Of their numbers
    one alone may change, and counts up; a line that never changes has three words or more. Headings, lists, tables and
    the first line stay, and so do a text's own parts, such as Chapter 3 or Theorem 2, and Markdown, HTML and XML, which
    have no pages. None is rejected.
    """
    if _NO_PAGES.search(document.source):
        return
    lines, before = document.text.split("\n"), 0
    alike: dict[str, list[tuple[int, int]]] = defaultdict(list)  # (line, words before it)
    for place, line in enumerate(lines):
        count = len(line.split())
        if 0 < count <= most_words and len(line) < 400:
            alike[re.sub(r"\d+", "0", line).strip().casefold()].append((place, before))
        before += count
    for pattern, found in alike.items():
        if len(found) < repeats or is_structure(pattern) or pattern.startswith(("- ", "* ")) or _PARTS.match(pattern):
            continue
        gaps = [later - earlier for (_, earlier), (_, later) in pairwise(found)]
        if min(gaps) < apart or max(gaps) > 3 * sum(gaps) / len(gaps) or sum(gaps) < before / 2:
            continue
        numbers = [[int(number) for number in re.findall(r"\d+", lines[place])] for place, _ in found]
        changing = [column for column in zip(*numbers, strict=True) if len({*column}) > 1]
        counts_up = len(changing) == 1 and all(earlier < later for earlier, later in pairwise(changing[0]))
        if counts_up or (not changing and pattern.count(" ") >= 2):
            for place, _ in found:
                lines[place] = _GONE if place else lines[0]
    if _GONE in lines:
        # a sentence that went on over the page's end goes on
        text = re.sub(rf"(?<=[\w,;-])\s*(?:{_GONE}\s*)+(?=[a-z])", "\n", "\n".join(lines))
        document.text = re.sub(r"\n{3,}", "\n\n", re.sub(rf"{_GONE}\n?", "", text)).strip()
