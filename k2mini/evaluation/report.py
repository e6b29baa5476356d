"""The summary of a run of multiple choice: accuracies with their uncertainty, and warnings about questions and keys."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from k2mini.evaluation.benchmarks import Question, check_keys
from k2mini.files import parse_json, read_text


@dataclass(frozen=True)
class Result:
    """One scored question. An option that was not scored (its text is empty, say) has log-probability None.

    Attributes:
        digest: of the question that was asked (`Question.digest`).
        question, labels, choices: its text and options, in the order of `logprobs`; an older k2mini kept none of them.
        priors: of 'pmi': the options' log-probabilities without the question.
        topic: the question's, kept where it has one.
    """

    task: str
    index: int
    answer: str
    prediction: str | None
    logprobs: list[float | None]
    token_ids: list[list[int]]
    dropped: int = 0
    cut: int = 0
    digest: str = ""
    question: str = ""
    labels: list[str] = field(default_factory=list)
    choices: list[str] = field(default_factory=list)
    priors: list[float | None] = field(default_factory=list)
    topic: str = ""

    def line(self) -> str:
        """As one line of results.jsonl."""
        later = ("priors", "topic")  # written where there is one
        return sealed({name: value for name, value in asdict(self).items() if name not in later or value})

    @property
    def is_right(self) -> bool:
        """Whether the prediction is the key."""
        return self.prediction == self.answer

    @property
    def mass(self) -> float:
        """The probability that all options get together."""
        return sum(math.exp(logprob) for logprob in self.logprobs if logprob is not None)

    @property
    def confidence(self) -> float | None:
        """The prediction's part of the probability that all options get; with priors, of their ratios.

        None where the prediction is no option, as K2's scoring has it.
        """
        if self.prediction not in self.labels:
            return None
        priors = [prior or 0.0 for prior in self.priors] or [0.0] * len(self.logprobs)
        pairs = zip(self.logprobs, priors, strict=True)
        scores = [-math.inf if logprob is None else logprob - prior for logprob, prior in pairs]
        most = max(scores)
        weights = [math.exp(score - most) for score in scores]
        return weights[self.labels.index(self.prediction)] / sum(weights)


def sealed(fields: Mapping[str, Any]) -> str:
    """A line of JSON, without its end, whose last field is the SHA-256 of the others."""
    own = hashlib.sha256(json.dumps(fields).encode()).hexdigest()
    return json.dumps({**fields, "sha256": own}, ensure_ascii=False)


def read_sealed(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line, fields) of all lines that `sealed` made; a last one that a kill cut short is left out.

    Raises ValueError naming file and line where one is not as it was written.
    """
    for number, line in enumerate(read_text(path).split("\n")[:-1], start=1):
        where = f"{path}, line {number}"
        raw = parse_json(line, where)
        if not isinstance(raw, dict) or "sha256" not in raw:
            raise ValueError(f"{where} has no sha256, as an older k2mini's; evaluate anew, with another --out")
        del raw["sha256"]
        if sealed(raw) != line:
            raise ValueError(f"{where} is not as it was written (its sha256 says so); evaluate anew, in another --out")
        yield where, raw


def read_results(path: Path) -> list[Result]:
    """The results in a results.jsonl. Raises ValueError as `read_sealed` does, and where a question has two."""
    found: dict[tuple[str, int], Result] = {}
    known, newer = {*Result.__dataclass_fields__}, {"question", "labels", "choices", "priors", "topic"}
    for where, raw in read_sealed(path):
        if not known - newer <= raw.keys() <= known or (raw["task"], raw["index"]) in found:
            raise ValueError(f"{where} is no result of a question, or one that has another already")
        found[raw["task"], raw["index"]] = Result(**raw)
    return [*found.values()]


