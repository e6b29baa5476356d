"""What the audit found about one model: lines for the terminal, values for JSON and sections of an HTML page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from k2mini.audit import page
from k2mini.audit.attention import attention_patterns, entropies, induction_scores, previous_token_scores
from k2mini.audit.lens import Attribution, Lens, direct_logit_attribution, logit_lens
from k2mini.audit.patching import (
    Metric,
    final_logits,
    log_probability,
    logit_difference,
    patch_heads,
    patch_positions,
)
from k2mini.data.tokenizer import Tokenizer
from k2mini.nn.llama import Llama


@dataclass(frozen=True)
class Report:
    """What was found about one model: lines for the terminal, plain values for JSON, sections of the HTML page."""

    lines: list[str]
    values: dict[str, Any]
    sections: list[str]


def visible(tokenizer: Tokenizer, token: int) -> str:
    """A token's text with spaces and line ends made visible."""
    text = tokenizer.piece_bytes(token).decode(errors="replace") or tokenizer.piece(token)
    return text.replace(" ", "␣").replace("\n", "⏎")


def first_token(tokenizer: Tokenizer, prompt: str, answer: str) -> int:
    """The first token of `answer` when prompt and answer are tokenised together.

    Raises ValueError where the answer is empty or adds no token.
    """
    if not answer:
        raise ValueError("the target is empty")
    before = tokenizer.encode(prompt, bos=True, eos=False)
    joint = tokenizer.encode(prompt + answer, bos=True, eos=False)
    place = next((i for i, (a, b) in enumerate(zip(before, joint, strict=False)) if a != b), len(before))
    if place >= len(joint):
        raise ValueError(f"the target {answer!r} adds no token to the prompt")
    return joint[place]


def lens_report(model: Llama, tokenizer: Tokenizer, name: str, prompt: str, answer: str | None) -> Report:
    """The logit lens over a prompt: the likeliest next token after each layer, and where the answer's rank rises."""
    tokens = tokenizer.encode(prompt, bos=True, eos=False)
    target = first_token(tokenizer, prompt, answer) if answer is not None else None
    lens = logit_lens(model, tokens, target)
    columns = [visible(tokenizer, token) for token in tokens]
    tops = [[visible(tokenizer, token) for token in row] for row in lens.top.tolist()]
    values: dict[str, Any] = {
        "model": name,
        "tokens": columns,
        "top": tops,
        "top_probability": lens.top_probability.tolist(),
        "entropy": lens.entropy.tolist(),
        "divergence": lens.divergence.tolist(),
    }
    what = "The likeliest next token after every layer; the fuller, the likelier. The top row is the model's own."
    sections = [page.section(f"{name}: what each layer would say", what, _lens_map(lens, tops, columns))]
    if target is not None and lens.probability is not None and lens.rank is not None:
        shown = visible(tokenizer, target)
        values |= {"target": shown, "probability": lens.probability.tolist(), "rank": lens.rank.tolist()}
        ranks = [f"layer {layer}, rank {int(rank)}" for layer, rank in enumerate(lens.rank[:, -1].tolist())]
        bars = page.bars([100 * p for p in lens.probability[:, -1].tolist()], ranks, unit=" %")
        what = f"The probability of {shown} after the last token, layer by layer."
        sections.append(page.section(f"{name}: the target", what, bars))
    return Report([f"{name}: {prompt!r}", *_lens_table(lens, tops)], values, sections)


def _lens_table(lens: Lens, tops: list[list[str]]) -> list[str]:
    """What each layer reads at the last position, a layer a line."""
    lines = [f"{'layer':>5}  {'likeliest':<14} {'p':>6}  {'entropy':>7}  {'KL':>6}  target's p, rank"]
    for layer, top in enumerate(tops):
        line = (
            f"{layer:>5}  {top[-1]:<14} {lens.top_probability[layer, -1]:>6.3f}  "
            f"{lens.entropy[layer, -1]:>7.2f}  {lens.divergence[layer, -1]:>6.2f}"
        )
        if lens.probability is not None and lens.rank is not None:
            line += f"  {lens.probability[layer, -1]:.4f}, {int(lens.rank[layer, -1])}"
        lines.append(line)
    return lines


