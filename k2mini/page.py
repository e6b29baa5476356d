"""What pages of k2mini have in common: they load nothing, and are light or dark as the browser is."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

# The browser refuses to load anything from elsewhere, and says so on its console, where the tests look.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5c6675; --paper: #fbfbfd; --card: #ffffff; --line: #e3e6ec;
  --up: 24 92% 50%; --down: 212 90% 62%; }
@media (prefers-color-scheme: dark) { :root { --ink: #f2f4f8; --soft: #9aa4b2; --paper: #14171d; --card: #1b1f27;
  --line: #333a46; --up: 24 92% 38%; --down: 212 80% 45%; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1600px; margin: 0 auto; padding: 20px; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 17px; margin: 0; }
p { margin: 0 0 6px; color: var(--soft); max-width: 110ch; }
b, figcaption { font-weight: 500; }
pre, .said { white-space: pre-wrap; overflow-wrap: anywhere; color: var(--ink); margin: 0; }
pre { font: 13px/1.5 ui-monospace, monospace; max-width: 110ch; }
summary { cursor: pointer; color: var(--soft); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px;
  max-width: 100%; min-width: min(100%, 310px); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 500; text-align: left; }
.table { font-size: 13px; } .table td, .table th { padding: 3px 16px 3px 0; border-bottom: 1px solid var(--line); }
"""


def document(title: str, style: str, body: str, policy: str = POLICY) -> str:
    """A whole page of a title (text), a style sheet and what stands under the title (HTML)."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{style}</style></head>\n'
        f"<body><main><h1>{escape(title)}</h1>{body}\n</main></body></html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table of texts."""
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="table"><tr>{cells}</tr>{body}</table>'
