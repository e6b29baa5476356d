"""What training changed in the weights, as a report: the largest changes, a map of them, the embeddings that moved."""

from __future__ import annotations

from k2mini.audit import page
from k2mini.audit.reports import Report, visible
from k2mini.audit.weight_diff import Change, as_json, by_layer, by_module
from k2mini.data.tokenizer import Tokenizer

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
    tokens = [(visible(tokenizer, t) if tokenizer is not None and t < known else str(t), value) for t, value in moved]
    lines = [f"{name}: the largest of {len(changes)} changes, relative to the tensor's length"]
    lines += [f"  {row[0]:>8}  {row[1]:>7}  {row[2]:>14}  {row[3]:>6}  {row[4]}" for row in (COLUMNS, *rows)]
    lead = "The change of each tensor, relative to its length (Frobenius norm)."
    how = "Effective rank: participation ratio of the singular values. In top: in the base's 64 strongest directions."
    sections = [
        page.section(f"{name}: where it changed", lead, _change_map(changes, list(layers))),
        page.section(f"{name}: the largest changes", how, page.table(COLUMNS, rows)),
    ]
    if tokens:
        listed = ", ".join(f"{text} ({100 * value:.1f} %)" for text, value in tokens)
        lines.append(f"embeddings that moved most: {listed}")
        texts, distances = [f"{text} " for text, _ in tokens], [value for _, value in tokens]
        strip = page.text_strip(texts, distances, [f"{100 * value:.2f} %" for value in distances])
        sections.append(page.section(f"{name}: embeddings that moved most", "The fuller, the farther.", strip))
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


def _change_map(changes: list[Change], layers: list[int]) -> str:
    """Layers by modules, coloured by the relative change; a module that did not change, or has no entry, is blank."""
    inner = [change.name.removesuffix(".weight").split(".", 3)[3] for change in changes if ".layers." in change.name]
    kinds = sorted(set(inner))
    relative = {change.name: change.relative for change in changes}
    grid = [[relative.get(f"model.layers.{layer}.{kind}.weight", 0.0) for kind in kinds] for layer in layers]
    return page.heat_map(
        grid, [f"layer {layer}" for layer in layers], [kind.split(".")[-1] for kind in kinds], width=54
    )
