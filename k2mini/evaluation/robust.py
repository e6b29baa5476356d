"""`k2mini eval --robust K`: the same questions in other orders and other words, and how much of the result stays."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from k2mini.data.tokenizer import Tokenizer
from k2mini.distributed import ALONE, World
from k2mini.evaluation.benchmarks import Question
from k2mini.evaluation.evaluate import digest, evaluate, kept_in
from k2mini.evaluation.instances import EvalConfig, Wording
from k2mini.evaluation.report import Result
from k2mini.evaluation.score import OtherModel
from k2mini.nn.llama import Llama

# The phrases of repeats, in turn; the published ones are `Wording()`.
WORDINGS = (
    Wording("Question: ", "Options:", "Is this statement true or false?"),
    Wording("Answer this question. ", "The possible answers are:", "Decide whether this is true or false."),
    Wording("Consider this question: ", "Which one of these is right?", "Judge this statement, true or false:"),
    Wording("Here is a question. ", "Select the best answer:", "State whether the following is true or false."),
    Wording("Please answer. ", "Pick one of these:", "The following statement is either true or false."),
)
# An option that speaks of others ("all of the above", "both A and C") is right in its place alone.
OF_OTHERS = re.compile(
    r"\b(?i:above|below|preceding|following|all of|none of)\b|\b[A-H] ?(?:,|/|&|and|or|nor) ?[A-H]\b"
)


def reordered(question: Question, repeat: int, seed: int) -> Question:
    """The question with its options' texts in another order, under the same labels; its key moves with its text.

    The order depends on the question's own text alone, so that copies stay copies. True/false questions, and those with
    an option that speaks of others, are left as they are.
    """
    if _stands(question):
        return question
    order = sorted(range(len(question.texts)), key=lambda place: digest([question.digest, place, repeat, seed]))
    answer = question.answer
    if answer in question.labels:
        answer = question.labels[order.index(question.labels.index(answer))]
    return replace(question, texts=tuple(question.texts[place] for place in order), answer=answer)


def run_robust(
    model: Llama | OtherModel,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    results: Sequence[Result],
    config: EvalConfig,
    *,
    repeats: int,
    out: Path | None = None,
    world: World = ALONE,
) -> dict[str, dict[str, Any]]:
    """Ask every question `repeats` times more, each time with options in another order and other phrases around it.

    Few-shot examples change with their questions; a file's, the template and the answer's beginning do not. Where
    options are not listed ('text', 'pmi'), and for true/false questions, only the phrases tell.

    Args:
        results: of the questions as published.
        out: a directory that keeps each repeat's results, as robust_1.jsonl and so on; a run that was killed goes on.

    Returns: of each task `accuracies`, one a repeat, their `lowest`, `highest`, `mean` and `sd` (None of one); `stays`,
    the part of all repeats' choices whose text is the published order's, and `always`, that of questions with no other;
    `shuffled`, how many questions' options are listed and may change places. Raises ValueError as `evaluate` does.
    """
    runs = []
    for repeat in range(1, repeats + 1):
        asked = [reordered(question, repeat, config.seed) for question in questions]
        journal = out / f"robust_{repeat}.jsonl" if out is not None else None
        with kept_in(journal):
            label = f"repeat {repeat}/{repeats}"
            how = replace(config, wording=WORDINGS[(repeat - 1) % len(WORDINGS)])
            runs.append(evaluate(model, tokenizer, asked, how, label, journal=journal, world=world))
    found = {}
    for task in dict.fromkeys(question.task for question in questions):
        places = [place for place, question in enumerate(questions) if question.task == task]
        accuracies = [sum(run[place].is_right for place in places) / len(places) for run in runs]
        same = [[_choice(run[place]) == _choice(results[place]) for run in runs] for place in places]
        found[task] = {
            "accuracies": accuracies,
            "lowest": min(accuracies),
            "highest": max(accuracies),
            "mean": statistics.fmean(accuracies),
            "sd": statistics.stdev(accuracies) if repeats > 1 else None,
            "stays": sum(map(sum, same)) / (len(places) * repeats),
            "always": sum(map(all, same)) / len(places),
            "shuffled": sum(not (config.by_text or _stands(questions[place])) for place in places),
        }
    return found


def _stands(question: Question) -> bool:
    """Whether the options may not change places."""
    return question.is_true_false or any(map(OF_OTHERS.search, question.texts))


def _choice(result: Result) -> str | None:
    """The text of the option that was chosen; the letter itself where no option has it."""
    if result.prediction in result.labels:
        return result.choices[result.labels.index(result.prediction)]
    return result.prediction
