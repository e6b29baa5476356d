"""`--speculate` beside plain decoding: GeoBench's questions with four examples, and summaries of a given text.

    python tools/bench_speculate.py --model DIR --geobench FOLDER [--pairs 3] [--batch-size 1]

40 of NPEE's choice questions, of which the first four, with letter and text of their answers, stand before each; and 20
of its answers to discuss, each to be summarised. Greedy answers, drafted and not, are made in turns, one
by one (with --batch-size above 1, list by list), from the same weights, by the same threads, and must have the same
tokens. The time is that of whole answers, prompts included; `after the first token` leaves these out. Medians of the
pairs' ratios, and their range.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from k2mini.build import load_model
from k2mini.data.chats import open_template, stop_ids
from k2mini.data.prompts import encode_prompt
from k2mini.data.tokenizer import Tokenizer
from k2mini.evaluation.benchmarks import load_geobench
from k2mini.files import read_json
from k2mini.inference.compile import compile_decoding
from k2mini.inference.decoding import Completion, Decoding, TextStream
from k2mini.inference.generate import completions
from k2mini.inference.sampling import Sampling
from k2mini.inference.speculate import speculate
from k2mini.nn.llama import Llama

EXAMPLES, QUESTIONS, SUMMARIES = 4, 40, 20
GAP = "\n\n"  # after an example; it ends an answer, too


def questions(tokenizer: Tokenizer, folder: Path) -> list[list[int]]:
    """Choice questions after four that are answered."""
    asked = [each for each in load_geobench(folder / "geobench_npee.json") if each.task == "npee/choice"]
    asked = [each for each in asked if each.answer in each.labels]
    options = [dict(zip(each.labels, each.texts, strict=True)) for each in asked]
    texts = [
        f"Question: {each.stem}\n" + "".join(f"{a}. {b}\n" for a, b in own.items())
        for each, own in zip(asked, options, strict=True)
    ]
    answers = [f"{each.answer}. {own[each.answer]}" for each, own in zip(asked[:EXAMPLES], options, strict=False)]
    lead = "".join(f"{text}Answer: {answer}{GAP}" for text, answer in zip(texts, answers, strict=False))
    chosen = texts[EXAMPLES : EXAMPLES + QUESTIONS]
    return [tokenizer.encode(f"{lead}{text}Answer:", bos=True, eos=False) for text in chosen]


def summaries(tokenizer: Tokenizer, folder: Path, template: Any) -> list[list[int]]:
    """Texts of some 200 to 400 words, to be summarised."""
    texts = read_json(folder / "geobench_npee.json")["discussion"]["answer"]
    texts = [text for text in texts if 200 <= len(text.split()) <= 400][:SUMMARIES]
    return [encode_prompt(tokenizer, template, "Summarize the text.", text) for text in texts]


class Run:
    """Answers to a list of prompts, one after another, and the time that they take."""

    def __init__(self, model: Llama, how: dict[str, Any], drafted: bool, draft: Llama | None) -> None:
        model.speculation = None
        if drafted:
            speculate(model, draft)
        self.seconds, self.after_first, self.found = 0.0, 0.0, list[Completion]()
        self._first = 0.0
        self._streams: dict[int, TextStream] = {}
        self._stream, self._stop = how.pop("stream"), how["decoding"].stop
        self._answers: Iterator[Completion] = completions(model, **how, stopping_criteria=self._criteria)

    def _criteria(self, row: int, token: int) -> bool:
        if row not in self._streams:
            self._first, self._streams[row] = time.perf_counter(), self._stream()
        self._streams[row].push(token)
        return self._streams[row].stopped

    def next(self) -> bool:
        """One more answer; whether there was one."""
        start = time.perf_counter()
        answer = next(self._answers, None)
        end = time.perf_counter()
        if answer is None:
            return False
        self.seconds += end - start
        self.after_first += end - self._first
        self.found.append(answer)
        return True

    def tokens(self) -> int:
        """Of all answers, those that end them included."""
        return sum(len(answer.tokens) + (answer.finish == "eos") for answer in self.found)


def pair(model: Llama, how: dict[str, Any], draft: Llama | None) -> tuple[Run, Run]:
    """Both runs, in turns."""
    runs = []
    for drafted in (False, True):  # whether answers are drafted is decided where a run begins
        runs.append(Run(model, {**how}, drafted, draft))
        runs[-1].next()
    if how["decoding"].batch_size > 1:
        for run in runs:
            while run.next():
                pass
    while runs[0].next():
        runs[1].next()
    return runs[0], runs[1]


def compare(label: str, model: Llama, how: dict[str, Any], draft: Llama | None, number: int) -> None:
    """Measure in turns and print medians and ratios."""
    rows: dict[str, list[tuple[float, float]]] = {"": [], ", after the first token": []}
    for _ in range(number):
        plain, drafted = pair(model, how, draft)
        differ = [a for a, (x, y) in enumerate(zip(plain.found, drafted.found, strict=True)) if x != y]
        rows[""].append((plain.tokens() / plain.seconds, drafted.tokens() / drafted.seconds))
        rest = [(run.tokens() - len(run.found)) / run.after_first for run in (plain, drafted)]
        rows[", after the first token"].append((rest[0], rest[1]))
    for name, rates in rows.items():
        if name and how["decoding"].batch_size > 1:
            continue
        ratios = [b / a for a, b in rates]
        medians = [statistics.median(side) for side in zip(*rates, strict=True)]
        print(
            f"{label + name:46} {medians[0]:8.1f} {medians[1]:8.1f}  "
            f"{statistics.median(ratios):5.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            flush=True,
        )
    mean = plain.tokens() / len(plain.found)
    said = f"other tokens in {len(differ)} ({differ})" if differ else "the same tokens in all"
    print(f"    {len(plain.found)} answers of {mean:.0f} tokens on average, {said}", flush=True)


def main() -> None:
    """Both lists of prompts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--geobench", type=Path, required=True)
    parser.add_argument("--draft-model", type=Path)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max-new-tokens", type=int, default=Decoding.max_new_tokens)
    parser.add_argument("--quantize", choices=["int8"])
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = load_model(options.model, quantize=options.quantize)
    assert tokenizer is not None
    draft = load_model(options.draft_model)[0] if options.draft_model else None
    if options.compile:
        compile_decoding(model)
    template = open_template(None, options.model, tokenizer)
    batch, sampling = options.batch_size, Sampling(options.temperature)
    decoding = partial(Decoding, options.max_new_tokens, sampling, batch_size=batch)
    plain, chat = decoding(stop=(GAP,)), decoding()
    sets = {
        f"{QUESTIONS} questions with {EXAMPLES} examples": (questions(tokenizer, options.geobench), plain),
        f"{SUMMARIES} summaries": (summaries(tokenizer, options.geobench, template), chat),
    }
    millions = model.config.num_parameters() / 1e6
    print(f"{millions:.0f} M parameters, {options.threads} threads, torch {torch.__version__}")
    print(f"{'tokens a second':46} {'plain':>8} {'drafted':>8}  ratio")
    for label, (prompts, how) in sets.items():
        ends = tokenizer.stop_ids if how.stop else stop_ids(tokenizer, template)
        stream = partial(TextStream, tokenizer, how.stop)
        asked = {"prompts": prompts, "decoding": how, "stop_ids": ends, "vocab_size": tokenizer.vocab_size}
        compare(label, model, {**asked, "stream": stream}, draft, options.pairs)


if __name__ == "__main__":
    main()
