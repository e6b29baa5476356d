"""Open answers judged by another model: how likely it finds them, and which of two answers it prefers."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import Any

from k2mini.data.prompts import AnyTemplate
from k2mini.data.tokenizer import Tokenizer
from k2mini.errors import short
from k2mini.evaluation.endpoint import Endpoint
from k2mini.evaluation.evaluate import digest, kept_in
from k2mini.evaluation.report import read_sealed, sealed
from k2mini.evaluation.score import OtherModel, Request, score, split_jointly
from k2mini.evaluation.scores import Key, OpenAnswer, Score, keyed, read_answers, write_scores
from k2mini.files import progress_bar, read_json, write_text
from k2mini.nn.llama import Llama
from k2mini.training.plot import short_names

JUDGED = "judged.jsonl"  # of a run: all that evaluators said of its answers
LETTERS, UNCLEAR = "ABC", "?"
PREFERENCE = "preference"
# GPTScore's aspects with their definitions (Fu et al. 2023, arXiv 2302.04166), questions made statements.
# Rationality, which K2's people rate, is none of them: its words are ours.
ASPECTS = {
    "rationality": "The answer is rational: what it says follows from sound reasoning.",
    "correctness": "The answer is correct and does not misunderstand the question.",
    "consistency": "The answer is consistent in the information it provides.",
}
LIKELY = "Answer the following question. {definition}\n\nQuestion: {question}\n\nAnswer:"
PREFER = (
    "Which of two answers to a question is better? Judge by how correct, sound and helpful they are, not by their "
    "order or length.\n\nQuestion: {question}\n\nAnswer A: {first}\n\nAnswer B: {second}\n\n"
    "Reply with one letter alone: A or B, whichever answer is better, or C where neither is."
)

Item = tuple[str, str | None]  # a prompt and the answer after it, whose likelihood is wanted; None: one of LETTERS is
Value = float | str | None  # mean log-probability of the answer's tokens, in nats; a letter; None: it is too long
Judge = Callable[[Sequence[Item]], Iterator[tuple[Item, Value]]]


def read_aspects(path: Path) -> dict[str, str]:
    """Aspect -> the sentence that defines it, from a JSON object. Raises ValueError naming file and aspect."""
    raw = read_json(path)
    if not isinstance(raw, dict) or not raw:
        raise ValueError(f"{path} must hold a JSON object of aspects with their definitions, not {short(raw)}")
    for name, text in raw.items():
        if not re.fullmatch(r"[\w-]+", name):
            raise ValueError(f"{path}: {short(name)} is no name of an aspect: letters, digits, _ and - alone")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{path}: {name} must have a sentence that defines it, not {short(text)}")
    return raw


def read_runs(runs: Sequence[Path]) -> list[dict[Key, OpenAnswer]]:
    """Of each run its answers to the questions that all of them answered, in order.

    Raises ValueError where a run has no open answers, or none to the questions of the others.
    """
    found: list[dict[Key, OpenAnswer]] = []
    for run in runs:
        answers = keyed(each for task in read_answers(run).values() for each in task)
        if not answers:
            tasks = "evaluate with --tasks npee/noun and such, by this k2mini"
            raise ValueError(f"{run} has no open answers, open_TASK.jsonl of k2mini eval --out; {tasks}")
        found.append({key: answer for (_, key), answer in answers.items()})
    shared = [{key: own[key] for key in own if all(key in other for other in found)} for own in found]
    if not shared[0]:
        names = ", ".join(map(str, runs))
        raise ValueError(f"{names} answered other questions, none of them in all; were --tasks and --limit the same?")
    return shared


def judge_here(
    model: Llama | OtherModel, tokenizer: Tokenizer, template: AnyTemplate, items: Sequence[Item], batch_size: int
) -> Iterator[tuple[Item, Value]]:
    """What a model here says of each item, the longest first; of letters the likeliest after the template's prompt."""
    asked, requests = [], []
    for item in items:
        if item[1] is not None:
            prefix, ids = split_jointly(tokenizer, item[0], [f" {item[1]}"])
        else:
            letters = [template.lead + letter for letter in LETTERS]
            try:
                prompt = template.prompt(item[0])
            except ValueError as error:
                raise ValueError(f"two answers can't be asked about: {error}; name another --template") from None
            prefix, ids = split_jointly(tokenizer, prompt, letters, bos=template.bos, special=template.special)
        if len(prefix) + max(map(len, ids)) - 1 > model.config.max_seq_len:
            yield item, None
            continue
        asked.append(item)
        requests.append(Request(tuple(prefix), tuple(map(tuple, ids))))
    for place, sums in score(model, requests, batch_size=batch_size, share=False):
        chosen = asked[place][1] is None
        yield asked[place], LETTERS[sums.index(max(sums))] if chosen else sums[0] / len(requests[place].options[0])


