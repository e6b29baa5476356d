"""Tasks beside GeoBench: ARC, any JSON, JSONL or CSV by the names of its fields, and one YAML file a task."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal, NamedTuple

from k2mini.config_file import load_config
from k2mini.data.documents import data_path, raise_error, read_entries
from k2mini.data.tables import SUFFIXES as TABLES
from k2mini.data.tables import read_table
from k2mini.errors import short
from k2mini.evaluation.benchmarks import (
    NPEE_MARK,
    SUBJECTIVE,
    Question,
    each_question,
    load_subjective,
    make_question,
    read_benchmark,
)
from k2mini.evaluation.measures import last_number, same_number, same_words, words
from k2mini.evaluation.subjective import OpenQuestion

Fields = dict[Literal["question", "choices", "answer", "topic"], str]
NAMES = ("question", "choices", "answer", "topic")
YAML = (".yaml", ".yml")
FOLDER = Path(__file__).parents[2] / "configs" / "tasks"
OPTION = re.compile(r"^[ \t]*([A-Z]|[1-9](?!.\d))[.)] ?", re.MULTILINE)
ANSWER = re.compile(r"\n\s*The answer is:\s*\Z")  # after the options, in K2's arc_sft.json


@dataclass
class TaskConfig:
    """What a task's YAML file says; configs/tasks/README.md explains each."""

    name: str
    about: str
    file: str
    layout: Literal["geobench", "arc"] | None = None
    fields: Fields | None = None
    prompt: str = "{question}"
    match: Literal["words", "number", "pattern"] | None = None
    pattern: str | None = None
    tolerance: float = 0.0
    relative_tolerance: float = 0.0

    def __post_init__(self) -> None:
        if "{question}" not in self.prompt or not self.name.strip():
            raise ValueError("prompt must have {question} where the question stands, and name at least a letter")
        if self.fields is not None and (self.layout is not None or not {"question", "answer"} <= self.fields.keys()):
            raise ValueError("fields must name question and answer, and are for files without a layout")
        if self.match is not None and not self.is_open:
            raise ValueError("match is for open questions; these have choices")
        if (self.pattern is not None and self.match is None) or (self.pattern is None and self.match == "pattern"):
            raise ValueError("pattern goes with match, and match: pattern needs one")
        if (self.tolerance, self.relative_tolerance) != (0, 0) and self.match != "number":
            raise ValueError("tolerance and relative_tolerance go with match: number")
        try:
            re.compile((self.pattern or "").replace("{answer}", "x"))
        except re.error as error:
            raise ValueError(f"pattern is no regular expression: {error}") from None

    @property
    def is_open(self) -> bool:
        """Whether the model writes an answer; if not, it chooses one."""
        if self.layout == "geobench":
            return self.name.removeprefix("npee/") in (*SUBJECTIVE, "subjective")
        return self.layout is None and "choices" not in (self.fields or NAMES)

    def is_right(self, references: Sequence[str], answer: str) -> bool:
        """Whether an answer is one of the references, as `match` compares them."""
        if self.match == "pattern":
            patterns = ((self.pattern or "").replace("{answer}", re.escape(each)) for each in references)
            return any(re.search(pattern, answer) for pattern in patterns)
        if self.pattern is not None:
            found = re.search(self.pattern, answer)
            answer = next(filter(None, found.groups()), found[0]) if found else ""
        if self.match == "number":
            wide = self.tolerance, self.relative_tolerance
            return any(same_number(answer, each, *wide) for each in references)
        first = next((line for line in answer.splitlines() if words(line)), "")  # a model may go on and on
        return any(same_words(first, each) for each in references)

    def open_question(self, question: str, *references: str) -> OpenQuestion:
        """Raises ValueError where a reference could never be found right."""
        for each in references if self.match in ("words", "number") else ():
            if (self.match == "words" and not words(each)) or (self.match == "number" and last_number(each) is None):
                raise ValueError(f"answer {short(each)} has no {self.match}, which match compares")
        if self.match is None:
            return OpenQuestion(question, references[0])
        how = {name: getattr(self, name) for name in ("pattern", "tolerance", "relative_tolerance")}
        said = ", ".join([self.match, *(f"{name} {value}" for name, value in how.items() if value)])
        return OpenQuestion(question, references[0], partial(self.is_right, references), said)


class Task(NamedTuple):
    """A task's name, the file that its questions are in, and these: of several choices, or open."""

    name: str
    file: Path
    questions: list[Question]
    pairs: list[OpenQuestion]