def wilson_interval(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson 1927)."""
    p = correct / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))  # rounding may put an end past p


def summarise(
    questions: Sequence[Question], results: Sequence[Result], settings: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """One summary a task, in order of appearance.

    Args:
        settings: how it was asked (scoring, template, answer_prefix, shots), repeated in every summary.

    Returns: dicts of report.json's `tasks`. `chance` is the accuracy of guessing evenly, `majority` that of always
    giving the commonest answer; `unanswerable` lists questions whose key is no option, or that have nothing to score:
    they count as wrong. `distinct` leaves out copies, questions whose copies disagree, and impossible ones.
    `confusion` counts predictions by key; `given` and `keys` are how often each option was given and was the key.
    `calibration` is of no answer where log-probabilities divided by lengths decide, which are no probabilities.
    """
    summaries = []
    for task in dict.fromkeys(question.task for question in questions):
        asked = [question for question in questions if question.task == task]
        of_task = [result for result in results if result.task == task]
        n, checked = len(asked), check_keys(asked)
        clean = set(checked.clean(asked))
        confusion: dict[str, Counter[str]] = {}
        by_length = settings.get("normalize", "none") != "none" and not all(q.is_true_false for q in asked)
        for result in of_task:
            confusion.setdefault(result.answer, Counter())[result.prediction or "none"] += 1
        summaries.append(
            {
                "task": task,
                "n": n,
                **accuracy([result.is_right for result in of_task]),
                "chance": sum(1 / len(set(question.labels)) for question in asked) / n,
                "majority": Counter(question.answer for question in asked).most_common(1)[0][1] / n,
                **settings,
                "unanswerable": [
                    question.index
                    for question, result in zip(asked, of_task, strict=True)
                    if question.answer not in question.labels or result.prediction is None
                ],
                "distinct": {
                    "n": len(clean),
                    **accuracy([result.is_right for result in of_task if result.index in clean]),
                },
                "surplus": checked.surplus,
                "conflicting": checked.conflicting,
                "impossible": checked.impossible,
                "mass": sum(result.mass for result in of_task) / n,
                "calibration": calibration([] if by_length else of_task),
                "keys": dict(sorted(Counter(result.answer for result in of_task).items())),
                "given": dict(sorted(Counter(result.prediction or "none" for result in of_task).items())),
                "confusion": {key: dict(sorted(counts.items())) for key, counts in sorted(confusion.items())},
                "examples_dropped": sum(result.dropped > 0 for result in of_task),
                "cut": sum(result.cut > 0 for result in of_task),
            }
        )
    return summaries


def accuracy(right: Sequence[bool]) -> dict[str, float | None]:
    """`accuracy`, and `low` and `high`, the ends of its interval; None where there is no question."""
    if not right:
        return {"accuracy": None, "low": None, "high": None}
    low, high = wilson_interval(sum(right), len(right))
    return {"accuracy": sum(right) / len(right), "low": low, "high": high}


def calibration(results: Sequence[Result], num_bins: int = 10) -> dict[str, Any]:
    """How far the model's confidence in its answers is from how often they are right.

    `ece` is the expected calibration error (Guo et al. 2017, arXiv 1706.04599, eq. 3) over bins of equal width of
    `Result.confidence`, which hold their upper ends; `bins` has those with an answer. `n` answers have a confidence;
    where there is none, `ece` and `confidence`, the mean, are None.
    """
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(num_bins)]
    for result in results:
        if (confidence := result.confidence) is not None:
            bins[max(0, math.ceil(confidence * num_bins) - 1)].append((confidence, result.is_right))
    shown, n = [], sum(map(len, bins))
    for place, held in enumerate(bins):
        if held:
            confidence, right = (sum(values) / len(held) for values in zip(*held, strict=True))
            shown.append({"low": place / num_bins, "n": len(held), "confidence": confidence, "accuracy": right})
    ece = sum(row["n"] / n * abs(row["accuracy"] - row["confidence"]) for row in shown) if n else None
    mean = sum(row["n"] / n * row["confidence"] for row in shown) if n else None
    return {"n": n, "ece": ece, "confidence": mean, "bins": shown}


def table(summaries: Sequence[Mapping[str, Any]]) -> str:
    """The summaries as text, with a line for each warning."""
    head = f"{'task':<12} {'n':>5}  {'accuracy':>8}  {'95 % interval':>15}  {'chance':>6}  {'majority':>8}  distinct"
    lines = [head]
    for row in summaries:
        interval = f"{100 * row['low']:.1f} – {100 * row['high']:.1f} %"
        distinct = row["distinct"]
        only = f"{100 * distinct['accuracy']:.1f} % of {distinct['n']}" if distinct["n"] else "none"
        lines.append(
            f"{row['task']:<12} {row['n']:>5}  {100 * row['accuracy']:>6.1f} %  {interval:>15}  "
            f"{100 * row['chance']:>4.1f} %  {100 * row['majority']:>6.1f} %  {only}"
        )
    for row in summaries:
        if row["scoring"] == "k2":
            lines.append(f"{row['task']}: scored as K2's code does, for comparison with published figures only")
        if row["unanswerable"]:
            where = ", ".join(map(str, row["unanswerable"]))
            lines.append(f"{row['task']}: counted as wrong, since no option can be right: question {where}")
        if row["surplus"]:
            lines.append(
                f"{row['task']}: copies of other questions: {len(row['surplus'])}; "
                f"questions whose copies have another key: {len(row['conflicting'])}"
            )
        for key, what in (("examples_dropped", "asked with fewer examples"), ("cut", "cut from the left")):
            if row[key]:
                lines.append(f"{row['task']}: {row[key]} questions were {what}, to fit the model's context")
        if "robust" in row:
            lines.append(f"{row['task']}: {_spread(row['robust'], row['n'])}")
        if row["calibration"]["n"]:
            ece, mean = (100 * row["calibration"][key] for key in ("ece", "confidence"))
            lines.append(f"{row['task']}: calibration error (ECE) {ece:.1f} %, at a mean confidence of {mean:.1f} %")
        elif row.get("normalize", "none") != "none":
            what = f"log-probabilities by {row['normalize']} decide, which are no confidence; --normalize none has one"
            lines.append(f"{row['task']}: no calibration error (ECE): {what}")
    return "\n".join(lines)


def _spread(robust: Mapping[str, Any], n: int) -> str:
    """What `--robust` found of n questions, in a line."""
    shuffled = robust["shuffled"]
    options = f"options{f' (of {shuffled} questions)' if shuffled < n else ''} and " if shuffled else ""
    low, high, mean = (100 * robust[key] for key in ("lowest", "highest", "mean"))
    return (
        f"{options}wording changed {len(robust['accuracies'])} times: {low:.1f} – {high:.1f} % (mean {mean:.1f} %); "
        f"{100 * robust['stays']:.1f} % of the choices stay, in {100 * robust['always']:.1f} % of the questions always"
    )


def subjective_table(summaries: Sequence[Mapping[str, Any]]) -> str:
    """The summaries of open tasks as text."""
    lines = [f"{'task':<16} {'n':>4}  ROUGE-L  token F1  words (reference)  perplexity of the reference"]
    for row in summaries:
        lines.append(
            f"{row['task']:<16} {row['n']:>4}  {100 * row['rouge_l']:>5.1f} %  {100 * row['token_f1']:>6.1f} %  "
            f"{row['words']:>5.0f} {'(' + format(row['reference_words'], '.0f') + ')':>11}  {row['perplexity']:>10.1f}"
        )
        if "accuracy" in row:
            right, low, high = (f"{100 * row[name]:.1f}" for name in ("accuracy", "low", "high"))
            lines.append(f"{row['task']}: {right} % are right by {row['match']} (95 % interval {low} – {high} %)")
        if row["left_out"]:
            lines.append(f"{row['task']}: {row['left_out']} were left out, empty or too long for the model's context")
    return "\n".join(lines)


def text(report: Mapping[str, Any]) -> str:
    """What the report says, for people to read."""
    parts = [table(report["tasks"])] if report["tasks"] else []
    if "subjective" in report:
        parts.append(subjective_table(report["subjective"]))
    if found := report.get("perplexity"):
        sums = f"perplexity {found['perplexity']:.2f}, {found['bits_per_byte']:.4f} bits a byte"
        parts.append(f"{sums}, over {found['tokens']:,} tokens")
    return "\n".join(parts + [entry["said"] for entry in report.get("decontamination", ())])


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a Markdown page."""
    asked_on = [row["task"] for row in (*report["tasks"], *report.get("subjective", ()))]
    asked_on += report.get("perplexity", {}).get("files", [])
    lines = [f"# {report['model']} on {', '.join(asked_on)}", "", "```", text(report), "```", ""]
    for row in report["tasks"]:
        asked = {key: row[key] for key in ("scoring", "template", "answer_prefix", "shots") if key in row}
        lines += [f"## {row['task']}", "", f"Asked with {json.dumps(asked, ensure_ascii=False)}.", ""]
        lines.append(f"All options together get {100 * row['mass']:.1f} % of the probability.")
        for name in ("impossible", "conflicting"):
            if row[name]:
                lines.append(f"{name.capitalize()} keys: {row[name]}.")
        columns = sorted({prediction for counts in row["confusion"].values() for prediction in counts})
        lines += ["", "| key | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for key, counts in row["confusion"].items():
            lines.append(f"| {key} | " + " | ".join(str(counts.get(column, 0)) for column in columns) + " |")
        lines.append("")
    lines.append(f"Model fingerprint {report.get('fingerprint')}, {report.get('versions')}.")
    return "\n".join(lines) + "\n"
