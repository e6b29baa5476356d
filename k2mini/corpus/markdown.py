"""Papers in XML and pages in HTML as Markdown: one walk over the elements, to each of which a format gives a role."""

from __future__ import annotations

import html
import re
from typing import Any

_MARK = re.compile("\x01(\\d+)\x02")  # stands for a citation until all is written; `_squeeze` lets no such character by
_ABBREVIATED = r"\bal|\bet|[Ff]ig|[Ff]igs|[Ee]q|[Ee]qs|e\.g|i\.e|\bcf|\bca|\bvs|\bNo|\bpp|approx|\b[A-Z]"
_END = re.compile(  # of a sentence; what is cited straight after the stop belongs to it
    "".join(f"(?<!{word})" for word in _ABBREVIATED.split("|"))
    + r"([.!?][\"')\]]*(?:\x01\d+\x02[,–-]?)*)\s+(?=[A-Z0-9\x01(\[\"“])"
)
_LABEL = re.compile(r"(fig(?:ure)?|tab(?:le)?)s?\.?\s*([A-Z]?\d+[a-z]?|[IVX]+)\b\s*[:.|–—-]*\s*", re.IGNORECASE)


def _squeeze(text: str | None) -> str:
    return re.sub(r"[\s\x00-\x1f]+", " ", text or "")


def block(text: str) -> str:
    """Text with blank lines around it."""
    return "\n\n" + text.strip(" \n") + "\n\n"


def one_line(text: str) -> str:
    """Text on one line, with single spaces, and none before a comma or a stop."""
    return re.sub(r" +([,.;:])(?=\s|$)", r"\1", _squeeze(text)).strip()


def join_lines(text: str, end: str = "\n") -> str:
    """Text without the hyphens that the ends of lines made.

    A hyphen before `end` (a regular expression) goes between two letters of lower case, the first of which is not a
    word's only one. It stays, and the line's end alone goes, elsewhere ("α2-integrin", "Navier-Stokes"), and where the
    text writes the word so within a line ("sea-level") and not without a hyphen. Nothing changes before "and" and "or".
    """
    words = set(re.findall(r"[^\W_]+(?:-[^\W_]+)*", text.lower()))

    def joined(match: re.Match[str]) -> str:
        before, after = match[1].lower(), match[2].lower()
        kept = f"{before}-{after}" in words and before.rpartition("-")[2] + after not in words
        soft = len(before.rpartition("-")[2]) > 1 and match[1][-1].islower() and match[2][0].islower()
        return match[1] + "-" * (kept or not soft) + match[2]

    return re.sub(rf"([^\W_]+(?:-[^\W_]+)*)-{end}(?!(?:and|or|to)\b)([^\W_]+)", joined, text)


def tidy(text: str) -> str:
    """Text without spaces at the ends of lines and more than one blank line."""
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" +\n", "\n", text)).strip()


