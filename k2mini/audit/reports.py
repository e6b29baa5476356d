"""Findings as a table for the terminal, as JSON, and as sections of a page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from k2mini.audit import page
from k2mini.audit.attention import entropies, induction_scores, patterns, previous_token_scores
from k2mini.audit.lens import attribute, logit_lens
from k2mini.audit.patching import log_probability, logit_difference, patch_heads, patch_positions, run
from k2mini.audit.weight_diff import Change, as_json, by_layer, by_module
from k2mini.data.tokenizer import Tokenizer
from k2mini.nn.llama import Llama


@dataclass(frozen=True)
class Report:
    """One model's findings: lines for the terminal, plain values for JSON, sections for the page."""

    lines: list[str]
    values: dict[str, Any]
    sections: list[str]


def shown(tokenizer: Tokenizer, token: int) -> str:
    """A token as it is shown: spaces are visible."""
    text = tokenizer.piece_bytes(token).decode(errors="replace") or tokenizer.piece(token)
    return text.replace(" ", "␣").replace("\n", "⏎")


def first_token(tokenizer: Tokenizer, prompt: str, answer: str) -> int:
    """The token with which an answer begins after a prompt. Raises ValueError where it is empty."""
    if not answer:
        raise ValueError("the target is empty")
    before = tokenizer.encode(prompt, bos=True, eos=False)
    joint = tokenizer.encode(prompt + answer, bos=True, eos=False)
    place = next((i for i, (a, b) in enumerate(zip(before, joint, strict=False)) if a != b), len(before))
    if place >= len(joint):
        raise ValueError(f"the target {answer!r} adds no token to the prompt")
    return joint[place]


def lens_report(model: Llama, tokenizer: Tokenizer, name: str, prompt: str, answer: str | None) -> Report:
    """At which layer does the answer appear?"""
    tokens = tokenizer.encode(prompt, bos=True, eos=False)
    target = first_token(tokenizer, prompt, answer) if answer is not None else None
    found = logit_lens(model, tokens, target)
    columns = [shown(tokenizer, token) for token in tokens]
    rows = [f"layer {layer}" for layer in range(len(found.top))]
    tops = [[shown(tokenizer, token) for token in row] for row in found.top.tolist()]
    last = len(tokens) - 1
    lines = [
        f"{name}: {prompt!r}",
        f"{'layer':>5}  {'likeliest':<14} {'p':>6}  {'entropy':>7}  {'KL':>6}  target's p, rank",
    ]
    for layer in range(len(rows)):
        line = (
            f"{layer:>5}  {tops[layer][last]:<14} {found.top_probability[layer, last]:>6.3f}  "
            f"{found.entropy[layer, last]:>7.2f}  {found.divergence[layer, last]:>6.2f}"
        )
        if found.probability is not None and found.rank is not None:
            line += f"  {found.probability[layer, last]:.4f}, {int(found.rank[layer, last])}"
        lines.append(line)
    values: dict[str, Any] = {
        "model": name,
        "tokens": columns,
        "top": tops,
        "top_probability": found.top_probability.tolist(),
        "entropy": found.entropy.tolist(),
        "divergence": found.divergence.tolist(),
    }
    tips = [
        [
            f"{rows[y]}, after {columns[x]}: {tops[y][x]} with {100 * found.top_probability[y, x]:.1f} %, "
            f"entropy {found.entropy[y, x]:.2f}, KL {found.divergence[y, x]:.2f}"
            for x in range(len(columns))
        ]
        for y in range(len(rows))
    ]
    order = list(range(len(rows)))[::-1]  # the last layer on top, as in the papers
    picture = page.heat_map(
        [found.top_probability[y].tolist() for y in order],
        [rows[y] for y in order],
        columns,
        tips=[tips[y] for y in order],
        texts=[[text[:9] for text in tops[y]] for y in order],
        width=78,
        largest=1.0,
    )
    what = "The likeliest next token after every layer; the fuller, the likelier. The top row is the model's own."
    sections = [page.section(f"{name}: what each layer would say", what, picture)]
    if target is not None and found.probability is not None and found.rank is not None:
        values |= {
            "target": shown(tokenizer, target),
            "probability": found.probability.tolist(),
            "rank": found.rank.tolist(),
        }
        chart = page.bars(
            [100 * p for p in found.probability[:, last].tolist()],
            [f"{row}, rank {int(rank)}" for row, rank in zip(rows, found.rank[:, last].tolist(), strict=True)],
            unit=" %",
        )
        what = f"The probability of {shown(tokenizer, target)} after the last token, layer by layer."
        sections.append(page.section(f"{name}: the target", what, chart))
    return Report(lines, values, sections)


