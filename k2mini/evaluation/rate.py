"""Rating by people: a page of questions with models' answers, blind and shuffled, and what raters' files come to."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import logging
import os
import random
import secrets
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from k2mini.errors import some
from k2mini.evaluation.agreement import interval, krippendorff_alpha
from k2mini.evaluation.compare import ends
from k2mini.evaluation.report import read_sealed, sealed
from k2mini.evaluation.scores import OpenAnswer, Score, keyed, read_answers, write_scores
from k2mini.files import read_text, write_text
from k2mini.page import POLICY, STYLE, document

log = logging.getLogger(__name__)

# The human evaluation of K2's authors, as their later paper (GeoGalactica, arXiv 2401.00434, section 6.2) words it:
# "We refer to K2's Human Evaluation". Of each aspect what a rater asks, and what 1, 2 and 3 mean.
ASPECTS = [
    ("scientificity", "Is it what a geoscience professional would say?", ["not good", "acceptable", "very good"]),
    ("correctness", "Is it right, to a geoscience expert?", ["incorrect", "possibly right", "correct"]),
    ("coherence", "Does it stay with its topic, and read smoothly?", ["not good", "acceptable", "very good"]),
]
COLUMNS = ["page", "rater", "item", "aspect", "value"]
APART = 2  # points between two raters from which on they disagree
KEY = ".key.json"
Ratings = dict[tuple[str, str], dict[str, int]]  # (item, aspect) -> rater -> value


def make_page(
    runs: Sequence[Path], out: Path, *, sample: int, seed: int = 0, tasks: Sequence[str] = ()
) -> dict[str, Any]:
    """Write the page, and beside it the key, `NAME.key.json`, which says whose answer is whose.

    The page shows a question with the runs' different answers, under letters whose order is drawn for each question:
    from the system's randomness, since who knows a seed would know whose answer is whose.

    Args:
        sample: how many questions, drawn from the different ones that all runs answered; fewer where there are no more.
        seed: of the questions.

    Returns: the key. Raises ValueError where the runs have no open question in common.
    """
    of_runs = [_answers(run) for run in runs]
    shared = [key for key in of_runs[0] if all(key in answers for answers in of_runs)]
    shared = [key for key in shared if not tasks or of_runs[0][key].task in tasks]
    if not shared:
        raise ValueError(
            f"{', '.join(map(str, runs))} have no answer to an open question in common{' (--tasks)' if tasks else ''}; "
            "such answers come from k2mini eval --out, with --tasks npee/noun, say"
        )
    letters, questions, items = secrets.SystemRandom(), [], {}
    for number, key in enumerate(random.Random(seed).sample(shared, min(sample, len(shared))), start=1):
        texts: dict[str, list[int]] = {}
        for place, answers in enumerate(of_runs):
            texts.setdefault(answers[key].answer.strip(), []).append(place)
        first, shown = of_runs[0][key], []
        for letter, text in enumerate(letters.sample([*texts], len(texts))):
            name = f"{number}{chr(ord('A') + letter)}"
            shown.append({"id": name, "text": text})
            items[name] = {"digest": key, "question": first.question, "answer": text, "runs": texts[text]}
        asked = {field: getattr(first, field) for field in ("task", "question", "reference")}
        questions.append({**asked, "answers": shown})
    shown_too = [{"name": name, "what": what, "levels": levels} for name, what, levels in ASPECTS]
    data: dict[str, Any] = {"aspects": shown_too, "questions": questions}
    data["page"] = "p" + hashlib.sha256(json.dumps(data).encode()).hexdigest()[:11]  # no number to a spreadsheet
    names = [os.path.relpath(run, out.parent) for run in runs]
    key_of = {"page": data["page"], "aspects": shown_too, "runs": names, "items": items}
    write_text(key_path(out), sealed(key_of) + "\n")
    write_text(out, _html(data))
    return key_of


def key_path(page: Path) -> Path:
    """Where the key of a page is."""
    return page.with_suffix(KEY)


def _answers(run: Path) -> dict[str, OpenAnswer]:
    """Of each question of a run's open tasks, by its digest, the answer; of copies of a question that of the first."""
    every = keyed(answer for answers in read_answers(run).values() for answer in answers)
    return {digest: answer for (_, (digest, copy)), answer in every.items() if copy == 0}


