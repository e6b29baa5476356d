"""README.md's commands run in its order, in one folder, and print what it says; commands in other pages parse.

A fenced block is run, unless a comment directly before it says why not: `<!-- not run: … -->`. The README's files are
the demo's, its 7B models the demo's base with as many tokens as LLaMA has (`make_world`); `smollm2` is the real model,
where it is there. CHANGED is all that a command is told beyond what the README says.
"""

import argparse
import contextlib
import gzip
import json
import os
import re
import shlex
from dataclasses import fields, is_dataclass
from typing import NamedTuple, get_args, get_type_hints

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import sentencepiece_model_pb2
from torch.distributed.run import get_args_parser

from k2mini.cli import build_parser
from k2mini.config import FinetuneConfig, PretrainConfig
from k2mini.demo.sources import BASE, QUICK, write_world
from k2mini.evaluation.instances import K2_LETTERS, K2_WORDS
from tests.conftest import ROOT, asset
from tests.faults.server import Request
from tests.test_readme import DOCUMENTS, README, RESULTS

# What the README says -> what is run, so that it takes seconds; each has to occur.
SHORT = "train.epochs=null train.max_steps=2 train.global_batch_size=4 train.micro_batch_size=2 train.compile=false"
CHANGED = {
    "k2mini demo": "k2mini demo --quick",
    "--max-new-tokens 128": "--max-new-tokens 2",
    "pretrain configs/further_pretrain_7b.yaml": f"pretrain configs/further_pretrain_7b.yaml {SHORT} data.seq_len=64",
    "finetune configs/instruct_stage1_7b.yaml": f"finetune configs/instruct_stage1_7b.yaml {SHORT} data.val_size=4",
    "finetune configs/instruct_stage2_7b.yaml": f"finetune configs/instruct_stage2_7b.yaml {SHORT} data.val_size=4",
    "train.max_steps=800": "train.max_steps=2",
    "--tasks npee/choice": "--tasks npee/choice --limit 4",
    "configs/tiny_pretrain.yaml": "configs/tiny_pretrain.yaml train.max_steps=2",
    "configs/tiny_stage1.yaml": "configs/tiny_stage1.yaml train.max_steps=2",
    "configs/tiny_stage2.yaml": "configs/tiny_stage2.yaml train.max_steps=2",
    "audit patch --model smollm2": "audit patch --model llama-7b",  # of the real model it takes a minute
}
# Beginnings of commands whose printed output is compared to the letter; of others, with every number taken as 0.
EXACT = ("k2mini plan", "k2mini generate --model smollm2")
# Beginnings of commands -> the file in tools/results/ that has the very lines that the README shows.
RECORDED = {"k2mini demo": "demo.txt", "k2mini eval": "eval_npee_letter.txt", "k2mini plan": "plan_7b.txt"}
REAL = os.environ.get("K2MINI_REAL_MODEL")
RANKS = 2  # of torchrun, at most

