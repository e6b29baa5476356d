"""Headers and footers: lines that come again from page to page, alike or with a page number that counts up."""

from __future__ import annotations

import re
from collections import defaultdict
from itertools import pairwise

from k2mini.corpus.document import Document
from k2mini.corpus.prose import is_structure

_GONE = "\0"


def boilerplate(document: Document, *, repeats: int = 3, most_words: int = 20, apart: int = 100) -> None:
    """Take out lines of at most `most_words` that come `repeats` times, each `apart` words or more after the last.

    Of their numbers one alone may change, and it has to count up. A line that never changes has three words or more, so
    that `Returns` of a manual stays. Headings, lists, tables and the first line stay. None is rejected.
    """
    lines, before = document.text.split("\n"), 0
    alike: dict[str, list[tuple[int, int, list[int]]]] = defaultdict(list)  # (line, words before it, its numbers)
    for place, line in enumerate(lines):
        count = len(line.split())
        if 0 < count <= most_words and place and not (is_structure(line) or line.lstrip().startswith(("- ", "* "))):
            numbers = [int(number) for number in re.findall(r"\d+", line)]
            alike[re.sub(r"\d+", "0", line).strip().casefold()].append((place, before, numbers))
        before += count
    for pattern, found in alike.items():
        changing = [column for column in zip(*(numbers for *_, numbers in found), strict=True) if len({*column}) > 1]
        counts_up = len(changing) == 1 and all(earlier < later for earlier, later in pairwise(changing[0]))
        far = all(later - earlier >= apart for (_, earlier, _), (_, later, _) in pairwise(found))
        if len(found) >= repeats and far and (counts_up or (not changing and pattern.count(" ") >= 2)):
            for place, *_ in found:
                lines[place] = _GONE
    if _GONE in lines:  # a sentence that went on over the page's end goes on
        text = re.sub(rf"(?<=[\w,;-])\s*(?:{_GONE}\s*)+(?=[a-z])", "\n", "\n".join(lines))
        document.text = re.sub(rf"\s*{_GONE}[\s{_GONE}]*", "\n\n", text).strip()