def parse_map(text: str) -> Fields:
    """'question=stem,choices=options,answer=key' -> what a file calls each. Raises ValueError where it is not so."""
    parts = [part.partition("=") for part in text.split(",")]
    names = [name.strip() for name, _, _ in parts]
    for name, (_, _, value) in zip(names, parts, strict=True):
        if name not in NAMES or not value.strip() or names.count(name) > 1:
            raise ValueError(
                f"--map {short(text)}: {short(name)} is none of {', '.join(NAMES)}, or has not one value; "
                "write question=FIELD,choices=FIELD,answer=FIELD"
            )
    if missing := {"question", "answer"}.difference(names):
        raise ValueError(f"--map {short(text)} does not say what the file calls {' and '.join(sorted(missing))}")
    return {name: value.strip() for name, (_, _, value) in zip(names, parts, strict=True)}  # type: ignore[misc]


def read_task(path: Path, layout: Any = None, fields: Fields | None = None, folder: Path | None = None) -> Task:
    """A task by its YAML file, or a file of questions by its layout or the names of its fields.

    Args:
        folder: where the file is that a YAML file names, in place of the path that stands there.

    Raises ValueError naming the file, and the key or record, where something is missing or does not fit.
    """
    if path.suffix.lower() in YAML:
        if layout is not None or fields is not None:
            raise ValueError(f"{path} says itself how its file is read; --layout and --map are for other files")
        config: TaskConfig = load_config(TaskConfig, path)
        file = Path(config.file) if folder is None else folder / Path(config.file).name
    else:
        suffixes = (".json", ".jsonl", *TABLES)
        name, file = path.name, path
        while name.lower().endswith(suffixes):
            name = name.rpartition(".")[0]
        config = TaskConfig(name, "", str(path), layout, fields)
    questions: list[Question] = []
    pairs: list[OpenQuestion] = []
    if config.layout == "geobench" and config.is_open:
        found = load_subjective(file, config.name.removeprefix("npee/")) or []
        pairs = [config.open_question(*pair) for pair in found]
    elif config.layout == "geobench":
        questions = [question for question in read_benchmark(file) if question.task == config.name]
    else:
        entries, is_table = _records(config, file)
        try:
            if config.is_open:
                pairs = each_question(entries, partial(_open, config))
            else:
                questions = each_question(entries, partial(_choice, config, is_table))
        except ValueError as error:
            raise ValueError(f"{file}, {error}") from None
    if not questions and not pairs:
        raise ValueError(f"{path}: {file} has no task {config.name}")
    questions = [replace(each, stem=config.prompt.replace("{question}", each.stem)) for each in questions]
    pairs = [each._replace(question=config.prompt.replace("{question}", each.question)) for each in pairs]
    return Task(config.name, data_path(file), questions, pairs)


def _records(config: TaskConfig, file: Path) -> tuple[list[tuple[str, Any]], bool]:
    """(place, record) of a file, and whether it is a table."""
    if file.suffix.lower() not in TABLES:
        return read_entries(file), False
    return list(read_table(file, raise_error, header=not _is_bare(config))), True


def _is_bare(config: TaskConfig) -> bool:
    """Whether all fields are called by numbers, as the columns of a table without a header."""
    return config.fields is not None and "+".join(config.fields.values()).replace("+", "").isdecimal()


def _fields(config: TaskConfig, record: Any) -> Fields:
    """What a record calls the question, its choices and the answer.

    ARC's records (Clark et al. 2018, arXiv 1803.05457) are AI2's, the hub's, or those of K2's arc_sft.json.
    """
    if config.layout is None:
        return config.fields or {"question": "question", "choices": "choices", "answer": "answer"}
    if isinstance(record, dict) and "instruction" in record:
        return {"question": "instruction", "choices": "input", "answer": "output"}
    if isinstance(record, dict) and isinstance(record.get("question"), dict):
        return {"question": "question.stem", "choices": "question.choices", "answer": "answerKey"}
    return {"question": "question", "choices": "choices", "answer": "answerKey"}


def _value(record: Any, name: str) -> Any:
    """A field of a record; 'a.b' is b in a."""
    if not isinstance(record, dict):
        raise ValueError(f"this is no JSON object with {name}, but {short(record)}")
    value: Any = record
    for part in (name,) if name in record else name.split("."):
        if not isinstance(value, dict) or part not in value:
            raise ValueError(f"there is no field {name!r}; there are {', '.join(map(str, record))}; --map names others")
        value = value[part]
    return value


