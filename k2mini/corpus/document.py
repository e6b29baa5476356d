"""A document of a corpus: its text as Markdown, and what is known of it."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Document:
    """What a reader gives, the filters change and a shard holds.

    Attributes:
        text: Markdown: `# title`, `## Abstract`, sections under headings, `Figure 1: caption` as a paragraph, and
            under `## References` the works cited, one a line beginning with `- `.
        figures: `label` ('Figure 1') and `caption` of each figure and table.
        citations: `sentence` (as it stands in the text) and `title` of the work that it cites.
        source: the file, and the place in it where it holds several documents.
        licence: as the document states it; empty where it does not.
    """

    text: str
    title: str = ""
    doi: str = ""
    year: int | None = None
    source: str = ""
    licence: str = ""
    abstract: str = ""
    keywords: list[str] = field(default_factory=list)
    figures: list[dict[str, str]] = field(default_factory=list)
    citations: list[dict[str, str]] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """The document as a line of a shard: `sha256` is that of the text; of the last four, only what there is."""
        known = asdict(self)
        extras = {name: known.pop(name) for name in ("abstract", "keywords", "figures", "citations")}
        known["sha256"] = hashlib.sha256(self.text.encode()).hexdigest()
        return known | {name: value for name, value in extras.items() if value}
