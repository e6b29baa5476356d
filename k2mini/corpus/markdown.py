"""Papers in XML and pages in HTML as Markdown, by one walk over their elements."""

from __future__ import annotations

import re
from typing import Any

_TAGS = {  # what is done with an element, in TEI, JATS and HTML; others stand in a line
    "section": "div body back abstract sec ack app boxed-text glossary notes fn-group fig-group table-wrap-foot article"
    " section",
    "block": "p quote ab list disp-quote verse-line speech statement def-list def-item def term attrib media main dl dt"
    " dd blockquote ul ol address details summary header center aside",
    "heading": "head title h1 h2 h3 h4 h5 h6",
    "item": "item list-item li",
    "spaced": "s surname given-names suffix pub-id",
    "space": "lb pb cb break br hr",
    "label": "label",
    "raised": "sup",
    "code": "pre preformat code",
    "formula": "formula disp-formula",
    "tex": "tex-math",
    "math": "math",
    "alternatives": "alternatives",
    "figure": "figure fig table-wrap",
    "caption": "caption figDesc figcaption",
    "table": "table",
    "row": "row tr",
    "cell": "cell td th",
    "note": "note fn",
    "reference": "ref xref",
    "skip": "listBibl listOrg ref-list graphic inline-graphic object-id permissions",
}
_ROLES = {tag: role for role, tags in _TAGS.items() for tag in tags.split()}
_MARK = re.compile("\x01(\\d+)\x02")  # stands for a citation until all is written; `_squeeze` lets no such character by
_ABBREVIATED = r"\bal|[Ff]ig|[Ff]igs|[Ee]q|[Ee]qs|e\.g|i\.e|\bcf|\bca|\bvs|\bNo|\bpp|approx|\b[A-Z]"
_END = re.compile(  # of a sentence; what is cited straight after the stop belongs to it
    "".join(f"(?<!{word})" for word in _ABBREVIATED.split("|"))
    + r"([.!?][\"')\]]*(?:\x01\d+\x02[,–-]?)*)\s+(?=[A-Z0-9\x01(\[\"“])"
)
_LONGEST = 2000  # characters of a sentence; what is longer is none
_LABEL = re.compile(r"(fig(?:ure)?|tab(?:le)?)s?\.?\s*([A-Z]?\d+[a-z]?|[IVX]+)\b\s*[:.|–—-]*\s*", re.IGNORECASE)


def _squeeze(text: str | None) -> str:
    return re.sub(r"[\s\x00-\x1f]+", " ", text or "")


def block(text: str) -> str:
    """Text with blank lines around it."""
    return "\n\n" + text.strip(" \n") + "\n\n"


def one_line(text: str) -> str:
    """Text on one line, with single spaces, and none before a comma or a stop."""
    return _line(_squeeze(text))


def _line(text: str) -> str:
    return re.sub(r" ([,.;:])(?=\s|$)", r"\1", re.sub(r"\s+", " ", text)).strip()  # citations that wait stay


def tidy(text: str) -> str:
    """Text with no spaces at the ends of lines and no two blank lines."""
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"(?<! ) +\n", "\n", text)).strip()


def join_lines(text: str, end: str = "\n", words: set[str] | None = None) -> str:
    """Text without the hyphens that the ends of lines made.

    A hyphen before `end` (a regular expression) goes between two letters of lower case, the first of which is not a
    word's only one. It stays, and the line's end alone goes, elsewhere ("α2-integrin", "Navier-Stokes"), and where the
    text has the word with its hyphen within a line ("sea-level") and not without. "and", "or" and "to" join nothing.
    With `words`, those in lower case of a whole document of which this is a part, it also stays between two of them.
    """
    known = set(re.findall(r"[^\W_]+(?:-[^\W_]+)?", text.lower())) if words is None else words

    def joined(match: re.Match[str]) -> str:
        before, after = match.groups()
        apart = words is not None and {before.lower(), after.lower()} <= known
        kept = (apart or f"{before}-{after}".lower() in known) and (before + after).lower() not in known
        soft = len(before) > 1 and before[-1].islower() and after[0].islower()
        return before + "-" * (kept or not soft) + after

    return re.sub(rf"(?<![^\W_])([^\W_]+)-{end}(?!(?:and|or|to)\b)([^\W_]+)", joined, text)