def _stem(record: Any, name: str) -> str:
    """The question; of several fields ('support+question') a line each."""
    values = [_value(record, each) for each in name.split("+")]
    if odd := [value for value in values if not isinstance(value, str)]:
        raise ValueError(f"{name} is {short(odd[0])}, not text")
    stem = "\n".join(filter(str.strip, values)).strip().removesuffix(NPEE_MARK).rstrip()
    if not stem:
        raise ValueError(f"{name} is empty")
    return stem


def _choice(config: TaskConfig, is_table: bool, index: int, record: Any) -> Question:
    fields = _fields(config, record)
    stem, names = _stem(record, fields["question"]), fields["choices"].split("+")
    answer = _value(record, fields["answer"])
    if len(names) == 1:
        labels, texts = _options(_value(record, names[0]))
    else:
        labels, texts = [*"ABCDEFGHIJ"] if _is_bare(config) else names, [_value(record, name) for name in names]
    if len({*labels}) < len(labels):
        raise ValueError(f"{fields['choices']} has options of the same label: {', '.join(labels)}")
    while len(names) > 1 and texts and not texts[-1]:  # there are as many fields as the longest question has options
        texts.pop()
    if len(names) > 1 and fields["answer"] in names:  # the right one has a place of its own, which is hidden
        if texts.count(answer) != 1:
            raise ValueError(f"{fields['answer']} is {short(answer)}, and of {fields['choices']} it must be one alone")
        texts.sort(key=lambda text: hashlib.sha256(f"{stem}\n{text}".encode()).digest())
        labels, answer = [], texts.index(answer)
    if labels[: len(texts)].count(str(answer)) == 1:
        answer = labels.index(str(answer))
    elif is_table and str(answer) == answer and answer.isdecimal():  # in a table all is text
        meant = {int(answer)} & {*range(len(texts))} | {place for place, text in enumerate(texts) if text == answer}
        if len(meant) > 1:
            raise ValueError(f"answer {answer} may be the place of an option or another's text; give its letter")
        answer = meant.pop() if meant else answer
    topic = _value(record, fields["topic"]) if "topic" in fields else record.get("topic")
    return make_question(config.name, index, {"question": stem, "choices": texts, "answer": answer, "topic": topic})


def _options(raw: Any) -> tuple[list[str], list[Any]]:
    """Labels, where there are some, and texts: of texts, of {label, text}, of {label: text}, of lines 'A. text'."""
    if isinstance(raw, str) and OPTION.search(raw):
        before, *found = OPTION.split(ANSWER.sub("", raw))
        labels, texts = found[::2], [text.strip("\r\n") for text in found[1::2]]
        if before.strip() or not any(order.startswith("".join(labels)) for order in (ascii_uppercase, "123456789")):
            raise ValueError(f"the options {short(raw)} are not lines of A, B, C … or 1, 2, 3 …, each after the last")
        return labels, [*texts]
    if isinstance(raw, dict) and isinstance(raw.get("text"), list) and isinstance(raw.get("label"), list):
        return [str(label) for label in raw["label"]], raw["text"]
    if isinstance(raw, dict):
        return [*raw], [*raw.values()]
    if isinstance(raw, list) and raw and all(isinstance(each, dict) for each in raw):
        return [str(_value(each, "label")) for each in raw], [_value(each, "text") for each in raw]
    return [], raw if isinstance(raw, list) else [raw]


def _open(config: TaskConfig, _: int, record: Any) -> OpenQuestion:
    fields = _fields(config, record)
    raw = _value(record, fields["answer"])
    several = raw if isinstance(raw, list) else [raw]
    answers = [str(each) if isinstance(each, int | float) else each for each in several]
    if not answers or not all(isinstance(each, str) for each in answers):
        raise ValueError(f"{fields['answer']} is {short(raw)}, not a text, a number or a list of them")
    return config.open_question(_stem(record, fields["question"]), *answers)


def listed(folder: Path | None = None) -> str:
    """The tasks of a folder of YAML files, two lines each. Raises ValueError where there is none, or one is wrong."""
    folder = folder or FOLDER
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in YAML)
    if not paths:
        raise ValueError(f"there is no task's YAML file in {folder}, where the repository has them")
    lines = []
    for path in paths:
        config: TaskConfig = load_config(TaskConfig, path)
        kind = config.match or ("open" if config.is_open else "choice")
        lines += [f"{config.name:<28} {kind:<8} {path}", f"    {config.about} File: {config.file}"]
    return "\n".join(lines)
