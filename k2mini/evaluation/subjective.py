"""NPEE's open tasks: answers to be read, and measures that need no other model."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from k2mini.data.chats import stop_ids
from k2mini.data.prompts import AnyTemplate
from k2mini.data.tokenizer import Tokenizer
from k2mini.distributed import ALONE, World
from k2mini.evaluation.evaluate import kept_in
from k2mini.evaluation.measures import rouge_l, token_f1, words
from k2mini.evaluation.perplexity import from_loss
from k2mini.evaluation.report import accuracy, read_sealed, sealed
from k2mini.evaluation.score import OtherModel, Request, num_tokens, score, split_jointly
from k2mini.evaluation.scores import OpenAnswer, task_file, write_answers
from k2mini.files import write_text
from k2mini.inference.answers import answers
from k2mini.inference.decoding import Decoding
from k2mini.inference.journal import Journal
from k2mini.nn.llama import Llama
from k2mini.nn.uneven import uneven


class OpenQuestion(NamedTuple):
    """A question, the reference answer, and, where that can be decided, what says if an answer is right, and how."""

    question: str
    reference: str
    is_right: Callable[[str], bool] | None = None
    match: str = ""


Pair = tuple[str, str] | OpenQuestion


def run_subjective(
    model: Llama | OtherModel,
    tokenizer: Tokenizer,
    pairs: Sequence[Pair],
    decoding: Decoding,
    *,
    task: str,
    template: AnyTemplate,
    out: Path | None = None,
    world: World = ALONE,
) -> dict[str, Any]:
    """Answer open questions, compare the answers with the references, and measure how likely the references are.

    Args:
        pairs: (question, reference answer), or `OpenQuestion`s.
        out: a directory for the answers, as K2 lays them out: a JSON list of `question` and `answer`. Each is added to
            a .jsonl beside as it comes, and those that stand there from an earlier start are not made again. Scores,
            question by question, are in `open_TASK.jsonl`.
        world: its ranks divide the questions among themselves; all of them call this, and the first one writes.

    Returns: a summary: `rouge_l` and `token_f1` of the answers; `words` and `reference_words`, the mean lengths;
    `likelihood`, the mean log-probability of a reference's token in nats, given the question, under the model that
    answers; `perplexity`, exp of its negative; `left_out`, how many questions were not asked because they or their
    reference are empty or too long for the context; where it can be decided what is right, `accuracy` with its interval
    and `match`, how. None of these is GPTScore (Fu et al. 2023, arXiv 2302.04166): there another model scores answers.

    Raises ValueError where no question is left, or `out` holds answers to others.
    """
    kept, requests, prompts = _prepare(model, tokenizer, pairs, template)
    if not kept:
        raise ValueError(f"{task}: no question fits the model's context of {model.config.max_seq_len} tokens")
    logprobs = dict(score(model, requests, batch_size=decoding.batch_size, world=world))
    for part in world.all_gather(logprobs) if world.size > 1 else []:
        logprobs |= part
    lengths = [num_tokens(model, request)[0] for request in requests]
    likelihood = sum(logprobs[place][0] for place in range(len(kept))) / sum(lengths)
    asked = [pairs[place][0] for place in kept]
    path = None if out is None else out / task_file("answers", task)
    answer = partial(_made, model, tokenizer, decoding, stop_ids(tokenizer, template), task, world)
    with kept_in(path):
        texts = _answers(asked, prompts, answer, path, world)
    likely = [logprobs[number][0] / length for number, length in enumerate(lengths)]
    found = [_scored(task, pairs[own[0]], *own) for own in zip(kept, texts, likely, strict=True)]
    if out is not None and path is not None and world.rank == 0:
        write_answers(out, task, found)
        entries = [{"question": question, "answer": text} for question, text in zip(asked, texts, strict=True)]
        write_text(path.with_suffix(".json"), json.dumps(entries, ensure_ascii=False, indent=1) + "\n")
    match = OpenQuestion(*pairs[kept[-1]]).match
    return _summary(found, len(pairs) - len(kept), likelihood, template.name, match)


def _scored(task: str, pair: Pair, place: int, answer: str, likelihood: float) -> OpenAnswer:
    question, reference, is_right, _ = OpenQuestion(*pair)
    scores = {"rouge_l": rouge_l(answer, reference), "token_f1": token_f1(answer, reference), "likelihood": likelihood}
    scores |= {"accuracy": float(is_right(answer))} if is_right is not None else {}
    return OpenAnswer(task, place, question, reference, answer, scores)


def _made(
    model: Llama | OtherModel,
    tokenizer: Tokenizer,
    decoding: Decoding,
    ends: Sequence[int],
    task: str,
    world: World,
    prompts: list[list[int]],
) -> Iterator[str]:
    """The answers to this rank's prompts."""
    if not isinstance(model, Llama):
        yield from model.answers(prompts, decoding, ends) if prompts else ()
        return
    with uneven(model, world) if world.size > 1 else nullcontext():
        if prompts:
            label = task if world.rank == 0 else None
            yield from (text for text, _ in answers(model, tokenizer, prompts, decoding, label=label, stop_ids=ends))