def _lens_map(lens: Lens, tops: list[list[str]], columns: list[str]) -> str:
    """Layers by positions, coloured by the likeliest token's probability; the last layer on top, as in the papers."""
    order = list(range(len(tops)))[::-1]
    tips = [
        [
            f"layer {y}, after {columns[x]}: {tops[y][x]} with {100 * lens.top_probability[y, x]:.1f} %, "
            f"entropy {lens.entropy[y, x]:.2f}, KL {lens.divergence[y, x]:.2f}"
            for x in range(len(columns))
        ]
        for y in order
    ]
    return page.heat_map(
        [lens.top_probability[y].tolist() for y in order],
        [f"layer {y}" for y in order],
        columns,
        tips=tips,
        texts=[[text[:9] for text in tops[y]] for y in order],
        width=78,
        largest=1.0,
    )


_MEASURES = {
    "entropy": "How widely a head looks, in nats, on average over the tokens.",
    "previous token": "How much a head looks at the token before.",
    "induction": "How much a head looks at what followed the same token before, on random tokens that are repeated.",
}


def attention_report(
    model: Llama, tokenizer: Tokenizer, name: str, prompt: str, layer: int, head: int | None
) -> Report:
    """All heads measured, and the attention patterns of one layer's heads, or of one head.

    Raises ValueError where layer or head is out of range.
    """
    number, heads = model.config.num_layers, model.config.num_heads
    if not -number <= layer < number:
        raise ValueError(f"--layer {layer}: the model has layers 0 to {number - 1}")
    if head is not None and not 0 <= head < heads:
        raise ValueError(f"--head {head}: the model has heads 0 to {heads - 1}")
    tokens = tokenizer.encode(prompt, bos=True, eos=False)
    patterns = attention_patterns(model, tokens).float()
    columns = [visible(tokenizer, token) for token in tokens]
    scores = (entropies(patterns), previous_token_scores(patterns), induction_scores(model))
    measures = dict(zip(_MEASURES, scores, strict=True))
    lines = [f"{name}: {prompt!r}"]
    for what, values in measures.items():
        best = values.flatten().argsort(descending=what != "entropy")[:5].tolist()
        places = ", ".join(f"{p // heads}.{p % heads} ({values.flatten()[p]:.2f})" for p in best)
        lines.append(f"{'lowest' if what == 'entropy' else 'highest'} {what}: layer.head {places}")
    rows, across = [f"layer {i}" for i in range(number)], [f"head {i}" for i in range(heads)]
    sections = [
        page.section(f"{name}: {what}", _MEASURES[what], page.heat_map(values.tolist(), rows, across))
        for what, values in measures.items()
    ]
    for h in range(heads) if head is None else [head]:
        title = f"{name}: layer {layer % number}, head {h}"
        picture = _pattern_map(patterns[layer, h], columns)
        sections.append(page.section(title, "A row's token looks at a column's.", picture))
    content = {"model": name, "tokens": columns, **{what: values.tolist() for what, values in measures.items()}}
    return Report(lines, {**content, "layer": layer % number, "pattern": patterns[layer].tolist()}, sections)


def _pattern_map(pattern: Tensor, tokens: list[str]) -> str:
    """One head's attention pattern (T, T), tokens by tokens."""
    places = range(len(tokens))
    tips = [[f"{tokens[y]} looks at {tokens[x]}: {100 * pattern[y, x]:.1f} %" for x in places] for y in places]
    return page.heat_map(pattern.tolist(), tokens, tokens, tips=tips, width=24, height=20, largest=1.0)