def _role(node: Any) -> str:
    in_line = node.tag == "code" and "\n" not in "".join(node.itertext())
    return "inline" if in_line else _ROLES.get(node.tag, "inline")


class Writer:
    """Writes elements (tags without namespace) as Markdown.

    Args:
        k2: write the marks of sciparser (K2's toolkit), where a citation is the title of the work.
        titles: of the works cited, by their ids.

    Attributes: `figures`, as `Document` has them, in the order in which they were written.
    """

    def __init__(self, *, k2: bool = False, titles: dict[str, str] | None = None) -> None:
        self.k2, self.titles = k2, titles or {}
        self.figures: list[dict[str, str]] = []
        self._cited: list[tuple[str, list[str]]] = []  # what is shown, and the titles of the works

    def children(self, node: Any, level: int = 1) -> str:
        """What is in an element, blocks apart by blank lines; `level` as for `render`."""
        written = [_squeeze(node.text)]
        for child in node:
            for piece in (self.render(child, level), _squeeze(child.tail)):
                if piece := piece.lstrip(" ") if written[-1][-1:] in (" ", "\n") else piece:
                    written.append(piece)
        return "".join(written)

    def render(self, node: Any, level: int = 1) -> str:
        """An element; `level` is that of the heading above it, 0 where there are no headings."""
        match _role(node):
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
                titled = any(_role(child) == "heading" and "".join(child.itertext()).strip() for child in node)
                return block(self.children(node, level and level + titled))
            case "heading" if node.tag != "title" or (_ROLES.get(node.getparent().tag) and node.getparent().tag != "p"):
                return self._heading(node, level)
            case "label":  # a section's number goes; that of a note or a list's item stays
                text = self.children(node)
                return "" if _role(node.getparent()) == "section" and not re.search("[a-z]", text) else f"{text} "
            case "item":
                inner = re.sub(r"^[•·▪◦‣∙]\s*", "", re.sub(r"\n{2,}", "\n", self.children(node, level).strip()))
                return "\n- " + inner.replace("\n", "\n  ") if inner else ""
            case "code":
                for end in node.iter("br"):
                    end.text = "\n"
                return block("```\n" + "".join(node.itertext()).strip("\r\n").replace("\x01", "") + "\n```")
            case "formula":
                return self._marked("FORMULA", _line(self.children(node)))
            case "math" if (tex := node.find(".//annotation")) is not None:
                return f"${one_line(tex.text or '')}$"
            case "tex":  # a whole LaTeX document, as publishers have it
                return one_line(re.sub(r"^.*\\begin\{document\}|\\end\{document\}.*$", "", node.text or "", flags=re.S))
            case "alternatives":
                best = sorted(node, key=lambda child: child.tag != "tex-math")
                return next((text for child in best if (text := self.render(child, level)).strip()), "")
            case "raised":
                text = self.children(node).strip()
                return f"^{text}" if re.fullmatch(r"[-+−–]?\d+[-+−–]?", text) else text
            case "reference":
                return self._reference(node)
            case "note":
                text = _line(self.children(node))
                if text and node.get("place") != "foot" and _role(node.getparent()) in ("block", "inline", "spaced"):
                    return f" [START_NOTE]{text}[END_NOTE] " if self.k2 else f" ({text}) "
                return self._marked("NOTE", text)
            case "table":
                return self._table(node, level)
            case "figure":
                return self._figure(node)
        return self.children(node, level)

    def _marked(self, name: str, text: str) -> str:
        return block(f"[START_{name}]{text}[END_{name}]" if self.k2 and text else text)

    def _heading(self, node: Any, level: int) -> str:
        text = _line(self.children(node))
        if not level:  # in a caption
            return block(text + "." * (text[-1:].isalnum() and node.getnext() is not None))
        if re.fullmatch("h[1-6]", node.tag):
            level = int(node.tag[1])
        else:  # GROBID's sections are flat; their numbers tell which lies in which
            number = node.get("n") or (re.match(r"\d+(\.\d+)*", text) or [""])[0]
            level = max(2, level, 2 + number.strip(".").count("."))
        return block(f"{'#' * min(level, 6)} {text}") if text else ""

    def _reference(self, node: Any) -> str:
        ids = (node.get("target") or node.get("rid") or "").replace("#", " ").split()
        titles = [title for name in ids if (title := self.titles.get(name))]
        shown = self._shown(self.children(node))
        if titles and "bibr" in (node.get("type"), node.get("ref-type")):
            shown = "".join(f"[START_REF]{title}[END_REF]" for title in titles) if self.k2 else _line(shown)
            self._cited.append((shown, titles))
            shown = f"\x01{len(self._cited) - 1}\x02"
        after = node.getnext()  # GROBID loses the space between two
        return shown + " " * (after is not None and _role(after) == "reference" and not node.tail)

    def _table(self, node: Any, level: int) -> str:
        rows = [part for part in node.iter("*") if _role(part) == "row"]
        if not rows or any(_role(part) in ("table", "heading", "code") for part in node.iterdescendants("*")):
            return block(self.children(node, level))  # it serves the layout of a page
        grid: list[list[str]] = []
        carried: dict[int, int] = {}  # column -> how many more rows the cell above it reaches into
        for row in rows:
            cells: list[str] = []
            for cell in [*(part for part in row if _role(part) == "cell"), None]:
                while carried.get(len(cells)):
                    carried[len(cells)] -= 1
                    cells.append("")
                if cell is not None:
                    wide, tall = _span(cell, "colspan", "cols"), _span(cell, "rowspan", "rows")
                    carried |= dict.fromkeys(range(len(cells), len(cells) + wide), tall - 1)
                    cells += [_line(self._shown(self.children(cell))).replace("|", "\\|"), *[""] * (wide - 1)]
            grid += [cells] if any(cells) else []
        width = max(map(len, grid), default=0)
        lines = [f"| {' | '.join(cells + [''] * (width - len(cells)))} |" for cells in grid]
        captions = [self.render(part) for part in node if _role(part) == "caption"]
        return "".join(captions) + block("\n".join([*lines[:1], "|" + " - |" * width, *lines[1:]]) if grid else "")

    def _figure(self, node: Any) -> str:
        given = _line(self._shown(" ".join(self.children(part) for part in node if part.tag == "label")))
        texts = [_line(self.children(part, 0)) for part in node if _role(part) in ("heading", "caption")]
        told = ("label", "heading", "caption")
        rest = _squeeze(node.text)
        for part in node:
            rest += block("" if _role(part) in told else self.render(part)) + _squeeze(part.tail)
        found = next((match for text in [given, *texts] if (match := _LABEL.match(text))), None)
        is_table = "table" in (node.get("type"), node.tag[:5]) or bool(found and found[1].lower()[:3] == "tab")
        kind, number = "Table" if is_table else "Figure", found[2] if found else given.rstrip(".:")
        label = number if re.search("[A-Za-z]{3}", number) else f"{kind} {number}".strip()
        matches = [(text, _LABEL.match(text)) for text in texts]
        texts = [text[match.end() :] if match and match[2] == number else text for text, match in matches]
        if len(texts) > 1 and self._shown(texts[1]).startswith(self._shown(texts[0])):
            del texts[0]
        if caption := " ".join(filter(None, texts)):
            self.figures.append({"label": label, "caption": self._shown(caption)})
        head = f"{label}: {caption}" if caption else label if given or rest.strip() else ""
        inner = tidy(block(head) + rest)
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
                    shown = self._shown(sentence).strip()
                    if len(shown) <= _LONGEST:
                        titles = [self._cited[int(number)][1] for number in _MARK.findall(sentence)]
                        found |= dict.fromkeys((shown, title) for some in titles for title in some)
        return self._shown(text), [{"sentence": sentence, "title": title} for sentence, title in found]


def _span(cell: Any, *names: str) -> int:
    text = next(filter(None, map(cell.get, names)), "1")
    return min(max(int(text), 1), 20) if re.fullmatch("[0-9]{1,8}", text) else 1
