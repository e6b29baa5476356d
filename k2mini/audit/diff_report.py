"""What training changed in the weights, as a report: the largest changes, a map of them, the embeddings that moved."""

from __future__ import annotations

from functools import partial

from k2mini.audit import page
from k2mini.audit.reports import Report, visible
from k2mini.audit.weight_diff import Change, as_json, by_layer, by_module
from k2mini.data.tokenizer import Tokenizer
from k2mini.page import table

COLUMNS = ["change", "cosine", "effective rank", "in top", "tensor"]


def diff_report(
    name: str, changes: list[Change], moved: list[tuple[int, float]], tokenizer: Tokenizer | None
) -> Report:
    """Which tensors changed, how far and in how many directions.

    Args:
        moved: (token, distance) of the embeddings that moved most; an adapter moves none.
        tokenizer: to show tokens as text; without one they are shown as ids.
    """
    layers, modules = by_layer(changes), by_module(changes)
    rows = [_row(change) for change in sorted(changes, key=lambda change: -change.relative)[:12]]
    known = tokenizer.vocab_size if tokenizer is not None else 0
    names = {t: visible(tokenizer, t) if tokenizer is not None and t < known else str(t) for t, _ in moved}
    tokens = [(names[t], value) for t, value in moved if value > 0]
    lines = [f"{name}: the largest of {len(changes)} changes, relative to the tensor's length"]
    lines += [f"  {row[0]:>8}  {row[1]:>7}  {row[2]:>14}  {row[3]:>6}  {row[4]}" for row in (COLUMNS, *rows)]
    how = "Effective rank: participation ratio of the singular values. In top: in the base's 64 strongest directions."
    sections = [
        _change_map(changes, list(layers)),
        page.Section("The largest changes", how, lambda _scale: table(COLUMNS, rows)),
    ]
    if tokens:
        listed = ", ".join(f"{text} ({100 * value:.1f} %)" for text, value in tokens)
        lines.append(f"embeddings that moved most: {listed}")
        texts, distances = [f"{text} " for text, _ in tokens], [100 * value for _, value in tokens]
        draw = partial(page.text_strip, tokens=texts, values=distances, tips=[f"{value:.2f} %" for value in distances])
        scale = page.span_of([distances], "% of the embedding's length")
        sections.append(page.Section("Embeddings that moved most", "", draw, scale))
    values = {"model": name, "changes": as_json(changes), "by_layer": layers, "by_module": modules, "moved": tokens}
    return Report(lines, values, sections)


def _row(change: Change) -> list[str]:
    """One change, as the table's columns have it."""
    top = f"{100 * change.in_top:.1f} %" if change.in_top is not None else "-"
    return [
        f"{100 * change.relative:.3f} %",
        f"{change.cosine:.5f}",
        f"{change.effective_rank:.1f}",
        top,
        change.name,
    ]


def _change_map(changes: list[Change], layers: list[int]) -> page.Section:
    """Layers by modules, coloured by the relative change; a module that has no entry is blank."""
    inner = [change.name.removesuffix(".weight").split(".", 3)[3] for change in changes if ".layers." in change.name]
    kinds = list(dict.fromkeys(inner))
    relative = {change.name.removesuffix(".weight"): 100 * change.relative for change in changes}
    found = [[relative.get(f"model.layers.{layer}.{kind}") for kind in kinds] for layer in layers]
    grid = [[value or 0.0 for value in row] for row in found]
    texts = [["" if value is None else f"{value:.2g}" for value in row] for row in found]
    columns = [kind.split(".", 1)[-1].replace("_proj", "").removesuffix("_layernorm") for kind in kinds]
    draw = partial(page.heat_map, values=grid, rows=[*map(str, layers)], columns=columns, texts=texts)
    lead = "The change of each tensor, relative to its length (Frobenius norm)."
    scale = page.span_of(grid, "% of the tensor's length")
    return page.Section("Where it changed", lead, partial(draw, axes=("layer", "module")), scale)