def attention_report(
    model: Llama, tokenizer: Tokenizer, name: str, prompt: str, layer: int, head: int | None
) -> Report:
    """Who looks where? Raises ValueError where layer or head is out of range."""
    number, heads = model.config.num_layers, model.config.num_heads
    if not -number <= layer < number:
        raise ValueError(f"--layer {layer}: the model has layers 0 to {number - 1}")
    if head is not None and not 0 <= head < heads:
        raise ValueError(f"--head {head}: the model has heads 0 to {heads - 1}")
    tokens = tokenizer.encode(prompt, bos=True, eos=False)
    found = patterns(model, tokens).float()
    columns = [shown(tokenizer, token) for token in tokens]
    measures = {
        "entropy": entropies(found),
        "previous token": previous_token_scores(found),
        "induction": induction_scores(model),
    }
    lines = [f"{name}: {prompt!r}"]
    for what, values in measures.items():
        best = values.flatten().argsort(descending=what != "entropy")[:5].tolist()
        places = ", ".join(f"{p // heads}.{p % heads} ({values.flatten()[p]:.2f})" for p in best)
        lines.append(f"{'lowest' if what == 'entropy' else 'highest'} {what}: layer.head {places}")
    rows, across = [f"layer {i}" for i in range(number)], [f"head {i}" for i in range(heads)]
    sections = [
        page.section(f"{name}: {what}", _MEANING[what], page.heat_map(values.tolist(), rows, across))
        for what, values in measures.items()
    ]
    for h in range(heads) if head is None else [head]:
        one = found[layer, h]
        tips = [
            [f"{columns[y]} looks at {columns[x]}: {100 * one[y, x]:.1f} %" for x in range(len(columns))]
            for y in range(len(columns))
        ]
        picture = page.heat_map(one.tolist(), columns, columns, tips=tips, width=24, height=20, largest=1.0)
        title = f"{name}: layer {layer % number}, head {h}"
        sections.append(page.section(title, "A row's token looks at a column's.", picture))
    content = {"model": name, "tokens": columns, **{what: values.tolist() for what, values in measures.items()}}
    return Report(lines, {**content, "layer": layer % number, "pattern": found[layer].tolist()}, sections)


_MEANING = {
    "entropy": "How widely a head looks, in nats, on average over the tokens.",
    "previous token": "How much a head looks at the token before.",
    "induction": "How much a head looks at what followed the same token before, on random tokens that are repeated.",
}


def attribution_report(
    model: Llama, tokenizer: Tokenizer, name: str, prompt: str, answer: str, foil: str | None
) -> Report:
    """Who adds what to the answer's logit?"""
    tokens = tokenizer.encode(prompt, bos=True, eos=False)
    target = first_token(tokenizer, prompt, answer)
    other = first_token(tokenizer, prompt, foil) if foil is not None else None
    found = attribute(model, tokens, target, other)
    what = shown(tokenizer, target) + (f" over {shown(tokenizer, other)}" if other is not None else "")
    flat = [(f"layer {i}, head {h}", v) for i, row in enumerate(found.heads.tolist()) for h, v in enumerate(row)]
    flat += [(f"layer {i}, MLP", v) for i, v in enumerate(found.mlps.tolist())] + [("embedding", found.embed)]
    largest = sorted(flat, key=lambda entry: -abs(entry[1]))[:12]
    lines = [f"{name}: the logit of {what} is {found.logit:.3f}, the sum of"]
    lines += [f"  {value:+8.3f}  {part}" for part, value in largest]
    lines.append(f"  {found.logit - sum(value for _, value in largest):+8.3f}  all others")
    number, heads = found.heads.shape
    both = torch.cat([found.heads, found.mlps[:, None]], dim=1)
    rows, columns = [f"layer {i}" for i in range(number)], [*(f"head {h}" for h in range(heads)), "MLP"]
    lead = f"What each part adds to the logit, which is {found.logit:.3f}. Warm speaks for it, cool against."
    sections = [
        page.section(f"{name}: who says {what}", lead, page.heat_map(both.tolist(), rows, columns)),
        page.section(f"{name}: the largest", "", page.bars([v for _, v in largest], [part for part, _ in largest])),
    ]
    values = {
        "model": name,
        "target": what,
        "logit": found.logit,
        "embed": found.embed,
        "heads": found.heads.tolist(),
        "mlps": found.mlps.tolist(),
    }
    return Report(lines, values, sections)