def _html(data: dict[str, Any]) -> str:
    style, body, script = (
        Path(__file__).with_name(f"rate.{kind}").read_text(encoding="utf-8") for kind in ("css", "html", "js")
    )
    own = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()  # no other script runs
    told = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")  # or </script> in an answer would end it
    scripts = f'<script type="application/json" id="data">{told}</script>\n<script>{script}</script>'
    return document("Rate answers", STYLE + style, body + scripts, f"{POLICY}; script-src 'sha256-{own}'")


def find_key(files: Sequence[Path], key: Path | None) -> tuple[Path, dict[str, Any]]:
    """The key of the page that files of ratings come from, `key` or one beside them or in the current folder.

    Raises ValueError where there is none, or it is no key.
    """
    page = next((row["page"] for _, row in _rows(files[0])), None)
    folders = dict.fromkeys([*(file.parent for file in files), Path()])
    found = [key] if key is not None else [path for folder in folders for path in sorted(folder.glob(f"*{KEY}"))]
    for path in found:
        try:
            ((_, raw),) = read_sealed(path)
        except ValueError:  # somebody else's, unless it is named
            raw = {}
        if "items" in raw and (key is not None or page in (None, raw["page"])):
            return path, raw
        if key is not None:
            raise ValueError(f"{path} is no key of k2mini rate make, or not as it was written")
    where = ", ".join(str(folder) for folder in folders)
    raise ValueError(f"{files[0]} rates the page {page}, whose key (NAME{KEY}) is not in {where}; name it with --key")


def _rows(file: Path) -> Iterable[tuple[str, dict[str, str]]]:
    """(file and line, fields) of a file of ratings, as the page exports them or a spreadsheet saved them again."""
    text = read_text(file)
    rows = csv.reader(io.StringIO(text, ""), delimiter=";" if ";" in text.partition("\n")[0] else ",", strict=True)
    try:
        numbered = [(rows.line_num, row) for row in rows if any(row) or rows.line_num == 1]
    except csv.Error as error:
        raise ValueError(f"{file}, line {rows.line_num}: it is no file of ratings: {error}") from None
    for number, row in numbered or [(1, [])]:
        if len(row) != len(COLUMNS) or (number == 1 and row != COLUMNS):
            raise ValueError(f"{file}, line {number}: it is no file of ratings, whose columns are {', '.join(COLUMNS)}")
        if number > 1:
            yield f"{file}, line {number}", dict(zip(COLUMNS, row, strict=True))


def read_ratings(files: Sequence[Path], key: dict[str, Any]) -> Ratings:
    """The ratings in some files; of two raters who gave the same to everything a warning.

    Raises ValueError where a rating is of another page, of no item, or given twice.
    """
    levels = {aspect["name"]: len(aspect["levels"]) for aspect in key["aspects"]}
    ratings: Ratings = {(item, aspect): {} for item in key["items"] for aspect in levels}
    for where, row in (row for file in files for row in _rows(file)):
        item, aspect, rater = row["item"], row["aspect"], row["rater"].strip()
        if row["page"] != key["page"]:
            raise ValueError(f"{where} rates another page, {row['page']!r}; the key is that of {key['page']!r}")
        if (item, aspect) not in ratings:
            raise ValueError(f"{where}: the page has no item {item!r} with an aspect {aspect!r}")
        if row["value"] not in map(str, range(1, levels[aspect] + 1)):
            raise ValueError(f"{where}: value is {row['value']!r}, not a number from 1 to {levels[aspect]}")
        if rater[:1] in ("=", "+", "-", "@"):
            raise ValueError(f"{where}: rater {rater!r} begins as a spreadsheet's formula does; give another name")
        if not rater or rater in ratings[item, aspect]:
            what = f"{rater} has rated item {item} already; give one file a rater" if rater else "rater is empty"
            raise ValueError(f"{where}: {what}")
        ratings[item, aspect][rater] = int(row["value"])
    if not any(ratings.values()):
        raise ValueError(f"{some([str(file) for file in files])}: there is no rating in them")
    for one, two in combinations(sorted({rater for given in ratings.values() for rater in given}), 2):
        if all(given.get(one) == given.get(two) for given in ratings.values()):
            log.warning("%s and %s gave the same to everything: are they one person, or one a copy?", one, two)
    return ratings