# A comment that says why not, if there is one, and the block.
BLOCK = re.compile(r"(?:<!-- not run:((?:(?!-->).)*)-->\s*)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block: its line in the file, its language, its text, and why it is not run (None: it is)."""

    line: int
    language: str
    text: str
    reason: str | None


class Command(NamedTuple):
    """A command line, and what the README shows of its standard output (None: nothing)."""

    text: str
    shown: list[str] | None


def blocks(text):
    """All fenced blocks, in order."""
    return [
        Block(text.count("\n", 0, found.start(2)) + 1, found[2], found[3], found[1] and found[1].strip())
        for found in BLOCK.finditer(text)
    ]


def commands(block):
    """The commands of a block. Without a language, those after `$ `, each with the lines that follow it."""
    if block.language == "bash":
        lines = re.sub(r"\\\n\s*", "", block.text).splitlines()
        return [Command(shlex.join(words), None) for line in lines if (words := shlex.split(line, comments=True))]
    parts = re.split(r"^\$ ", block.text, flags=re.MULTILINE)
    assert not parts[0], f"README.md, line {block.line}: a block of output begins with its command, after '$ '"
    return [Command(part.partition("\n")[0], part.splitlines()[1:]) for part in parts[1:]]


def agree(shown, came, exact):
    """Whether lines that are shown came, where `…` stands for any number of lines."""
    pattern = "".join(r"(?:.*\n)*" if line == "…" else re.escape(_form(line, exact)) + r"\n" for line in shown)
    return re.fullmatch(pattern, "".join(_form(line, exact) + "\n" for line in came.splitlines())) is not None


def _form(line, exact):
    return line if exact else " ".join(re.sub(r"\d+(?:[.,]\d+)*", "0", line).split())


# --- the README's world


def make_world(folder):
    """What the README takes for granted: models that are downloaded, documents, instructions, benchmarks."""
    write_world(folder / "world", 0, QUICK)
    data = folder / "world"
    widen_base(folder / "llama-7b")
    for name, target in {
        "configs": ROOT / "configs",
        "k2": "llama-7b",
        "smollm2": REAL or "llama-7b",
        "alpaca_data_gpt4.json": data / "general.json",
        "geosignal.json": data / "expert.json",
        "geobench_apstudy.json": data / "questions_ap_unseen.json",
    }.items():
        (folder / name).symlink_to(target)
    documents = [json.loads(line)["text"] for line in (data / "corpus.jsonl").read_text().splitlines()]
    (folder / "papers").mkdir()
    for number, text in enumerate(documents[:3]):
        (folder / "papers" / f"{number}.txt").write_text(text)
    (folder / "more.jsonl.gz").write_bytes(gzip.compress((data / "corpus.jsonl").read_bytes()))
    npee = json.loads((data / "questions_npee_unseen.json").read_text())
    npee["choice"]["answer"][2:4] = ["E", "E"]  # no option can be right, as in two of GeoBench's
    npee["tf"] = {"question": ["Basalt is a rock.", "Quartz is a plant."], "answer": ["True", "False"]}
    (folder / "geobench_npee.json").write_text(json.dumps(npee))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tools")
        import make_papers
    make_papers.make(folder / "mini", 30, 0)
    questions = [entry["question"]["stem"] for entry in json.loads((data / "questions_ap_unseen.json").read_text())]
    (folder / "input_ls.json").write_text(json.dumps(questions))
    shot = "### Instruction:\nWhich is a rock?\nChoose from:\nA. basalt\nB. rain\n\n### Response:\nThe answer is:\nA\n"
    (folder / "multiple_choice_samples_wa.txt").write_text("\n\n".join([shot] * 4))


def widen_base(directory):
    """The demo's base over 32,000 pieces, which have LLaMA's ids of the answers and the words of the audit."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((BASE / "tokenizer.model").read_bytes())
    old = [(piece.piece, piece.score, piece.type) for piece in proto.pieces]
    fixed = {place: f"▁{text}" for text, place in (K2_LETTERS | K2_WORDS).items()}
    fixed |= {31998: "▁Paris", 31999: "▁Rome"}
    known = {piece[0]: piece for piece in old}
    others = iter([row for row, piece in enumerate(old) if piece[0] not in fixed.values()])
    rows = [None if place in fixed else next(others, None) for place in range(32000)]
    del proto.pieces[:]
    kind = sentencepiece_model_pb2.ModelProto.SentencePiece.Type
    for place, row in enumerate(rows):
        if row is not None:
            piece = old[row]
        elif place in fixed:
            piece = known.get(fixed[place], (fixed[place], 0.0, kind.USER_DEFINED))
        else:
            piece = f"<{place}>", 0.0, kind.UNUSED
        proto.pieces.add(**dict(zip(("piece", "score", "type"), piece, strict=True)))
    directory.mkdir()
    (directory / "tokenizer.model").write_bytes(proto.SerializeToString())
    tensors = load_file(BASE / "model.safetensors")
    index = torch.tensor([place % len(old) if row is None else row for place, row in enumerate(rows)])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][index]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    shape = {**json.loads((BASE / "config.json").read_text()), "vocab_size": 32000, "max_position_embeddings": 2048}
    (directory / "config.json").write_text(json.dumps(shape))


class Shell:
    """Runs the README's commands in a folder."""

    def __init__(self, folder, forks):
        self.folder, self.forks, self.unused, self.python = folder, forks, set(CHANGED), {}

    def run(self, text):
        """Run a command in all its ranks; returns (status, standard output, standard error), of a rank that failed."""
        for said, done in CHANGED.items():
            if said in text:
                text = text.replace(said, done)
                self.unused.discard(said)
        program, *words = shlex.split(text)
        ranks = 1
        if program == "torchrun":
            options = get_args_parser().parse_args(words)
            assert options.module
            program, ranks = options.training_script, min(int(options.nproc_per_node), RANKS)
            words = options.training_script_args
        assert program == "k2mini", f"{program}: the test cannot run it; say why not, in a comment"
        # A preset stands in for LLaMA-7B only where there is no model of that name.
        folder = self.folder / "empty" if words[0] == "plan" else self.folder
        if not folder.exists():
            folder.mkdir()
            (folder / "configs").symlink_to(ROOT / "configs")
        children = self.forks.start_ranks(ranks, Request([words], str(folder), limit=300))
        ends = [child.wait() for child in children]
        print(f"{ends[0].seconds:.1f} s", text)
        failed = [end for end in ends if end.status != 0]
        return (failed or ends)[0].status, (failed or ends)[0].out, (failed or ends)[0].err


def shown_blocks():
    """(line, command) of all that the README shows with its output."""
    found = blocks(README.read_text(encoding="utf-8"))
    return [(block.line, command) for block in found if not block.language for command in commands(block)]


def test_commands_run_in_order(tmp_path, monkeypatch, forks):
    """Each ends with 0, and what it prints is what the README shows: in form where EXACT does not name it."""
    make_world(tmp_path)
    ci, wrong = (ROOT / ".ci" / "run").read_text(), []
    monkeypatch.chdir(tmp_path)
    shell = Shell(tmp_path, forks)
    for block in blocks(README.read_text(encoding="utf-8")):
        where = f"README.md, line {block.line}"
        if block.reason is not None:
            assert block.reason, f"{where}: the comment does not say why the block is not run"
            continue
        if block.language == "python":
            exec(compile(block.text, where, "exec"), shell.python)
            continue
        for command, shown in commands(block):
            if command.startswith("pip install "):
                assert command in ci, f"{where}: .ci/run, which installs, does not have {command!r}"
                continue
            status, out, err = shell.run(command)
            assert status == 0, f"{where}: {command}\nended with {status}:\n{err[-2000:]}"
            exact = command.startswith(EXACT)
            if exact and "smollm2" in command and not REAL:
                continue
            if shown is not None and not agree(shown, out, exact):
                wrong.append(f"{where}: {command}\nprints\n{out}")
    assert not shell.unused, f"CHANGED has what is in no command: {shell.unused}"
    assert not wrong, "\n".join(wrong)


def test_outputs_are_those_recorded():
    """Where tools/results/ has a command's output, the README's lines are from there."""
    named = set()
    for line, (command, shown) in shown_blocks():
        for start, name in RECORDED.items():
            if command.startswith(start):
                named.add(name)
                _, _, text = (RESULTS / name).read_text(encoding="utf-8").partition("\n\n")
                assert agree([*shown, "…"], text, exact=True), f"README.md, line {line}: not the lines of {name}"
    assert named == set(RECORDED.values())


@pytest.mark.slow
def test_the_real_models_outputs_are_those_shown(real_model, tmp_path, monkeypatch, run):
    """All of GeoBench's questions, and the two figures of the audit."""
    (tmp_path / "smollm2").symlink_to(real_model)
    (tmp_path / "geobench_npee.json").symlink_to(asset("data", "geobench", "geobench_npee.json"))
    monkeypatch.chdir(tmp_path)
    for line, (command, shown) in shown_blocks():
        if "smollm2" in command:
            status, out, err = run(*shlex.split(command)[1:])
            assert status == 0, err
            assert agree(shown, out, exact=True), f"README.md, line {line}: {command}\nprints\n{out}"


# --- the test's own reading


def test_a_block_that_is_not_run_says_why():
    bash = "```bash\nk2mini demo\n```\n"
    texts = {
        bash: [None],
        f"<!-- not run: no network -->\n{bash}": ["no network"],
        f"<!-- not\nrun: -->\n{bash}": [None],
        f"<!-- not run: -->\n\n{bash}": [""],
        f"<!-- not run: no network -->\n\nText.\n\n{bash}": [None],
        f"{bash}\n<!-- not run: no network\nhere -->\n{bash}": [None, "no network\nhere"],
    }
    for text, reasons in texts.items():
        assert [block.reason for block in blocks(text)] == reasons, text
    assert [block.line for block in blocks(f"Text.\n\n<!-- not run: no network -->\n{bash}{bash}")] == [4, 7]


def test_output_agrees_in_form_or_to_the_letter():
    came = "task   n  accuracy\nnpee  12    35.7 %\nnpee: 3 copies\n"
    assert agree(["task   n  accuracy", "npee  12    35.7 %", "npee: 3 copies"], came, exact=True)
    assert agree(["task   n  accuracy", "…", "npee: 3 copies"], came, exact=True)
    assert agree(["task n accuracy", "npee 1,395 5.2 %", "…"], came, exact=False)
    assert not agree(["task   n  accuracy"], came, exact=False), "lines are missing"
    assert not agree(["task   n  accuracy", "npee  12    35.8 %", "…"], came, exact=True), "another figure"
    assert not agree(["task n accuracy", "tf 12 35.7 %", "…"], came, exact=False), "another word"


# --- commands in prose


def parsers(parser):
    """A parser and those of its commands, with their arguments."""
    with contextlib.suppress(ValueError):
        parser.parse_args([])
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from parsers(command)


@pytest.fixture
def parser(monkeypatch):
    """The command line's parser, which misses nothing, and whose error is a ValueError."""

    def error(parser, message):
        raise ValueError(message)

    monkeypatch.setattr(argparse.ArgumentParser, "error", error)
    whole = build_parser()
    for each in parsers(whole):
        for argument in (*each._actions, *each._mutually_exclusive_groups):
            monkeypatch.setattr(argument, "required", False)
    return whole


def documents():
    """(where, text) of all that names commands: pages without their history, configurations, docstrings."""
    pages = [path for path in DOCUMENTS if path.name not in ("CHANGELOG.md", "LOG.md")]
    yield from ((path.name, BLOCK.sub("", path.read_text(encoding="utf-8"))) for path in pages)
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        lines = re.findall(r"^#   ((?:k2mini|torchrun) .*)", path.read_text(encoding="utf-8"), re.MULTILINE)
        yield path.name, "".join(f"`{line}`\n" for line in lines)
    for path in sorted((ROOT / "k2mini").rglob("*.py")):
        yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")


def refusal(parser, words):
    """What the parser says against words; '' where it takes them."""
    try:
        parser.parse_args(words)
    except SystemExit:  # --help, --version
        return ""
    except ValueError as error:
        # K, N and … stand for a number; an option may be named without its value.
        fine = re.search(r"invalid \w+ value: '([A-Z]+|.*…)'|expected (one|at least one) argument", str(error))
        return "" if fine else str(error)
    return ""


def test_commands_in_prose_are_commands(parser):
    """Every `k2mini …` and `torchrun … -m k2mini …` in backticks has a command and options that exist."""
    wrong, number = [], 0
    for where, text in documents():
        for command in re.findall(r"`((?:k2mini|torchrun) [^`]+)`", text):
            words = shlex.split(command, comments=True)
            if words[0] == "torchrun" and "-m" in words:
                words = get_args_parser().parse_args(words[1:]).training_script_args
            elif words[0] == "k2mini":
                words = words[1:]
            number += 1
            if not re.fullmatch(r"[A-Z]+", words[0]) and (why := refusal(parser, words)):
                wrong.append(f"{where}: {command}: {why}")
    assert number > 20
    assert not wrong, "\n".join(wrong)


def test_options_and_keys_in_prose_exist(parser):
    """`--option …` is one of some command or of torchrun, `section.key` is in a configuration."""
    actions = [*get_args_parser()._actions, *(action for each in parsers(parser) for action in each._actions)]
    known = {name for action in actions for name in action.option_strings}
    keys = {
        f"{section.name}.{key.name}"
        for config in (PretrainConfig, FinetuneConfig)
        for section, kind in ((each, get_type_hints(config)[each.name]) for each in fields(config))
        for key in fields(next(filter(is_dataclass, (kind, *get_args(kind)))))
    }
    sections = {key.partition(".")[0] for key in keys}
    text = BLOCK.sub("", README.read_text(encoding="utf-8"))
    quoted = re.findall(r"`([^`]+)`", text)
    named = {word for words in quoted if words.startswith("--") for word in words.split() if word.startswith("--")}
    assert len(named) > 10
    assert named <= known, f"README.md names options that no command has: {named - known}"
    settings = {
        found[1] for words in quoted if (found := re.match(r"((\w+)\.\w+)(?![\w.(])", words)) and found[2] in sections
    }
    assert len(settings) > 5
    assert settings <= keys, f"README.md names keys that no configuration has: {settings - keys}"
