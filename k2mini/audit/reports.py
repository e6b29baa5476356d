"""What the audit found about one model: lines for the terminal, values for JSON and sections of an HTML page."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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
from k2mini.data.prompts import encode_text
from k2mini.data.tokenizer import Tokenizer
from k2mini.nn.llama import Llama

log = logging.getLogger(__name__)

BLANKS = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"})
BYTES = {0xDC00 + byte: f"<0x{byte:02X}>" for byte in range(128, 256)}  # of what is not UTF-8, as Python escapes it


@dataclass(frozen=True)
class Report:
    """What was found about one model: lines for the terminal, plain values for JSON, sections of the HTML page."""

    lines: list[str]
    values: dict[str, Any]
    sections: list[page.Section]


def visible(tokenizer: Tokenizer, token: int) -> str:
    """A token's text, all of it to be seen: blanks as signs, what shows nothing as <200B>, lone bytes as <0xE2>."""
    text = tokenizer.piece_bytes(token).decode(errors="surrogateescape") or tokenizer.piece(token)
    text = text.translate(BLANKS).translate(BYTES)
    return "".join(char if char.isprintable() else f"<{ord(char):04X}>" for char in text)


def first_token(tokenizer: Tokenizer, prompt: str, answer: str, what: str = "the target") -> int:
    """The first token of `answer` when prompt and answer are tokenised together; a notice if that is not all of it.

    Raises ValueError where the answer is empty or adds no token.
    """
    if not answer:
        raise ValueError(f"{what} is empty")
    before = encode_text(tokenizer, prompt)
    joint = encode_text(tokenizer, type(prompt)(prompt + answer))
    place = next((i for i, (a, b) in enumerate(zip(before, joint, strict=False)) if a != b), len(before))
    if place >= len(joint):
        raise ValueError(f"{what} {answer!r} adds no token to the prompt")
    if tokenizer.piece_bytes(joint[place]) != answer.encode():
        shown = visible(tokenizer, joint[place])
        log.warning("%s %r is not one token after the prompt: only the first one, %s, counts", what, answer, shown)
    return joint[place]


def lens_report(model: Llama, tokenizer: Tokenizer, name: str, prompt: str, answer: str | None) -> Report:
    """The logit lens over a prompt: the likeliest next token after each layer, and where the answer's rank rises."""
    tokens = encode_text(tokenizer, prompt)
    target = first_token(tokenizer, prompt, answer, f"{name}: the target") if answer is not None else None
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
    tips = [
        [
            f"layer {y}, after {columns[x]}: {tops[y][x]} with {100 * lens.top_probability[y, x]:.1f} %, "
            f"entropy {lens.entropy[y, x]:.2f}, KL {lens.divergence[y, x]:.2f}"
            for x in range(len(columns))
        ]
        for y in range(len(tops))
    ]
    grid = partial(page.heat_map, rows=[str(y) for y in range(len(tops))], columns=columns, axes=("layer", "after"))
    draw = partial(grid, values=values["top_probability"], texts=tops, tips=tips)
    what = "The likeliest next token after every layer. The last row is the model's own answer."
    sections = [page.Section("What each layer would say", what, draw, page.Scale(0, 1, "probability"))]
    if target is not None and lens.logprob is not None and lens.rank is not None:
        shown, logprobs, ranks = visible(tokenizer, target), lens.logprob.tolist(), lens.rank.tolist()
        values |= {"target": shown, "probability": lens.logprob.exp().tolist(), "logprob": logprobs, "rank": ranks}
        texts = [[str(rank + 1) for rank in row] for row in ranks]
        what = "Its rank among all tokens, 1 for the likeliest. Colour: its log-probability, from an even guess's up."
        scale = page.Scale(-math.log(model.config.vocab_size), 0, "nats")
        sections.insert(
            0, page.Section(f"The target {shown}", what, partial(grid, values=logprobs, texts=texts), scale)
        )
    return Report([f"{name}: {prompt!r}", *_lens_table(lens, tops)], values, sections)


