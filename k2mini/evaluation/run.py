"""`k2mini eval`: questions in, results and their summary out."""

from __future__ import annotations

from collections.abc import Sequence

from k2mini.evaluation.geobench import Question
from k2mini.evaluation.report import Result
from k2mini.evaluation.score import score_options
from k2mini.nn.llama import Llama
from k2mini.progress import progress_bar
from k2mini.text.prompts import Template
from k2mini.text.tokenizer import Tokenizer

SCORINGS = ("letter", "text")


def evaluate(
    model: Llama,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    template: Template,
    scoring: str,
    answer_prefix: str = "",
) -> list[Result]:
    """Answer every question with the option of the highest score.

    Args:
        scoring: 'letter' scores log p(label); 'text' scores log p(option's text) per UTF-8 byte, so that long options
            are not at a disadvantage.

    Raises ValueError naming the question that does not fit the model's context.
    """
    if scoring not in SCORINGS:
        raise ValueError(f"scoring must be one of {', '.join(SCORINGS)}, not {scoring!r}")
    results = []
    with progress_bar(len(questions), "eval", "questions") as progress:
        for question in questions:
            results.append(_answer(model, tokenizer, question, template, scoring, answer_prefix))
            progress.update()
    return results


def _answer(
    model: Llama, tokenizer: Tokenizer, question: Question, template: Template, scoring: str, answer_prefix: str
) -> Result:
    continuations = question.asked(scoring)[1]
    scored = [index for index, text in enumerate(continuations) if text.strip()]
    logprobs: list[float | None] = [None] * len(continuations)
    token_ids: list[list[int]] = [[] for _ in continuations]
    prediction = None
    if scored:
        context = question.context(template, scoring, answer_prefix)
        try:
            scores = score_options(model, tokenizer, context, [continuations[index] for index in scored])
        except ValueError as error:
            raise ValueError(f"{question.task} question {question.index}: {error}") from None
        for index, logprob, ids in zip(scored, scores.logprobs, scores.token_ids, strict=True):
            logprobs[index], token_ids[index] = logprob, ids
        # Labels are compared as they are, the words of a true/false question too.
        by_byte = continuations != question.labels
        lengths = [len(continuations[index].encode()) if by_byte else 1 for index in scored]
        normalised = [logprob / length for logprob, length in zip(scores.logprobs, lengths, strict=True)]
        prediction = question.labels[scored[normalised.index(max(normalised))]]
    return Result(question.task, question.index, question.answer, prediction, logprobs, token_ids)