def _summary(
    found: Sequence[OpenAnswer], left_out: int, likelihood: float, template: str, match: str
) -> dict[str, Any]:
    number, right = len(found), [answer.scores["accuracy"] == 1 for answer in found if "accuracy" in answer.scores]
    return {
        "task": found[0].task,
        "n": number,
        "left_out": left_out,
        "rouge_l": sum(answer.scores["rouge_l"] for answer in found) / number,
        "token_f1": sum(answer.scores["token_f1"] for answer in found) / number,
        **({**accuracy(right), "match": match} if right else {}),
        "words": sum(len(words(answer.answer)) for answer in found) / number,
        "reference_words": sum(len(words(answer.reference)) for answer in found) / number,
        "likelihood": likelihood,
        "perplexity": from_loss(-likelihood),
        "template": template,
    }


def _answers(
    questions: list[str],
    prompts: list[list[int]],
    answer: Callable[[list[list[int]]], Iterator[str]],
    journal: Path | None,
    world: World,
) -> list[str]:
    """The answers, each kept as it comes; a line of the journal is the answer to the next of a question's places."""
    places: dict[str, deque[int]] = {}
    for place, question in enumerate(questions):
        places.setdefault(question, deque()).append(place)

    def read(file: Path) -> dict[int, str]:
        found = {}
        for where, raw in read_sealed(file):
            if (question := str(raw.get("question"))) not in places:
                raise ValueError(f"{where} answers another question than is asked now; name another --out")
            if places[question]:
                found[places[question].popleft()] = raw["answer"]
        return found

    def line(place: int, text: str) -> str:
        return sealed({"question": questions[place], "answer": text})

    kept = Journal(journal, read, line, world=world)
    mine = [place for place in range(len(prompts)) if place not in kept.entries][world.rank :: world.size]
    if mine or world.size > 1:  # ranks that share a model call it together
        for place, text in zip(mine, answer([prompts[place] for place in mine]), strict=True):
            kept.add(place, text)
    texts = kept.finish(range(len(prompts)))
    return [texts[place] for place in range(len(prompts))]


def _prepare(
    model: Llama | OtherModel, tokenizer: Tokenizer, pairs: Sequence[Pair], template: AnyTemplate
) -> tuple[list[int], list[Request], list[list[int]]]:
    """The places of the pairs that can be asked, the requests that score their references, and the prompts."""
    flags = {"bos": template.bos, "special": template.special}
    kept, requests, prompts = [], [], []
    for place, (question, reference, *_) in enumerate(pairs):
        if not question.strip() or not reference.strip():
            continue
        prompt = template.prompt(question)
        prefix, (ids,) = split_jointly(tokenizer, prompt, [template.lead + reference], **flags)
        prompt_ids = tokenizer.encode(prompt, eos=False, **flags)
        if max(len(prefix) + len(ids), len(prompt_ids) + 1) <= model.config.max_seq_len:
            kept.append(place)
            requests.append(Request(tuple(prefix), (tuple(ids),)))
            prompts.append(prompt_ids)
    return kept, requests, prompts
