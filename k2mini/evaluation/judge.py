"""Open answers judged by another model: how likely it finds them, and which of two answers it prefers."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from k2mini.data.prompts import AnyTemplate
from k2mini.data.tokenizer import Tokenizer
from k2mini.errors import short
from k2mini.evaluation.endpoint import Endpoint, TooLongError, at_a_time
from k2mini.evaluation.evaluate import digest, kept_in
from k2mini.evaluation.report import read_sealed, sealed
from k2mini.evaluation.score import OtherModel, Request, score, split_jointly
from k2mini.evaluation.scores import Key, OpenAnswer, keyed, orders_line, read_answers, write_judged
from k2mini.files import progress_bar, read_json, write_text
from k2mini.nn.llama import Llama
from k2mini.training.plot import short_names

log = logging.getLogger(__name__)

JUDGED = "judged.jsonl"  # of a run: all that evaluators said of its answers
LETTERS, UNCLEAR = "ABC", "?"
OWN = "the evaluator judges answers of its own weights, which models favour (arXiv 2306.05685, section 3.3)"
# Aspects as GPTScore's paper (Fu et al. 2023, arXiv 2302.04166) defines them, questions made statements. Rationality,
# which K2's people rate, is none of them: its words are ours.
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

    Raises ValueError as `Endpoint` does, but where it says that a text is too long.
    """
    too_long = []

    def ask(item: Item) -> Value:
        prompt, answer = item
        try:
            if answer is not None:
                tokens = endpoint.tokens(f"{prompt} {answer}")
                ends = [token.place for token in tokens[1:]] + [len(prompt) + 1]
                values = [token.logprob or 0.0 for token, end in zip(tokens, ends, strict=True) if end > len(prompt)]
                return sum(values) / len(values)
            messages = [{"role": "user", "content": prompt}]
            reply = endpoint.post("chat/completions", {"messages": messages, "temperature": 0, "max_tokens": 512})
            return verdict(reply["choices"][0]["message"]["content"] or "")
        except TooLongError as error:
            too_long.append(error)
            return None
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"{endpoint.url} answers a chat with {short(reply)}, which has no message") from None

    yield from zip(items, at_a_time(workers, ask, items), strict=True)
    if too_long:
        log.warning("left out as too long: %d of %d prompts; %s", len(too_long), len(items), too_long[0])


def verdict(reply: str) -> str:
    """The letter of a reply: in its last line that is nothing but one, `Answer:` before it or not; else UNCLEAR."""
    found = (re.fullmatch(r"\W*(?:[Aa]nswer\W*)?([ABC])\W*", line) for line in reversed(reply.splitlines()))
    return next((match[1] for match in found if match), UNCLEAR)


def judge(
    runs: Sequence[Path],
    answers: Sequence[Mapping[Key, OpenAnswer]],
    asked: Judge,
    made_by: Mapping[str, Any],
    name: str,
    aspects: Mapping[str, str],
    pairs: bool,
) -> dict[str, Any]:
    """Judge the answers of runs, and add to each its scores, scores_judge_NAME.jsonl, and who judged, judge_NAME.json.

    GPTScore (Fu et al. 2023, arXiv 2302.04166, all weights equal) is the mean log-probability of a text's tokens after
    a prompt: here of an answer that has text, after `LIKELY`, which is ours. The paper does so with summaries; of
    dialogues, where it defines these aspects, it scores "Yes" after asking for one. Its figures are no peers of these.
    Of two answers one is preferred, and scores 1, where the evaluator prefers it in both orders; all else is a tie
    (Zheng et al. 2023, arXiv 2306.05685, section 3.4), and scores 0.5.

    Args:
        answers: `read_runs` of the runs.
        asked: `judge_here` or `judge_there`. What `JUDGED` of a run has from an earlier start is not asked again, if
            its batches were of another size, which moves a GPTScore's seventh digit.
        made_by: by what judgements are known, beside what is asked: `evaluator`, its fingerprint, and more.
        name: of the evaluator; a hash of `made_by` and the aspects is added to it.
        aspects: name -> definition, for GPTScore.
        pairs: compare each run with each.

    Returns: `name`, `evaluator` (`made_by`), `prompts`, `aspects`; `own`, the runs of the evaluator's weights; `tasks`,
    as `_summary` has them.
    """
    name = re.sub(r"[^\w.-]", "_", name) + f"-{digest([made_by, aspects, LIKELY, PREFER])[:6]}"
    about: dict[str, Any] = {"name": name, "evaluator": made_by, "prompts": [LIKELY, PREFER], "aspects": aspects}
    about["own"] = [str(run) for run in runs if _is_own(run, made_by["evaluator"])]
    if about["own"]:
        log.warning("%s: %s", ", ".join(about["own"]), OWN)
    wanted, versus = _wanted(runs, answers, aspects, pairs)
    said = _say(asked, wanted, made_by)
    verdicts = {place: f"{said[one]}{said[two]}" for place, (one, two) in versus.items() if said[one] and said[two]}
    # Preferences are named after all that was compared, so that `compare` pairs no others.
    compared = digest(sorted(digest(sorted([*key, own[key].answer] for key in own)) for own in answers))[:6]
    found: list[dict[str, dict[Key, float]]] = []  # of each run: measure -> question -> value
    for place, own in enumerate(answers):
        found.append({f"preference@{name}#{compared}": _preferences(place, verdicts)} if pairs else {})
        for aspect, text in aspects.items():
            values = ((key, said[_likely(answer, text)]) for key, answer in own.items())
            found[-1][f"gptscore_{aspect}@{name}"] = {key: value for key, value in values if isinstance(value, float)}
    names = dict.fromkeys(answer.task for answer in answers[0].values())
    tasks = [_summary(task, answers[0], runs, found, verdicts) for task in names]
    for run, own, measures in zip(runs, answers, found, strict=True):
        write_judged(run, about, {compared: tasks} if pairs else {}, own, measures)
    return about | {"tasks": tasks}


