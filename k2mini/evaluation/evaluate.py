"""`k2mini eval`: questions in, results and their summary out; a run that was killed goes on."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from k2mini.data.tokenizer import Tokenizer
from k2mini.errors import StoppedBySignalError
from k2mini.evaluation.benchmarks import Question
from k2mini.evaluation.instances import EvalConfig, Instance, PromptBuilder
from k2mini.evaluation.report import Result, markdown, summarise
from k2mini.evaluation.score import score, tokens_to_run
from k2mini.files import check_output, progress_bar, read_json, write_text
from k2mini.nn.llama import Llama

RESULTS, SETTINGS = "results.jsonl", "asking.json"


def evaluate(
    model: Llama,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    config: EvalConfig,
    label: str = "eval",
    *,
    share: bool = True,
    journal: Path | None = None,
    shown: bool = True,
) -> list[Result]:
    """Answer every question with the option of the highest score.

    Args:
        label: of the progress bar.
        share: compute the prefix that prompts have in common once.
        journal: a file to which each result is added as it comes; questions whose results it holds are not scored
            again.
        shown: show the progress bar.

    Raises ValueError naming the question that can't be asked.
    """
    done = _read_journal(journal) if journal is not None else {}
    tasks = dict.fromkeys(question.task for question in questions)
    builders = {
        task: PromptBuilder([q for q in questions if q.task == task], config, tokenizer, model.config.max_seq_len)
        for task in tasks
    }
    instances = [builders[q.task].build(q) for q in questions if (q.task, q.index) not in done]
    pending = [entry for entry in instances if entry.request is not None]
    for entry in instances:
        if entry.request is None:
            result = _result(entry, [], config)
            done[result.task, result.index] = result
    requests = [entry.request for entry in pending if entry.request is not None]
    file = journal.open("a", encoding="utf-8") if journal is not None else None
    try:
        # By tokens: the longest questions go first, and the time that questions take would be far overestimated.
        tokens = tokens_to_run(requests, share=share)
        with progress_bar(sum(tokens), label, "tokens", shown=shown and bool(pending)) as progress:
            for place, logprobs in score(model, requests, batch_size=config.batch_size, share=share):
                result = _result(pending[place], logprobs, config)
                done[result.task, result.index] = result
                if file is not None:
                    file.write(result.line() + "\n")
                    file.flush()
                progress.set_postfix_str(f"{len(done)}/{len(questions)} questions", refresh=False)
                progress.update(tokens[place])
    finally:
        if file is not None:
            file.close()
    return [done[question.task, question.index] for question in questions]


def _result(instance: Instance, scores: Sequence[float], config: EvalConfig) -> Result:
    question = instance.question
    logprobs: list[float | None] = [None] * len(question.labels)
    token_ids: list[list[int]] = [[] for _ in question.labels]
    prediction = None
    lengths = [1] * len(scores)
    for number, (place, ids, logprob) in enumerate(zip(instance.places, instance.ids, scores, strict=True)):
        if place is None:
            continue
        logprobs[place], token_ids[place] = logprob, ids
        if config.scoring == "text" and not question.is_true_false and config.normalize != "none":
            text = question.texts[place]
            lengths[number] = len(text.encode()) if config.normalize == "byte" else len(ids)
    if scores:
        normalised = [logprob / length for logprob, length in zip(scores, lengths, strict=True)]
        prediction = instance.answers[normalised.index(max(normalised))]
    return Result(
        question.task, question.index, question.answer, prediction, logprobs, token_ids, instance.dropped, instance.cut
    )


def _read_journal(path: Path) -> dict[tuple[str, int], Result]:
    """The results that an earlier start wrote. A last line that was cut is removed from the file."""
    if not path.is_file():
        return {}
    whole, done = [], {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            result = Result(**json.loads(line))
        except (json.JSONDecodeError, TypeError):
            break
        done[result.task, result.index] = result
        whole.append(line)
    write_text(path, "".join(line + "\n" for line in whole))
    return done


def run_benchmark(
    model: Llama,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    config: EvalConfig,
    *,
    name: str,
    out: Path | None = None,
    label: str = "eval",
    fingerprint: str | None = None,
) -> dict[str, Any]:
    """Evaluate and report. The directory `out`, where given, gets results.jsonl, report.json and report.md.

    Args:
        name: of the model, for the report.
        label: of the progress bar.
        fingerprint: of the model's weights, by which results in `out` are known to be this model's.

    Returns: the report. Raises OSError before the long run where `out` can't be written, ValueError where it holds
    results of another model or of questions asked in another way.
    """
    journal = None
    if out is not None:
        check_output(out, mark=SETTINGS)
        out.mkdir(parents=True, exist_ok=True)
        journal = out / RESULTS
        _check_settings(out, {"model": fingerprint or name, **config.settings()})
    try:
        results = evaluate(model, tokenizer, questions, config, label, journal=journal)
    except KeyboardInterrupt:
        if journal is None:
            raise
        raise StoppedBySignalError(signal.SIGINT, f"the results so far are in {journal}") from None
    report = {
        "model": name,
        "fingerprint": fingerprint,
        "seed": config.seed,
        "versions": {"k2mini": version("k2mini"), "torch": torch.__version__},
        "tasks": summarise(questions, results, config.settings()),
    }
    if out is not None:
        write_text(out / RESULTS, "".join(result.line() + "\n" for result in results))
        write_text(out / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
        write_text(out / "report.md", markdown(report))
    return report


def _check_settings(out: Path, settings: dict[str, Any]) -> None:
    path = out / SETTINGS
    if path.is_file():
        known = read_json(path)
        odd = [key for key in {**known, **settings} if known.get(key) != settings.get(key)]
        if odd:
            raise ValueError(
                f"{out} holds results with {odd[0]} {known.get(odd[0])!r}, not {settings.get(odd[0])!r}; "
                "name another --out"
            )
    elif (out / RESULTS).is_file():
        raise ValueError(f"{out} holds results, but no {SETTINGS} that says how they were made; name another --out")
    else:
        write_text(path, json.dumps(settings, ensure_ascii=False) + "\n")