def judge_there(endpoint: Endpoint, items: Sequence[Item], workers: int) -> Iterator[tuple[Item, Value]]:
    """What an endpoint says of each item, in their order; a letter is what it replies in a chat.

    Raises ValueError as `Endpoint` does.
    """

    def ask(item: Item) -> Value:
        prompt, answer = item
        if answer is not None:
            tokens = endpoint.token_logprobs(f"{prompt} {answer}")
            ends = [begin for begin, _ in tokens[1:]] + [len(prompt) + 1]
            values = [value or 0.0 for (_, value), end in zip(tokens, ends, strict=True) if end > len(prompt)]
            return sum(values) / len(values)
        messages = [{"role": "user", "content": prompt}]
        reply = endpoint.post("chat/completions", {"messages": messages, "temperature": 0, "max_tokens": 512})
        try:
            return verdict(reply["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"{endpoint.url} answers a chat with {short(reply)}, which has no message") from None

    pool = ThreadPoolExecutor(workers)
    try:
        yield from zip(items, pool.map(ask, items), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def verdict(reply: str) -> str:
    """The letter of a reply: in its last line that is nothing but one, `Answer:` before it or not; else UNCLEAR."""
    found = re.findall(r"^\W*(?:[Aa]nswer\W*)?([ABC])\W*$", reply, re.MULTILINE)
    return found[-1] if found else UNCLEAR


def judge(
    runs: Sequence[Path],
    answers: Sequence[Mapping[Key, OpenAnswer]],
    asked: Judge,
    made_by: Mapping[str, Any],
    name: str,
    aspects: Mapping[str, str],
    pairs: bool,
) -> list[dict[str, Any]]:
    """Judge the answers of runs, and add the scores to each, as scores_judge_NAME.jsonl.

    GPTScore (Fu et al. 2023, arXiv 2302.04166, all weights equal) is the mean log-probability of an answer's tokens
    after `LIKELY`; an answer without text has none. Of two answers one is preferred, and scores 1, where the evaluator
    prefers it in both orders; all else is a tie (Zheng et al. 2023, arXiv 2306.05685, section 3.4), and scores 0.5.

    Args:
        answers: `read_runs` of the runs.
        asked: `judge_here` or `judge_there`. What `JUDGED` of a run has from an earlier start is not asked again.
        made_by: by what judgements are known, beside what is asked.
        name: of the evaluator, in names of files and measures.
        aspects: name -> definition, for GPTScore.
        pairs: compare each run with each.

    Returns: of each task `task`, `n` and `runs`: means of `gptscore_ASPECT` and `preference`, and `left_out`, how many
    answers lack one, being empty or too long; and, with `pairs`, `orders`: the shares of comparisons that are
    `consistent`, with one verdict in both orders, or go `always_first` or `always_second`, to whichever answer stood
    there; how many were `compared`, and how many replies are `unclear`.
    """
    wanted = defaultdict[Item, set[Path]](set)
    for run, own in zip(runs, answers, strict=True):
        for item in (_likely(answer, text) for answer in own.values() for text in aspects.values()):
            wanted[item].add(run)
    places = combinations(range(len(runs)), 2) if pairs else ()
    versus = {(a, b, key): _both(answers[a][key], answers[b][key]) for a, b in places for key in answers[0]}
    for (a, b, _), both in versus.items():
        for item in both:
            wanted[item] |= {runs[a], runs[b]}
    said = _say(asked, wanted, made_by)
    verdicts = {place: f"{said[one]}{said[two]}" for place, (one, two) in versus.items() if said[one] and said[two]}
    # Preferences are named after all that was compared, so that `compare` pairs no others.
    compared = digest(sorted(digest(sorted([*key, own[key].answer] for key in own)) for own in answers))[:6]
    found: list[dict[str, dict[Key, float]]] = []  # of each run: measure -> question -> value
    for place, own in enumerate(answers):
        found.append({PREFERENCE: _preferences(place, verdicts)} if pairs else {})
        for aspect, text in aspects.items():
            values = ((key, said[_likely(answer, text)]) for key, answer in own.items())
            found[-1][f"gptscore_{aspect}"] = {key: value for key, value in values if isinstance(value, float)}
        scores = []
        for measure, of_run in found[-1].items():
            full = f"{measure}@{name}" + f"#{compared}" * (measure == PREFERENCE)
            scores += [Score(own[key].task, own[key].index, key[0], full, x, key[1]) for key, x in of_run.items()]
        write_scores(runs[place], f"judge_{name}", scores)
    tasks = defaultdict[str, list[Key]](list)
    for key, answer in answers[0].items():
        tasks[answer.task].append(key)
    return [_summary(task, keys, runs, found, verdicts) for task, keys in tasks.items()]


def _likely(answer: OpenAnswer, definition: str) -> Item:
    return LIKELY.format(definition=definition, question=answer.question), answer.answer.strip()


def _both(one: OpenAnswer, two: OpenAnswer) -> list[Item]:
    """The question which of two answers is better, in both orders."""
    texts, question = (one.answer.strip(), two.answer.strip()), one.question
    return [(PREFER.format(question=question, first=a, second=b), None) for a, b in (texts, texts[::-1])]


def _say(asked: Judge, wanted: Mapping[Item, set[Path]], made_by: Mapping[str, Any]) -> dict[Item, Value]:
    """What is said of each item, now or before; the runs that it concerns keep it."""
    keys, known = {item: digest([made_by, *item]) for item in wanted}, dict[str, Value]()
    journals = sorted({run / JUDGED for runs in wanted.values() for run in runs})
    for path in filter(Path.exists, journals):
        try:
            lines = [raw for _, raw in read_sealed(path)]
        except ValueError:
            raise ValueError(f"{path} is not as it was written; remove it, and all is judged anew") from None
        write_text(path, "".join(sealed(raw) + "\n" for raw in lines))  # without a line that was cut
        known |= {raw["key"]: raw["value"] for raw in lines}
    # Sorted: the order of runs has no part in it.
    new = sorted((item for item in wanted if keys[item] not in known and item[1] != ""), key=str)
    with kept_in(journals[0]), progress_bar(len(new), "judge", "judgements") as progress:
        for item, value in asked(new):
            known[keys[item]] = value
            for run in wanted[item]:
                with (run / JUDGED).open("a", encoding="utf-8") as file:
                    file.write(sealed({"key": keys[item], "value": value}) + "\n")
            progress.update(1)
    return {item: known.get(key) for item, key in keys.items()}


def _preferences(place: int, verdicts: Mapping[tuple[int, int, Key], str]) -> dict[Key, float]:
    """How often a run's answers are preferred to those of other runs."""
    shares = defaultdict[Key, list[float]](list)
    for (a, b, key), both in verdicts.items():  # AB is for a, in both orders; seen from b it is BA
        if place in (a, b):
            shares[key].append({"AB": 1.0, "BA": 0.0}.get(both if place == a else both[::-1], 0.5))
    return {key: sum(each) / len(each) for key, each in shares.items()}


def _summary(
    task: str,
    keys: Sequence[Key],
    runs: Sequence[Path],
    found: Sequence[Mapping[str, Mapping[Key, float]]],
    verdicts: Mapping[tuple[int, int, Key], str],
) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for run, values in zip(runs, found, strict=True):
        rows.append({"run": str(run)})
        for measure, of_run in values.items():
            of_task = [of_run[key] for key in keys if key in of_run]
            rows[-1][measure] = math.fsum(of_task) / len(of_task) if of_task else None
        rows[-1]["left_out"] = sum(any(key not in of_run for of_run in values.values()) for key in keys)
    said = Counter(both for (*_, key), both in verdicts.items() if key in keys)
    counts = {"consistent": ("AB", "BA", "CC"), "always_first": ("AA",), "always_second": ("BB",)}
    orders: dict[str, float] = {}
    if n := sum(said.values()):
        orders = {name: sum(said[both] for both in those) / n for name, those in counts.items()}
        orders["compared"], orders["unclear"] = n, sum(both.count(UNCLEAR) * number for both, number in said.items())
    return {"task": task, "n": len(keys), "runs": rows, "orders": orders}


def judge_table(tasks: Sequence[Mapping[str, Any]], name: str) -> str:
    """The report for people to read."""
    lines = []
    for row in tasks:
        runs = short_names(entry["run"] for entry in row["runs"])
        width, heads = max(map(len, runs)), [key.replace("_", " ") for key in row["runs"][0] if key != "run"]
        lines.append(f"{row['task']}, {row['n']} questions, by {name}")
        lines.append("  ".join([" " * width, *(f"{head:>11}" for head in heads)]))
        for run, entry in zip(runs, row["runs"], strict=True):
            cells = [f"{value:.4f}" if isinstance(value, float) else str(value) for value in [*entry.values()][1:]]
            aligned = (f"{cell:>{max(len(head), 11)}}" for cell, head in zip(cells, heads, strict=True))
            lines.append("  ".join([f"{run:<{width}}", *aligned]))
        if orders := row["orders"]:
            said = {key: f"{100 * value:.1f} %" for key, value in orders.items()}
            whoever = f"for whichever came first {said['always_first']}, second {said['always_second']}"
            unclear = f"replies without a verdict: {orders['unclear']}"
            lines.append(f"the same verdict in both orders {said['consistent']}, {whoever}; {unclear}")
    return "\n".join(lines)