def _lens_table(lens: Lens, tops: list[list[str]]) -> list[str]:
    """What each layer reads at the last position, a layer a line."""
    head = f"{'layer':>5}  {'likeliest':<14} {'p':>6}  {'entropy':>7}  {'KL':>6}"
    lines = [head + ("  target's log p    rank" if lens.rank is not None else "")]
    for layer, top in enumerate(tops):
        line = (
            f"{layer:>5}  {top[-1]:<14} {lens.top_probability[layer, -1]:>6.3f}  "
            f"{lens.entropy[layer, -1]:>7.2f}  {lens.divergence[layer, -1]:>6.2f}"
        )
        if lens.logprob is not None and lens.rank is not None:
            line += f"  {lens.logprob[layer, -1]:>14.2f}  {int(lens.rank[layer, -1]) + 1:>6}"
        lines.append(line)
    return lines


FOLDED = 24  # the patterns of all heads over a longer prompt are folded
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
    tokens = encode_text(tokenizer, prompt)
    patterns = attention_patterns(model, tokens).float()
    columns = [visible(tokenizer, token) for token in tokens]
    scores = (entropies(patterns), previous_token_scores(patterns), induction_scores(model))
    measures = dict(zip(_MEASURES, scores, strict=True))
    lines = [f"{name}: {prompt!r}"]
    for what, values in measures.items():
        best = values.flatten().argsort(descending=what != "entropy")[:5].tolist()
        places = ", ".join(f"{p // heads}.{p % heads} ({values.flatten()[p]:.2f})" for p in best)
        lines.append(f"{'lowest' if what == 'entropy' else 'highest'} {what}: layer.head {places}")
    layer, shown = layer % number, range(heads) if head is None else [head]
    sections = [_last_row(patterns[layer], columns, layer, shown)]
    for what, values in measures.items():
        unit = "nats" if what == "entropy" else "attention weight"
        sections.append(page.Section(what.capitalize(), _MEASURES[what], *_by_head(values.tolist(), unit)))
    for h in shown:
        draw = partial(_pattern_map, pattern=patterns[layer, h].tolist(), tokens=columns)
        scale, folded = page.Scale(0, 1, "attention weight"), head is None and len(tokens) > FOLDED
        title, what = f"Layer {layer}, head {h}", "A row's token looks at a column's."
        sections.append(page.Section(title, what, draw, scale, folded=folded))
    content = {"model": name, "tokens": columns, **{what: values.tolist() for what, values in measures.items()}}
    return Report(lines, {**content, "layer": layer, "pattern": patterns[layer].tolist()}, sections)


def _by_head(values: list[list[float]], unit: str, *more: str) -> tuple[Callable[[page.Scale], str], page.Scale]:
    """A map of layers by heads (and what else stands in the columns), and its scale."""
    rows, columns = map(str, range(len(values))), [*map(str, range(len(values[0]) - len(more))), *more]
    draw = partial(page.heat_map, values=values, rows=list(rows), columns=columns, axes=("layer", "head"))
    return draw, page.span_of(values, unit)


def _last_row(patterns: Tensor, tokens: list[str], layer: int, heads: Sequence[int]) -> page.Section:
    """Where the last token looks, as running text: the mean over the heads, and each. patterns (H, T, T)."""
    rows = {"mean of all heads": patterns[:, -1].mean(dim=0).tolist()}
    rows |= {f"head {head}": patterns[head, -1].tolist() for head in heads}

    def draw(scale: page.Scale) -> str:
        strips = []
        for name, row in rows.items():
            tips = [f"{name}, {token}: {100 * value:.1f} %" for token, value in zip(tokens, row, strict=True)]
            strips.append(page.text_strip(scale, tokens=tokens, values=row, tips=tips, name=name))
        return f"<div>{''.join(strips)}</div>"

    scale = page.Scale(0, 1, "attention weight")
    what = "From the last token the answer is read. The fuller a token, the more it is looked at."
    return page.Section(f"Layer {layer}: where the last token looks", what, draw, scale)


def _pattern_map(scale: page.Scale, pattern: list[list[float]], tokens: list[str]) -> str:
    """One head's attention pattern (T, T), tokens by tokens. What rounds to nothing is left empty: most of it does."""
    tips = [
        [f"{tokens[y]} looks at {tokens[x]}: {100 * v:.1f} %" if v >= 0.005 else "" for x, v in enumerate(row)]
        for y, row in enumerate(pattern)
    ]
    return page.heat_map(scale, values=pattern, rows=tokens, columns=tokens, axes=("from", "to"), tips=tips)