def attribution_report(
    model: Llama, tokenizer: Tokenizer, name: str, prompt: str, answer: str, foil: str | None
) -> Report:
    """Direct logit attribution: what each head and MLP adds to the answer's logit (above the foil's)."""
    tokens = tokenizer.encode(prompt, bos=True, eos=False)
    target = first_token(tokenizer, prompt, answer)
    other = first_token(tokenizer, prompt, foil) if foil is not None else None
    found = direct_logit_attribution(model, tokens, target, other)
    what = visible(tokenizer, target) + (f" over {visible(tokenizer, other)}" if other is not None else "")
    largest = _largest_parts(found, 12)
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


def _largest_parts(found: Attribution, number: int) -> list[tuple[str, float]]:
    """The heads, MLPs and embedding that add most, for or against: (its name, what it adds)."""
    parts = [(f"layer {i}, head {h}", v) for i, row in enumerate(found.heads.tolist()) for h, v in enumerate(row)]
    parts += [(f"layer {i}, MLP", v) for i, v in enumerate(found.mlps.tolist())] + [("embedding", found.embed)]
    return sorted(parts, key=lambda part: -abs(part[1]))[:number]


def patch_report(
    model: Llama, tokenizer: Tokenizer, name: str, clean: str, corrupted: str, answer: str, foil: str | None, point: str
) -> Report:
    """Activation patching: what part of the metric each clean activation restores in the corrupted run."""
    clean_tokens, corrupted_tokens = (tokenizer.encode(text, bos=True, eos=False) for text in (clean, corrupted))
    metric, what = _patch_metric(tokenizer, clean, answer, foil)
    clean_value = metric(final_logits(model, clean_tokens))
    corrupted_value = metric(final_logits(model, corrupted_tokens))
    scale = (clean_value - corrupted_value) or 1.0
    positions = (patch_positions(model, clean_tokens, corrupted_tokens, metric, point) - corrupted_value) / scale
    heads = (patch_heads(model, clean_tokens, corrupted_tokens, metric) - corrupted_value) / scale
    columns = [visible(tokenizer, token) for token in clean_tokens]
    start = f"{name}: {what}: {clean_value:.3f} clean, {corrupted_value:.3f} corrupted"
    lines = [f"{start}; what a patch restores of the difference:"]
    lines += _largest_patches(positions, "position", [f"{i} ({text})" for i, text in enumerate(columns)])
    lines += _largest_patches(heads, "head", [str(h) for h in range(heads.shape[1])])
    lead = f"What part of the difference in the {what} the clean run's value restores, put into the corrupted run."
    rows, across = [f"layer {i}" for i in range(len(positions))], [f"head {h}" for h in range(heads.shape[1])]
    sections = [
        page.section(f"{name}: {point}", lead, page.heat_map(positions.tolist(), rows, columns, largest=1.0)),
        page.section(f"{name}: one head at all positions", lead, page.heat_map(heads.tolist(), rows, across)),
    ]
    values = {"model": name, "metric": what, "clean": clean_value, "corrupted": corrupted_value, "tokens": columns}
    return Report(lines, {**values, "positions": positions.tolist(), "heads": heads.tolist()}, sections)


def _patch_metric(tokenizer: Tokenizer, prompt: str, answer: str, foil: str | None) -> tuple[Metric, str]:
    """The answer's log-probability, or its logit above the foil's; and what it is called."""
    target = first_token(tokenizer, prompt, answer)
    if foil is None:
        return log_probability(target), f"log-probability of {visible(tokenizer, target)}"
    other = first_token(tokenizer, prompt, foil)
    what = f"logit of {visible(tokenizer, target)} above {visible(tokenizer, other)}"
    return logit_difference(target, other), what


def _largest_patches(restored: Tensor, kind: str, labels: list[str]) -> list[str]:
    """The six patches that restore most, a line each. restored (L, positions or heads)."""
    flat = restored.flatten()
    lines = []
    for place in flat.argsort(descending=True)[:6].tolist():
        layer, column = divmod(place, restored.shape[1])
        lines.append(f"  {100 * flat[place]:6.1f} %  layer {layer}, {kind} {labels[column]}")
    return lines
