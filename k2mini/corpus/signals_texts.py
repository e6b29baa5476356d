"""What a document states of itself: instructions out of its title, abstract, sections, figures and citations.

These are tasks of GeoSignal, whose supervision is what papers already say (Deng et al. 2023, arXiv 2306.05064).
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from itertools import takewhile
from operator import itemgetter
from typing import Any, NamedTuple

MOST, FEWEST = 2000, 200  # characters of an output that is a piece of a section
HEADING = re.compile(r"^#{1,6} +(\S.*)", re.MULTILINE)
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)  # in which # begins no heading
NOT_SECTIONS = re.compile(  # nor the title
    r"(?i)[\d.\s]*(?:abstract|references|bibliography|acknowledge?ments?|contents|funding|author contributions|"
    r"(?:conflicts? of|competing) interests?|data availability)"
)
# The full stop of a sentence: none after an initial or an abbreviation.
STOP = r"(?<!\b[A-Z])(?<!\b(?:ca|al|vs|No|St))(?<!\b(?:Fig|e\.g|i\.e))(?<!\bapprox)\.(?=[ \t]*$|[ \t]+[A-Z])"
SENTENCES = re.compile(STOP, re.MULTILINE)
# "Quartz is a mineral that …": a term of up to three words, then what it is, with something that tells it from others.
DEFINITION = re.compile(
    r"(?:^|(?<=[.!?] ))(?P<said>(?:An? )?(?P<term>[A-Za-z][a-z-]{2,}(?: [A-Za-z-]{3,}){0,2}) is "
    rf"(?P<what>an? (?P<first>[a-z-]+)[^.!?:;()\[\]\n]{{20,300}}{STOP}))",
    re.MULTILINE,
)
TELLS = re.compile(r" (?:that|which|whose|where|of|in|with|from|between|formed|composed|made|consisting|used) ")
# Words that point elsewhere, in the whole sentence; those that no term has; adjectives that judge.
POINTS = re.compile(r"(?i)\b(?:this|that is|these|those|it|its|here|there|we|our|us|above|below|he|she|they|such)\b")
NO_TERM = re.compile(
    r"(?i)\b(?:what|which|one|another|each|aim|goal|purpose|problem|question|result|reason|example|approach|method|study|"
    r"work|paper|section|figure|table|key|main|first|second|next|advantage|way|point|idea|and|the|for|not|that|who|whether|"
    r"following|typical|individual|since|when|where|while|because|although|if|as)\b"
)
JUDGES = re.compile(
    r"good|great|major|key|important|common|significant|well-known|useful|powerful|challenging|simple|bit|lot|number|"
    r"matter|result|consequence|part|long|strong|better|more|very|possible|new|further|special|optional|exception|synonym|"
    r"\w+ly"
)


class Stated(NamedTuple):
    """Something that a source states: an input, and an output that stands in the field `where`, from `start`."""

    task: str
    input: str
    output: str
    where: str
    start: int = 0
    asked: str = ""  # what the instruction names: a term, 'Figure 1'


def stated(document: dict[str, Any]) -> Iterator[Stated]:
    """What a document states; of a list, such as `keywords`, the items joined by '; ' are the field."""
    text, title, abstract = (document.get(name) or "" for name in ("text", "title", "abstract"))
    if title and abstract:
        yield Stated("title", abstract, title, "title")
        yield Stated("abstract", title, abstract, "abstract")
    if document.get("keywords") and (title or abstract):
        yield Stated("keywords", f"{title}\n\n{abstract}".strip(), "; ".join(document["keywords"]), "keywords")
    citing = Counter(cited["sentence"] for cited in document.get("citations", []))
    for number, (sentence, cited) in enumerate(
        (one["sentence"], one["title"]) for one in document.get("citations", [])
    ):
        if sentence and cited and cited not in sentence and citing[sentence] == 1:  # of several, none is the answer
            yield Stated("citation", sentence, cited, f"citations.{number}.title")
    yield from _definitions(text)
    sections = [*_sections(text, title)]
    for heading, start, end in sections:
        if (cut := _cut(text, start, end)) > start:
            yield Stated("section", f"{title}: {heading}" if title else heading, text[start:cut], "text", start)
    figures = [(figure.get("label", ""), figure.get("caption", "")) for figure in document.get("figures", [])]
    references = _references(text, {label for label, _ in figures}) if sections else {}
    for number, (label, caption) in enumerate(figures):
        if caption and (found := _refers(text, sections, references.get(label.casefold(), []), label, caption)):
            yield Stated("caption", text[slice(*found)], caption, f"figures.{number}.caption", 0, label)
            yield Stated("figure", f"{label}: {caption}", text[slice(*found)], "text", found[0], label)


def _sections(text: str, title: str) -> Iterator[tuple[str, int, int]]:
    """(heading, start, end) of the sections under headings, without the space around them."""
    marks = [*HEADING.finditer(FENCE.sub(lambda fence: " " * len(fence[0]), text))]
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    for mark, end in zip(marks, ends, strict=False):
        if (heading := mark[1].rstrip()) != title and not NOT_SECTIONS.fullmatch(heading):
            body = text[mark.end() : end]
            yield heading, end - len(body.lstrip()), mark.end() + len(body.rstrip())


def _cut(text: str, start: int, end: int) -> int:
    """The end of a piece that begins a section and ends with a sentence or paragraph; `start` where there is none."""
    if end - start > MOST:
        stops = takewhile(lambda stop: stop <= start + MOST, (stop.end() for stop in SENTENCES.finditer(text, start)))
        end = max([text.rfind("\n\n", start, start + MOST), *stops])
    return start if end - start < FEWEST else end


def _definitions(text: str) -> Iterator[Stated]:
    for match in DEFINITION.finditer(text):
        term, what = match["term"], match["what"]
        vague = POINTS.search(match["said"]) or NO_TERM.search(term) or JUDGES.fullmatch(match["first"])
        if not vague and TELLS.search(what) and term.casefold() not in what.casefold():
            yield Stated("definition", "", match["said"], "text", match.start("said"), term)
            yield Stated("term", what, term, "text", match.start("term"))


def _references(text: str, labels: set[str]) -> dict[str, list[tuple[int, int]]]:
    """Label in lower case -> start and end of the words that refer to it, all found in one pass for each kind."""
    found: dict[str, list[tuple[int, int]]] = {}
    numbers: dict[str, set[str]] = {}
    for kind, _, number in (label.casefold().rpartition(" ") for label in labels):
        numbers.setdefault(kind, set()).add(number)
    for kind in filter(None, numbers):
        kinds = r"fig(?:ure)?s?\.?" if kind == "figure" else re.escape(kind) + "s?"
        known = "|".join(map(re.escape, sorted(numbers[kind], key=len, reverse=True)))
        for match in re.finditer(rf"(?i)\b{kinds}\s+({known})(?!\w|\.\d)", text):
            found.setdefault(f"{kind} {match[1].casefold()}", []).append(match.span())
    return found


def _refers(
    text: str, sections: list[tuple[str, int, int]], references: list[tuple[int, int]], label: str, caption: str
) -> tuple[int, int] | None:
    """Start and end of the first paragraph of a section that refers to a figure and is not its caption."""
    for first, last in references:
        _, begin, end = sections[max(0, bisect_right(sections, first, key=itemgetter(1)) - 1)]
        if begin <= first < end:
            start = max(begin, text.rfind("\n\n", begin, first) + 2)
            stop = text.find("\n\n", last, end)
            piece = text[start : end if stop < 0 else stop].rstrip()
            if len(piece) <= MOST and caption not in piece and not piece.startswith(f"{label}:"):
                return start, start + len(piece)
    return None