def attribution_report(
    model: Llama, tokenizer: Tokenizer, name: str, prompt: str, answer: str, foil: str | None
) -> Report:
    """Direct logit attribution: what each head and MLP adds to the answer's logit (above the foil's)."""
    tokens = encode_text(tokenizer, prompt)
    target = first_token(tokenizer, prompt, answer, f"{name}: the target")
    other = first_token(tokenizer, prompt, foil, f"{name}: the foil") if foil is not None else None
    found = direct_logit_attribution(model, tokens, target, other)
    what = visible(tokenizer, target) + (f" over {visible(tokenizer, other)}" if other is not None else "")
    largest = _largest_parts(found, 12)
    lines = [f"{name}: the logit of {what} is {found.logit:.3f}, the sum of"]
    lines += [f"  {value:+8.3f}  {part}" for part, value in largest]
    lines.append(f"  {found.logit - sum(value for _, value in largest):+8.3f}  all others")
    both = torch.cat([found.heads, found.mlps[:, None]], dim=1).tolist()
    note, parts = f"the logit is {found.logit:.3f}", [value for _, value in largest]
    draw = partial(page.bars, values=parts, names=[part for part, _ in largest])
    lead = "What each part adds to the logit. Warm speaks for it, cool against."
    sections = [
        page.Section(f"Who says {what}", lead, *_by_head(both, "logits", "MLP"), note),
        page.Section(
            "The largest", "The parts that add most, for or against.", draw, page.span_of([parts], "logits"), note
        ),
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
    clean_tokens, corrupted_tokens = (encode_text(tokenizer, text) for text in (clean, corrupted))
    metric, what = _patch_metric(tokenizer, name, clean, answer, foil)
    clean_value = metric(final_logits(model, clean_tokens))
    corrupted_value = metric(final_logits(model, corrupted_tokens))
    scale = (clean_value - corrupted_value) or 1.0
    positions = (patch_positions(model, clean_tokens, corrupted_tokens, metric, point) - corrupted_value) / scale
    heads = (patch_heads(model, clean_tokens, corrupted_tokens, metric) - corrupted_value) / scale
    columns = [visible(tokenizer, token) for token in clean_tokens]
    note = f"{what}: {clean_value:.3f} clean, {corrupted_value:.3f} corrupted"
    lines = [f"{name}: {note}; what a patch restores of the difference:"]
    lines += _largest_patches(positions, "position", [f"{i} ({text})" for i, text in enumerate(columns)])
    lines += _largest_patches(heads, "head", [str(h) for h in range(heads.shape[1])])
    pairs = zip(clean_tokens, corrupted_tokens, strict=True)
    start = next((i for i, (one, other) in enumerate(pairs) if one != other), 0)
    lead = "What part of the difference the clean run's value restores, put into the corrupted run"
    shown = (100 * positions[:, start:]).tolist()
    draw = partial(page.heat_map, values=shown, rows=[*map(str, range(len(shown)))], columns=columns[start:])
    texts = [[str(round(value)) for value in row] for row in shown] if len(columns) - start <= 12 else None
    unit, same = (
        "% of the difference",
        f" The first {start} tokens are the same in both, and are left out." * (start > 0),
    )
    sections = [
        page.Section(
            f"Patched: {point}",
            f"{lead} at one token.{same}",
            partial(draw, axes=("layer", "token"), texts=texts),
            page.span_of(shown, unit),
            note,
        ),
        page.Section("Patched: one head", f"{lead} at all tokens.", *_by_head((100 * heads).tolist(), unit), note),
    ]
    values = {"model": name, "metric": what, "clean": clean_value, "corrupted": corrupted_value, "tokens": columns}
    return Report(lines, {**values, "positions": positions.tolist(), "heads": heads.tolist()}, sections)


def _patch_metric(tokenizer: Tokenizer, name: str, prompt: str, answer: str, foil: str | None) -> tuple[Metric, str]:
    """The answer's log-probability, or its logit above the foil's; and what it is called."""
    target = first_token(tokenizer, prompt, answer, f"{name}: the target")
    if foil is None:
        return log_probability(target), f"log-probability of {visible(tokenizer, target)}"
    other = first_token(tokenizer, prompt, foil, f"{name}: the foil")
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