def patch_report(
    model: Llama, tokenizer: Tokenizer, name: str, clean: str, corrupted: str, answer: str, foil: str | None, point: str
) -> Report:
    """Where does the difference between two prompts become the answer?"""
    one, two = (tokenizer.encode(text, bos=True, eos=False) for text in (clean, corrupted))
    target = first_token(tokenizer, clean, answer)
    metric = log_probability(target)
    what = f"log-probability of {shown(tokenizer, target)}"
    if foil is not None:
        other = first_token(tokenizer, clean, foil)
        metric = logit_difference(target, other)
        what = f"logit of {shown(tokenizer, target)} above {shown(tokenizer, other)}"
    whole, broken = metric(run(model, one)), metric(run(model, two))
    scale = (whole - broken) or 1.0
    places: Tensor = (patch_positions(model, one, two, metric, point) - broken) / scale
    heads: Tensor = (patch_heads(model, one, two, metric) - broken) / scale
    columns = [shown(tokenizer, token) for token in one]
    rows = [f"layer {i}" for i in range(len(places))]
    lines = [f"{name}: {what}: {whole:.3f} clean, {broken:.3f} corrupted; what a patch restores of the difference:"]
    for kind, values, labels in (("position", places, columns), ("head", heads, None)):
        for p in values.flatten().argsort(descending=True)[:6].tolist():
            layer, column = divmod(p, values.shape[1])
            label = f"{column} ({labels[column]})" if labels else str(column)
            lines.append(f"  {100 * values.flatten()[p]:6.1f} %  layer {layer}, {kind} {label}")
    lead = f"What part of the difference in the {what} the clean run's value restores, put into the corrupted run."
    across = [f"head {h}" for h in range(heads.shape[1])]
    sections = [
        page.section(f"{name}: {point}", lead, page.heat_map(places.tolist(), rows, columns, largest=1.0)),
        page.section(f"{name}: one head at all positions", lead, page.heat_map(heads.tolist(), rows, across)),
    ]
    values_ = {"model": name, "metric": what, "clean": whole, "corrupted": broken, "tokens": columns}
    return Report(lines, {**values_, "positions": places.tolist(), "heads": heads.tolist()}, sections)


def diff_report(
    name: str, changes: list[Change], moved: list[tuple[int, float]], tokenizer: Tokenizer | None
) -> Report:
    """Which matrices moved, how far and in how many directions?"""
    layers, modules = by_layer(changes), by_module(changes)
    largest = sorted(changes, key=lambda change: -change.relative)[:12]
    lines = [f"{name}: the largest of {len(changes)} changes, relative to the tensor's length"]
    head = f"  {'change':>8}  {'cosine':>7}  {'effective rank':>14}  {'in top':>6}  tensor"
    lines.append(head)
    rows = []
    for change in largest:
        top = f"{100 * change.in_top:.1f} %" if change.in_top is not None else "-"
        row = (
            f"{100 * change.relative:.3f} %",
            f"{change.cosine:.5f}",
            f"{change.effective_rank:.1f}",
            top,
            change.name,
        )
        rows.append(row)
        lines.append(f"  {row[0]:>8}  {row[1]:>7}  {row[2]:>14}  {row[3]:>6}  {row[4]}")
    known = tokenizer.vocab_size if tokenizer is not None else 0
    tokens = [(shown(tokenizer, t) if tokenizer is not None and t < known else str(t), value) for t, value in moved]
    if tokens:
        listed = ", ".join(f"{text} ({100 * value:.1f} %)" for text, value in tokens)
        lines.append(f"embeddings that moved most: {listed}")
    inner = [change.name.removesuffix(".weight").split(".", 3)[3] for change in changes if ".layers." in change.name]
    kinds = sorted(set(inner))
    table = {change.name: change.relative for change in changes}
    grid = [[table.get(f"model.layers.{layer}.{kind}.weight", 0.0) for kind in kinds] for layer in layers]
    picture = page.heat_map(
        grid, [f"layer {layer}" for layer in layers], [kind.split(".")[-1] for kind in kinds], width=54
    )
    lead = "The change of each tensor, relative to its length (Frobenius norm)."
    how = "Effective rank: participation ratio of the singular values. In top: in the base's 64 strongest directions."
    columns = ["change", "cosine", "effective rank", "in top", "tensor"]
    sections = [
        page.section(f"{name}: where it changed", lead, picture),
        page.section(f"{name}: the largest changes", how, page.table(columns, rows)),
    ]
    if tokens:
        texts, sizes = [f"{text} " for text, _ in tokens], [value for _, value in tokens]
        strip = page.text_strip(texts, sizes, [f"{100 * value:.2f} %" for value in sizes])
        sections.append(page.section(f"{name}: embeddings that moved most", "The fuller, the farther.", strip))
    values = {"model": name, "changes": as_json(changes), "by_layer": layers, "by_module": modules, "moved": tokens}
    return Report(lines, values, sections)
