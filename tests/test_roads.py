"""Size is a feature: how many files lie between a command and what it does, how long files and functions are.

The roads are listed in .github/ARCHITECTURE.md; a road that changed fails here, with what to write there.
"""

import ast
import json
import re
import subprocess
import sys

import pytest

from k2mini.cli import main
from tests.conftest import ROOT

PACKAGE = ROOT / "k2mini"
ARCHITECTURE = ROOT / ".github" / "ARCHITECTURE.md"
# What a road may count: files, and lines of these files. Where it has a core, these are the core's.
LIMITS = {
    "training": (19, None),
    "training, core": (8, 1220),  # with offload, and the dtype of an embedding that trains beside adapters
    "generate": (17, None),  # with the scheduler, which answers many at once, and chat templates
    "generate, core": (8, 1430),
    "eval": (20, None),  # with chat templates, and tasks of all kinds, which are read in a file of their own
    "delta": (9, None),
}
# The functions that make a core: a batch, its learning rate and the step; a token, from the logits before it to its id.
STEP, TOKEN = ["local_batches", "lr_at", "train_step"], ["_route", "hidden", "_logits", "choose"]


def lines_of(names):
    return sum(len((PACKAGE / name).read_text(encoding="utf-8").splitlines()) for name in names)


def do(*arguments):
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert end.value.code == 0


@pytest.fixture(scope="module")
def roads(tmp_path_factory, tiny_directory, tiny_tokenizer):
    """The files of each road, in the order in which they are entered."""
    folder = tmp_path_factory.mktemp("roads")
    text = folder / "text.txt"
    text.write_text("granite is made of quartz. " * 200, encoding="utf-8")
    do("prepare", text, "--tokenizer", tiny_tokenizer.path, "--out", folder / "corpus")
    do("delta", "make", "--base", tiny_directory, "--tuned", tiny_directory, "--out", folder / "delta")
    questions = folder / "questions.jsonl"
    questions.write_text('{"question": "What is granite?", "choices": ["rock", "a fruit"], "answer": "A"}\n')
    settings = (
        f"run: {{dir: {folder}/run}}\nmodel: {{path: {tiny_directory}}}\ndata: {{path: {folder}/corpus, seq_len: 32}}\n"
        "train: {lr: 1.0e-3, max_steps: 1, global_batch_size: 2, micro_batch_size: 2}\n"
    )
    (folder / "run.yaml").write_text(settings)
    model = ["--model", str(tiny_directory)]
    commands = {
        "training": (["pretrain", f"{folder}/run.yaml"], STEP, "train_step"),
        "generate": (["generate", *model, "--prompt", "granite is", "--max-new-tokens", "4"], TOKEN, None),
        "eval": (["eval", *model, "--benchmark", str(questions)], [], None),
        "delta": (
            ["delta", "apply", "--base", str(tiny_directory), "--delta", f"{folder}/delta", "--out", f"{folder}/out"],
            [],
            None,
        ),
    }
    asked = [{"arguments": a, "core": core, "until": until} for a, core, until in commands.values()]
    done = subprocess.run(
        [sys.executable, "-m", "tests.roads"], input=json.dumps(asked), capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    found = {}
    for name, measured in zip(commands, json.loads(done.stdout), strict=True):
        assert measured["status"] == 0, measured["said"]
        found[name] = measured["files"]
        if commands[name][1]:
            found[f"{name}, core"] = measured["core"]
    return found


def test_roads_are_short(roads):
    for name, (files, lines) in LIMITS.items():
        assert 0 < len(roads[name]) <= files, f"{name}: {len(roads[name])} files, {roads[name]}"
        if lines is not None:
            assert lines_of(roads[name]) <= lines, f"{name}: {lines_of(roads[name])} lines, {roads[name]}"


def test_architecture_has_the_roads(roads):
    """The counts, and the files under each road's heading. Lines may drift by a twentieth before the table must."""
    text = ARCHITECTURE.read_text(encoding="utf-8")
    table = "\n".join(f"| {name} | {len(files)} | {lines_of(files):,} |" for name, files in roads.items())
    written = re.findall(r"^\| ([a-z, ]+) \| (\d+) \| ([\d,]+) \|$", text, re.MULTILINE)
    counts = {name: (int(files), int(lines.replace(",", ""))) for name, files, lines in written}
    assert set(counts) == set(roads), f"the table is now\n{table}"
    for name, files in roads.items():
        assert counts[name][0] == len(files), f"the table is now\n{table}"
        assert abs(counts[name][1] - lines_of(files)) <= lines_of(files) / 20, f"the table is now\n{table}"
        if "core" not in name:
            section = re.search(rf"^### {name}\b.*?(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
            assert section, f"there is no section '### {name}'"
            named = re.findall(r"^\d+\. `([\w/]+\.py)`", section[0], re.MULTILINE)
            assert sorted(named) == sorted(files), f"the files of {name} are now\n" + "\n".join(files)


def functions():
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield path.relative_to(PACKAGE).as_posix(), node


def test_files_are_short():
    assert lines_of(["cli.py"]) <= 145  # a command takes two lines, and there are 27
    long = {path: lines_of([path.relative_to(PACKAGE)]) for path in PACKAGE.rglob("*.py")}
    assert not {path: lines for path, lines in long.items() if lines > 300}


def test_functions_are_short():
    """But for lists of a command's arguments, whose names say so."""
    long = {
        f"{path}: {node.name}": node.end_lineno - node.lineno + 1
        for path, node in functions()
        if node.end_lineno - node.lineno >= 60 and not node.name.endswith("_arguments")
    }
    assert not long


def test_functions_have_few_parameters():
    wide = {}
    for path, node in functions():
        names = [each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        if len([name for name in names if name not in ("self", "cls")]) > 8:
            wide[f"{path}: {node.name}"] = len(names)
    assert not wide
