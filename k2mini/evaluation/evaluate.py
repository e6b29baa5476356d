"""`k2mini eval`: questions in, results and their summary out; a run that was killed goes on."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from k2mini.data.documents import data_path
from k2mini.data.tokenizer import Tokenizer
from k2mini.distributed import ALONE, World
from k2mini.dtypes import NAMES
from k2mini.errors import StoppedBySignalError
from k2mini.evaluation.benchmarks import Question
from k2mini.evaluation.instances import EvalConfig, Instance, PromptBuilder
from k2mini.evaluation.report import Result, markdown, read_results, summarise
from k2mini.evaluation.score import OtherModel, score, tokens_to_run
from k2mini.files import output, progress_bar, read_json, sha256, write_text
from k2mini.inference.journal import Journal, rank_files
from k2mini.nn.llama import Llama

RESULTS, SETTINGS = "results.jsonl", "asking.json"
MARK = (SETTINGS, RESULTS, "report.json", "report.md")  # of a directory that `eval` goes on with


def evaluate(
    model: Llama | OtherModel,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    config: EvalConfig,
    label: str = "eval",
    *,
    share: bool = True,
    journal: Path | None = None,
    world: World = ALONE,
) -> list[Result]:
    """Answer every question with the option of the highest score.

    Args:
        label: of the progress bar.
        share: compute the prefix that prompts have in common once.
        journal: a file to which each result is added as it comes (see `Journal`); questions whose results it holds are
            not scored again, but where they share a batch with others.
        world: its ranks divide the questions among themselves; all of them call this, and get all results.

    Raises ValueError naming the question that can't be asked, or the line of the journal that is no result of one.
    """
    kept = None
    if journal is not None or world.size > 1:
        kept = Journal(journal, partial(_read_journal, questions=questions), lambda _, own: own.line(), world=world)
    done: dict[tuple[str, int], Result] = {} if kept is None else kept.entries
    instances = _instances(questions, config, tokenizer, model.config.max_seq_len)
    asked = [entry for entry in instances if entry.request is not None]
    requests = [entry.request for entry in asked if entry.request is not None]
    pending = [place for place, entry in enumerate(asked) if _key(entry) not in done]
    unasked = [entry for entry in instances if entry.request is None and _key(entry) not in done]
    done |= {_key(entry): _result(entry, [], config) for entry in unasked}
    if config.scoring == "pmi":
        _score_priors(model, asked, pending, config, world)
    # By tokens: the longest questions go first, and the time that questions take would be far overestimated.
    tokens = tokens_to_run(requests, share=share)
    total = sum(tokens[place] for place in pending) // world.size  # this rank's, or so
    with progress_bar(total, label, "tokens", shown=world.rank == 0 and bool(pending)) as progress:
        how: dict[str, Any] = {"batch_size": config.batch_size, "share": share, "wanted": pending, "world": world}
        for place, logprobs in score(model, requests, **how):
            if (key := _key(asked[place])) in done:
                continue
            done[key] = _result(asked[place], logprobs, config)
            if kept is not None:
                kept.add(key, done[key])
            progress.set_postfix_str(f"{len(done)}/{len(questions)} questions", refresh=False)
            progress.update(tokens[place])
    keys = [(question.task, question.index) for question in questions]
    if kept is not None:
        done = kept.finish(keys)
    return [done[key] for key in keys]


def _key(instance: Instance) -> tuple[str, int]:
    return instance.question.task, instance.question.index


def _instances(
    questions: Sequence[Question], config: EvalConfig, tokenizer: Tokenizer, max_seq_len: int
) -> list[Instance]:
    of_task: dict[str, list[Question]] = {}
    for question in questions:
        of_task.setdefault(question.task, []).append(question)
    builders = {task: PromptBuilder(own, config, tokenizer, max_seq_len) for task, own in of_task.items()}
    return [builders[question.task].build(question) for question in questions]


def _score_priors(
    model: Llama | OtherModel, asked: Sequence[Instance], pending: Sequence[int], config: EvalConfig, world: World
) -> None:
    """Score what 'pmi' subtracts, each distinct request once; of those that pend, in the batches of all."""
    distinct = [*dict.fromkeys(entry.prior for entry in asked if entry.prior is not None)]
    places = {prior: place for place, prior in enumerate(distinct)}
    own = [(asked[place], places[prior]) for place in pending if (prior := asked[place].prior) is not None]
    how: dict[str, Any] = {"batch_size": config.batch_size, "wanted": {place for _, place in own}, "world": world}
    found = dict(score(model, distinct, **how))
    for part in world.all_gather(found) if world.size > 1 else ():
        found |= part
    for entry, place in own:
        entry.priors = found[place]


def _result(instance: Instance, scores: Sequence[float], config: EvalConfig) -> Result:
    question = instance.question
    logprobs: list[float | None] = [None] * len(question.labels)
    token_ids: list[list[int]] = [[] for _ in question.labels]
    priors: list[float | None] = [None] * len(question.labels) if instance.prior is not None else []
    prediction = None
    lengths = [1] * len(scores)
    for number, (place, ids, logprob) in enumerate(zip(instance.places, instance.ids, scores, strict=True)):
        if place is None:
            continue
        logprobs[place], token_ids[place] = logprob, ids
        if instance.priors:
            priors[place] = instance.priors[number]
        if config.scoring == "text" and not question.is_true_false and config.normalize != "none":
            text = question.texts[place]
            lengths[number] = len(text.encode()) if config.normalize == "byte" else len(ids)
    if scores:
        corrected = zip(scores, instance.priors or [0.0] * len(scores), lengths, strict=True)
        normalised = [(logprob - prior) / length for logprob, prior, length in corrected]
        prediction = instance.answers[normalised.index(max(normalised))]
    asked, cut = (question.task, question.index, question.answer), (instance.dropped, instance.cut)
    kept = {**_text(question), "priors": priors}
    return Result(*asked, prediction, logprobs, token_ids, *cut, question.digest, **kept)


def _text(question: Question) -> dict[str, Any]:
    """What a reader of a result wants to see of its question."""
    shown = {"question": question.stem, "labels": list(question.labels), "choices": list(question.texts)}
    return {**shown, "topic": question.topic}


def _read_journal(path: Path, questions: Sequence[Question]) -> dict[tuple[str, int], Result]:
    """The results in a file, each compared with the question that is asked now."""
    if not os.path.lexists(path):
        return {}
    asked = {(question.task, question.index): question for question in questions}
    done = {(result.task, result.index): result for result in read_results(path)}
    for key, result in done.items():
        what = f"{path} has a result of question {key[1]} of {key[0]!r}"
        if key not in asked:
            raise ValueError(f"{what}, which is not asked now and would be lost (--limit, --tasks); name another --out")
        if (asked[key].digest, asked[key].answer) != (result.digest, result.answer):
            raise ValueError(f"{what}, which has another text or key now; name another --out")
        done[key] = replace(result, **_text(asked[key]))  # an older k2mini kept none
    return done


def run_benchmark(
    model: Llama | OtherModel,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    config: EvalConfig,
    *,
    name: str,
    out: Path | None = None,
    made_by: Mapping[str, Any] | None = None,
    world: World = ALONE,
    **how: Any,
) -> tuple[dict[str, Any], list[Result]]:
    """Evaluate. The directory `out`, where given, keeps each result as it comes; the rest is `write_report`'s.

    Args:
        name: of the model, for the report.
        made_by: what else results in `out` are known by: `model`, the fingerprint of its weights, `adapter` and so on.
        world: as of `evaluate`, which takes `how`.

    Returns: the report, and the results in the order of the questions. Raises ValueError before the long run where
    `out` can't be written, or holds results of another model, of other questions, or of questions asked in another way.
    """
    journal, made_by = None if out is None else out / RESULTS, made_by or {}
    with output(out if world.rank == 0 else None, mark=MARK):
        if out is not None and world.rank == 0:
            of_model = {
                "config": digest(model.config.features()),
                "dtype": NAMES[model.dtype] if model.dtype else "unknown",
            }
            settings = {"model": name, **made_by, **of_model, **_asking(tokenizer, questions, config)}
            _check_settings(out, settings)
            if not (out / SETTINGS).is_file():
                write_text(out / SETTINGS, json.dumps(settings, ensure_ascii=False) + "\n")
        with kept_in(journal):
            results = evaluate(model, tokenizer, questions, config, journal=journal, world=world, **how)
    report = {
        "model": name,
        "fingerprint": made_by.get("model"),
        "seed": config.seed,
        "versions": {"k2mini": version("k2mini"), "torch": torch.__version__} | getattr(model, "versions", {}),
        "tasks": summarise(questions, results, config.settings()),
    }
    return report, results


def write_report(out: Path, report: Mapping[str, Any], results: Sequence[Result]) -> None:
    """Write what `run_benchmark` gave: results.jsonl in the order of the questions, report.json and report.md."""
    if results:
        write_text(out / RESULTS, "".join(result.line() + "\n" for result in results))
    write_text(out / "report.md", markdown(report))
    write_text(out / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")


def check_kept(
    out: Path, questions: Sequence[Question], config: EvalConfig, tokenizer: Tokenizer, made_by: Mapping[str, Any]
) -> None:
    """Raise ValueError where `out` holds results of something else, as far as it is known without the model."""
    if (out / SETTINGS).is_file():
        _check_settings(out, {**made_by, **_asking(tokenizer, questions, config)}, later=("config", "dtype"))
        for path in (out / RESULTS, *rank_files(out / RESULTS)):
            _read_journal(path, questions)


@contextmanager
def kept_in(journal: Path | None) -> Iterator[None]:
    """Let Ctrl-C inside say where the results so far are."""
    try:
        yield
    except KeyboardInterrupt:
        if journal is None:
            raise
        raise StoppedBySignalError(signal.SIGINT, f"the results so far are in {journal}") from None


def _asking(tokenizer: Tokenizer, questions: Sequence[Question], config: EvalConfig) -> dict[str, Any]:
    """What `asking.json` keeps of how questions are asked. Each result says itself which question it is of."""
    asking = {"tokenizer": tokenizer.fingerprint(), **config.settings()}
    asking["template"] += config.template.digest
    if config.fewshot_file is not None:
        asking["examples"] = sha256(data_path(config.fewshot_file))
    if config.num_fewshot:  # examples are drawn from all questions
        asking["questions"] = digest([(question.index, question.digest, question.answer) for question in questions])
    return asking


def digest(value: Any) -> str:
    """SHA-256 of a plain value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _check_settings(out: Path, settings: dict[str, Any], later: Sequence[str] = ()) -> None:
    """Compare how the results in `out` were made with how they would be made now, but for what is known `later`."""
    path = out / SETTINGS
    if not path.is_file():
        if (out / RESULTS).is_file():
            raise ValueError(f"{out} holds results, but no {SETTINGS} that says how they were made; name another --out")
        return
    known = read_json(path)
    if not isinstance(known, dict):
        raise ValueError(f"{path} is no JSON object, so how the results were made is unknown; name another --out")
    missing = [key for key in ("model", "config", "dtype", "tokenizer") if key not in known]
    if missing:
        raise ValueError(
            f"{path}, which an older k2mini wrote, does not say with which {', '.join(missing)} the results were made; "
            "name another --out"
        )
    for key in [key for key in {**known, **settings} if key not in later]:
        before, now = known.get(key), settings.get(key)
        if before != now:
            hashed = any(isinstance(value, str) and len(value) == 64 for value in (before, now))
            odd = f"of another {key}" if hashed else f"with {key} {before!r:.80}, not {now!r:.80}"
            raise ValueError(f"{out} holds results {odd}; name another --out")
