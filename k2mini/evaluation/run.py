"""`k2mini eval`: questions in, results and their summary out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from k2mini.directories import make_writable
from k2mini.evaluation.geobench import Question
from k2mini.evaluation.report import Result, summarise
from k2mini.evaluation.score import score_options
from k2mini.files import write_text
from k2mini.nn.llama import Llama
from k2mini.progress import progress_bar
from k2mini.text.prompts import get_template
from k2mini.text.tokenizer import Tokenizer

SCORINGS = ("letter", "text")
NORMALIZATIONS = ("byte", "none")


@dataclass(frozen=True)
class Asking:
    """How questions are asked and answers scored.

    Args:
        scoring: 'letter' lists the options and scores log p(label); 'text' asks the bare question and scores
            log p(option's text).
        template: a name of `TEMPLATES`.
        answer_prefix: the beginning of the answer, given.
        normalize: of 'text': 'byte' divides by the option's length in UTF-8, so that long options are not at a
            disadvantage; 'none' does not.
        score_end: of 'text': the end of the answer (EOS) is scored as well, as a tuned model writes it.

    Raises ValueError where a value is not one of these.
    """

    scoring: str = "letter"
    template: str = "alpaca"
    answer_prefix: str = ""
    normalize: str = "byte"
    score_end: bool = False

    def __post_init__(self) -> None:
        get_template(self.template)
        for name, known in (("scoring", SCORINGS), ("normalize", NORMALIZATIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")

    def settings(self) -> dict[str, Any]:
        """What the report says of it."""
        values = asdict(self)
        if self.scoring == "letter":
            del values["normalize"], values["score_end"]
        return {**values, "shots": 0}


def evaluate(
    model: Llama, tokenizer: Tokenizer, questions: Sequence[Question], asking: Asking, label: str = "eval"
) -> list[Result]:
    """Answer every question with the option of the highest score.

    Raises ValueError naming the question that does not fit the model's context.
    """
    results = []
    with progress_bar(len(questions), label, "questions") as progress:
        for question in questions:
            results.append(_answer(model, tokenizer, question, asking))
            progress.update()
    return results


def _answer(model: Llama, tokenizer: Tokenizer, question: Question, asking: Asking) -> Result:
    continuations = question.asked(asking.scoring)[1]
    # Labels are compared as they are, the words of a true/false question too.
    by_text = continuations != question.labels
    scored = [index for index, text in enumerate(continuations) if text.strip()]
    logprobs: list[float | None] = [None] * len(continuations)
    token_ids: list[list[int]] = [[] for _ in continuations]
    prediction = None
    if scored:
        context = question.context(get_template(asking.template), asking.scoring, asking.answer_prefix)
        options = [continuations[index] for index in scored]
        try:
            scores = score_options(model, tokenizer, context, options, eos=by_text and asking.score_end)
        except ValueError as error:
            raise ValueError(f"{question.task} question {question.index}: {error}") from None
        for index, logprob, ids in zip(scored, scores.logprobs, scores.token_ids, strict=True):
            logprobs[index], token_ids[index] = logprob, ids
        by_byte = by_text and asking.normalize == "byte"
        lengths = [len(option.encode()) if by_byte else 1 for option in options]
        normalised = [logprob / length for logprob, length in zip(scores.logprobs, lengths, strict=True)]
        prediction = question.labels[scored[normalised.index(max(normalised))]]
    return Result(question.task, question.index, question.answer, prediction, logprobs, token_ids)


def run_benchmark(
    model: Llama,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    asking: Asking,
    *,
    name: str,
    out: Path | None = None,
    label: str = "eval",
) -> dict[str, Any]:
    """Evaluate and report; with `out`, that directory gets results.jsonl and report.json.

    Args:
        name: of the model, for the report.

    Returns: the report. Raises OSError before the long run where `out` can't be written.
    """
    if out is not None:
        make_writable(out)
    results = evaluate(model, tokenizer, questions, asking, label)
    report = {"model": name, "tasks": summarise(questions, results, asking.settings())}
    if out is not None:
        write_text(out / "results.jsonl", "".join(result.line() + "\n" for result in results))
        write_text(out / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return report