class Writer:
    """Writes elements as Markdown.

    Args:
        tags: role -> the tags (without namespace, apart by spaces) that have it; see `render`. Others stand in a line.
        k2: write the marks of sciparser (K2's toolkit), where a citation is the title of the work.
        titles: of the works cited, by their ids.

    Attributes: `figures`, as `Document` has them, in the order in which they were written.
    """

    def __init__(self, tags: dict[str, str], *, k2: bool = False, titles: dict[str, str] | None = None) -> None:
        self.roles = {tag: role for role, names in tags.items() for tag in names.split()}
        self.k2, self.titles = k2, titles or {}
        self.figures: list[dict[str, str]] = []
        self._cited: list[tuple[str, list[str]]] = []  # what is shown, and the titles of the works

    def _role(self, node: Any) -> str:
        return self.roles.get(node.tag, "inline")

    def children(self, node: Any, level: int = 1) -> str:
        """What is in an element, blocks apart by blank lines."""
        pieces = [_squeeze(node.text)]
        for child in node:
            pieces += [self.render(child, level), _squeeze(child.tail)]
        written: list[str] = []
        for piece in filter(None, pieces):
            written.append(piece.lstrip(" ") if written and written[-1][-1:] in " \n" else piece)
        return "".join(filter(None, written))

    def render(self, node: Any, level: int = 1) -> str:
        """An element; `level` is that of the heading above it, 0 where there are no headings."""
        if not isinstance(node.tag, str):  # an entity of a DTD, which is not read
            return html.unescape(node.text or "")
        match self._role(node):
            case "skip":
                return ""
            case "space":
                return " "
            case "spaced":
                return self.children(node) + " "
            case "block" | "row" | "cell":
                return block(self.children(node, level))
            case "caption":
                return block(self.children(node, 0))
            case "section":
                titled = any(self._role(child) == "heading" and one_line(self.children(child)) for child in node)
                return block(self.children(node, level and level + titled))
            case "heading":
                return self._heading(node, level)
            case "label":  # a section's number, or that of a note or a list's item
                text = self.children(node)
                numbers = self._role(node.getparent()) == "section" and re.match(r"\s*[\dIVX.]+\s*$", text)
                return "" if numbers else f"{text} "
            case "item":
                inner = re.sub(r"^[•·▪◦‣∙]\s*", "", re.sub(r"\n{2,}", "\n", self.children(node, level).strip()))
                return "\n- " + inner.replace("\n", "\n  ") if inner else ""
            case "code":
                for end in node.iter("br"):
                    end.text = "\n"
                return block("```\n" + "".join(node.itertext()).strip("\r\n").replace("\x01", "") + "\n```")
            case "formula":
                return self._marked("FORMULA", one_line(self.children(node)))
            case "math":
                tex = node.find(".//annotation")
                return self.children(node) if tex is None else f"${one_line(tex.text or '')}$"
            case "tex":  # a whole LaTeX document, as publishers have it
                return one_line(re.sub(r"^.*\\begin\{document\}|\\end\{document\}.*$", "", node.text or "", flags=re.S))
            case "alternatives":
                best = sorted(node, key=lambda child: child.tag != "tex-math")
                return next((text for child in best if (text := self.render(child, level)).strip()), "")
            case "raised":
                text = self.children(node)
                return f"^{text.strip()}" if re.fullmatch(r"\s*[-+−–]?\d+[-+−–]?\s*", text) else text
            case "reference":
                return self._reference(node)
            case "note":
                return self._note(node)
            case "table":
                return self._table(node, level)
            case "figure":
                return self._figure(node)
        return self.children(node, level)

    def _marked(self, name: str, text: str) -> str:
        return block(f"[START_{name}]{text}[END_{name}]" if self.k2 and text else text)

    def _heading(self, node: Any, level: int) -> str:
        text = one_line(self.children(node))
        if not level:  # in a caption
            return block(text + "." * (text[-1:].isalnum() and node.getnext() is not None))
        if re.fullmatch("h[1-6]", node.tag):
            level = int(node.tag[1])
        else:  # GROBID's sections are flat; their numbers tell which lies in which
            number = node.get("n") or (re.match(r"\d+(\.\d+)*", text) or [""])[0]
            level = max(2, level, 2 + number.strip(".").count("."))
        return block(f"{'#' * min(level, 6)} {text}") if text else ""

    def _reference(self, node: Any) -> str:
        shown = one_line(self.children(node))
        ids = (node.get("target") or node.get("rid") or "").replace("#", " ").split()
        titles = [title for name in ids if (title := self.titles.get(name))]
        apart = node.getnext() is not None and self._role(node.getnext()) == "reference" and not node.tail
        if "bibr" not in (node.get("type"), node.get("ref-type")) or not titles:
            return self.children(node) + " " * apart
        self._cited.append(("".join(f"[START_REF]{t}[END_REF]" for t in titles) if self.k2 else shown, titles))
        return f"\x01{len(self._cited) - 1}\x02" + " " * apart

    def _note(self, node: Any) -> str:
        text = one_line(self.children(node))
        within = self._role(node.getparent()) in ("block", "inline", "spaced", "cell") and node.get("place") != "foot"
        if within and text:
            return f" [START_NOTE]{text}[END_NOTE] " if self.k2 else f" ({text}) "
        return self._marked("NOTE", text)

    def _table(self, node: Any, level: int) -> str:
        if any(self._role(part) in ("table", "heading", "code") for part in node.iterdescendants()):
            return block(self.children(node, level))  # it serves the layout of a page
        grid: list[list[str]] = []
        carried: dict[int, int] = {}  # column -> how many more rows the cell above it reaches into
        for row in (part for part in node.iter() if self._role(part) == "row"):
            cells: list[str] = []
            for cell in [*(part for part in row if self._role(part) == "cell"), None]:
                while carried.get(len(cells)):
                    carried[len(cells)] -= 1
                    cells.append("")
                if cell is not None:
                    wide, tall = (_span(cell, *names) for names in (("colspan", "cols"), ("rowspan", "rows")))
                    carried |= dict.fromkeys(range(len(cells), len(cells) + wide), tall - 1)
                    cells += [one_line(self.children(cell)).replace("|", "\\|"), *[""] * (wide - 1)]
            grid += [cells] if any(cells) else []
        if not grid:
            return block(one_line(self.children(node)))
        width = max(map(len, grid))
        lines = [f"| {' | '.join(cells + [''] * (width - len(cells)))} |" for cells in grid]
        captions = [block(one_line(self.children(part))) for part in node if self._role(part) == "caption"]
        return "".join(captions) + block("\n".join([lines[0], "|" + " - |" * width, *lines[1:]]))

    def _figure(self, node: Any) -> str:
        given = [one_line(self.children(part)) for part in node if part.tag == "label"]
        texts = [one_line(self.children(part, 0)) for part in node if self._role(part) in ("heading", "caption")]
        rest = [_squeeze(node.text)]
        for part in node:
            rest += [
                "" if part.tag == "label" or self._role(part) in ("heading", "caption") else self.render(part),
                _squeeze(part.tail),
            ]
        found = next((match for text in [*given, *texts] if (match := _LABEL.match(text))), None)
        is_table = "table" in (node.get("type"), node.tag[:5]) or bool(found and found[1].lower()[:3] == "tab")
        kind, number = "Table" if is_table else "Figure", found[2] if found else " ".join(given).rstrip(".:")
        label = number if re.search("[A-Za-z]{3}", number) else f"{kind} {number}".strip()
        matches = [(text, _LABEL.match(text)) for text in texts]
        texts = [text[match.end() :] if match and match[2] == number else text for text, match in matches]
        texts = [
            text for n, text in enumerate(texts) if text and not any(other.startswith(text) for other in texts[n + 1 :])
        ]
        caption = self._shown(" ".join(texts))
        if caption:
            self.figures.append({"label": label, "caption": caption})
        head = f"{label}: {' '.join(texts)}" if caption else label if given or "".join(rest).strip() else ""
        inner = tidy(block(head) + "".join(map(block, filter(None, rest))))
        if self.k2 and inner:
            return block(f"[START_{kind.upper()}]\n{inner}\n[END_{kind.upper()}]")
        return block(inner)

    def _shown(self, text: str) -> str:
        return _MARK.sub(lambda match: self._cited[int(match[1])][0], text)

    def finish(self, text: str) -> tuple[str, list[dict[str, str]]]:
        """The text complete, and the `citations` that are in its sentences."""
        text = tidy(text)
        found: dict[tuple[str, str], None] = {}
        for line in text.split("\n"):
            if _MARK.search(line) and not line.startswith(("|", "#")):
                for sentence in _END.sub("\\1\x03", line.removeprefix("- ")).split("\x03"):
                    for number in _MARK.findall(sentence):
                        shown = self._shown(sentence).strip()
                        found |= {(shown, title): None for title in self._cited[int(number)][1]}
        return self._shown(text), [{"sentence": sentence, "title": title} for sentence, title in found]


def _span(cell: Any, *names: str) -> int:
    text = next((value for name in names if (value := cell.get(name))), "1").strip()
    return min(max(int(text), 1), 100) if text.isascii() and text.isdigit() and len(text) < 9 else 1