def _is_own(run: Path, evaluator: str) -> bool:
    """Whether the evaluator's weights, adapters apart, made the answers."""
    report = read_json(run / "report.json") if (run / "report.json").is_file() else None
    return isinstance(report, dict) and report.get("fingerprint") == evaluator


def _wanted(
    runs: Sequence[Path], answers: Sequence[Mapping[Key, OpenAnswer]], aspects: Mapping[str, str], pairs: bool
) -> tuple[dict[Item, set[Path]], dict[tuple[int, int, Key], list[Item]]]:
    """What is asked, with the runs that it concerns; and what of it compares which two answers."""
    wanted = defaultdict[Item, set[Path]](set)
    for run, own in zip(runs, answers, strict=True):
        for item in (_likely(answer, text) for answer in own.values() for text in aspects.values()):
            wanted[item].add(run)
    places = combinations(range(len(runs)), 2) if pairs else ()
    versus = {(a, b, key): _both(answers[a][key], answers[b][key]) for a, b in places for key in answers[0]}
    for (a, b, _), both in versus.items():
        for item in both:
            wanted[item] |= {runs[a], runs[b]}
    return wanted, versus


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
            for run in wanted[item] if value is not None else ():  # what is too long now may not be later
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
    answers: Mapping[Key, OpenAnswer],
    runs: Sequence[Path],
    found: Sequence[Mapping[str, Mapping[Key, float]]],
    verdicts: Mapping[tuple[int, int, Key], str],
) -> dict[str, Any]:
    """`task`, `n` and `runs`: means of `gptscore_ASPECT` and `preference`; `left_out`, how many answers lack one, being
    empty or too long. With pairs `orders`: the shares of comparisons that are `consistent`, with one verdict in both
    orders, or go `always_first` or `always_second`, to whichever answer stood there; how many were `compared`, and how
    many replies are `unclear`.
    """
    keys = {key for key, answer in answers.items() if answer.task == task}
    rows: list[dict[str, Any]] = []
    for run, values in zip(runs, found, strict=True):
        rows.append({"run": str(run)})
        for measure, of_run in values.items():
            of_task = [of_run[key] for key in keys if key in of_run]
            rows[-1][measure.partition("@")[0]] = math.fsum(of_task) / len(of_task) if of_task else None
        rows[-1]["left_out"] = sum(any(key not in of_run for of_run in values.values()) for key in keys)
    said = Counter(both for (*_, key), both in verdicts.items() if key in keys)
    counts = {"consistent": ("AB", "BA", "CC"), "always_first": ("AA",), "always_second": ("BB",)}
    orders: dict[str, float] = {}
    if n := sum(said.values()):
        orders = {name: sum(said[both] for both in those) / n for name, those in counts.items()}
        orders["compared"], orders["unclear"] = n, sum(both.count(UNCLEAR) * number for both, number in said.items())
    return {"task": task, "n": len(keys), "runs": rows, "orders": orders}


def judge_table(report: Mapping[str, Any]) -> str:
    """The report for people to read."""
    lines = [f"{', '.join(report['own'])}: {OWN}"] if report["own"] else []
    for row in report["tasks"]:
        runs = short_names(entry["run"] for entry in row["runs"])
        width, heads = max(map(len, runs)), [key.replace("_", " ") for key in row["runs"][0] if key != "run"]
        lines.append(f"{row['task']}, {row['n']} questions, by {report['name']}")
        lines.append("  ".join([" " * width, *(f"{head:>11}" for head in heads)]))
        for run, entry in zip(runs, row["runs"], strict=True):
            cells = [f"{value:.4f}" if isinstance(value, float) else str(value) for value in [*entry.values()][1:]]
            aligned = (f"{cell:>{max(len(head), 11)}}" for cell, head in zip(cells, heads, strict=True))
            lines.append("  ".join([f"{run:<{width}}", *aligned]))
        lines += [orders_line(row["orders"])] if row["orders"] else []
    return "\n".join(lines)