def summarise(key: dict[str, Any], ratings: Ratings) -> dict[str, Any]:
    """What the ratings come to.

    Returns: `page`; `raters`; `given`, the share of all ratings that were given; `aspects`, a list of `aspect`, `alpha`
    (Krippendorff's, ordinal, over answers; None where it has no value) and `runs`, a list of `run`, `n` (rated
    answers), `mean` (over answers, of the raters' means), `low` and `high` (its `interval`, or None); `disagreements`,
    the answers about which raters are `APART` points or more apart, the widest first.
    """
    raters = sorted({rater for given in ratings.values() for rater in given})
    aspects, apart = [], []
    for name in (aspect["name"] for aspect in key["aspects"]):
        given = {item: ratings[item, name] for item in key["items"] if ratings[item, name]}
        units = [[*values.values()] for values in given.values()]
        of_runs = []
        for place, run in enumerate(key["runs"]):
            means = [_mean(values) for item, values in given.items() if place in key["items"][item]["runs"]]
            mean, low, high = interval(means) if means else (None, None, None)
            of_runs.append({"run": run, "n": len(means), "mean": mean, "low": low, "high": high})
        aspects.append({"aspect": name, "alpha": krippendorff_alpha(units), "runs": of_runs})
        apart += [
            {"item": item, "aspect": name, "values": values}
            | {field: key["items"][item][field] for field in ("question", "answer")}
            for item, values in given.items()
            if max(values.values()) - min(values.values()) >= APART
        ]
    share = sum(map(len, ratings.values())) / (len(ratings) * len(raters))
    apart.sort(key=lambda entry: min(entry["values"].values()) - max(entry["values"].values()))
    return {"page": key["page"], "raters": raters, "given": share, "aspects": aspects, "disagreements": apart}


def _mean(values: dict[str, int]) -> float:
    return sum(values.values()) / len(values)


def write_ratings(folder: Path, key: dict[str, Any], ratings: Ratings) -> list[Path]:
    """Write the raters' mean of each answer into the runs, as `scores_people_PAGE.jsonl`.

    The measures are `people/ASPECT@PAGE`, or raters of one page would be compared with those of another.

    Args:
        folder: the key's, from which its runs are named.

    Returns: the runs. Raises ValueError, before it writes, where a run's answers are not those that were rated.
    """
    runs = [Path(os.path.normpath(folder / run)) for run in key["runs"]]
    scores: list[list[Score]] = [[] for _ in runs]
    for place, run in enumerate(runs):
        answers = _answers(run)
        for (name, aspect), values in ratings.items():
            item = key["items"][name]
            if place not in item["runs"] or not values:
                continue
            answer = answers.get(item["digest"])
            if answer is None or answer.answer.strip() != item["answer"]:
                raise ValueError(f"{run} no longer has the answer that item {name} is; it was evaluated anew, or moved")
            measure = f"people/{aspect}@{key['page'][:6]}"
            scores[place].append(Score(answer.task, answer.index, answer.digest, measure, _mean(values)))
    for run, found in zip(runs, scores, strict=True):
        write_scores(run, f"people_{key['page']}", found)
    return runs


def ratings_table(found: dict[str, Any], most: int = 20) -> str:
    """The summary as text, with at most so many disagreements."""
    wide = max(3, *(len(entry["run"]) for entry in found["aspects"][0]["runs"]))
    lines = [f"raters: {', '.join(found['raters'])}; {100 * found['given']:.0f} % of all ratings are given"]
    lines.append(f"{'aspect':<14} {'run':<{wide}}  {'n':>4}  mean  95 % interval  alpha")
    for aspect in found["aspects"]:
        alpha = "–" if aspect["alpha"] is None else f"{aspect['alpha']:.2f}"
        for place, entry in enumerate(aspect["runs"]):
            mean = f"{entry['mean']:.2f}  {ends(entry['low'], entry['high'], '.2f')}" if entry["n"] else "–"
            row = f"{aspect['aspect']:<14} {entry['run']:<{wide}}  {entry['n']:>4}  {mean:<19}"
            lines.append(f"{row}  {alpha}" if place == 0 else row.rstrip())
    apart = found["disagreements"]
    lines.append(f"answers about which raters are {APART} points or more apart: {len(apart) or 'none'}")
    for entry in apart[:most]:
        values = ", ".join(f"{rater} {value}" for rater, value in sorted(entry["values"].items()))
        question, answer = (" ".join(entry[field].split())[:70] for field in ("question", "answer"))
        lines.append(f"  {entry['item']} {entry['aspect']}: {values}  {question} | {answer}")
    return "\n".join(lines + [f"  and {len(apart) - most} more (--json)"] * (len(apart) > most))
