"""The program as a user runs it: results on stdout, one sentence and status 2 for what the user can mend."""

import argparse
import io
import json
import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

from k2mini.build import KINDS
from k2mini.cli import build_parser, main
from k2mini.config import QUANTIZE_NAMES
from k2mini.data.prompts import TEMPLATES
from k2mini.evaluation.instances import EvalConfig
from k2mini.inference.generate import Decoding
from k2mini.inference.sampling import Beams, Sampling


def parsers(parser=None, path=()):
    """Every command, those within a command too, with its parser."""
    parser = parser or build_parser()
    declare = getattr(parser, "_declare", None)
    if declare is not None:
        parser._declare = None
        declare(parser)
    nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not nested:
        yield path, parser
    for action in nested:
        for name, command in action.choices.items():
            yield from parsers(command, (*path, name))


def test_every_command_explains_itself(run):
    found = dict(parsers())
    assert {("generate",), ("delta", "apply"), ("audit", "diff")} <= set(found)
    for path, parser in found.items():
        status, out, err = run(*path, "--help")
        assert (status, err) == (0, "")
        assert out.startswith(f"usage: k2mini {' '.join(path)} ")
        assert "--debug" in out
        assert parser.get_default("run").__module__.startswith("k2mini.commands.")


def test_defaults_are_those_of_the_dataclasses():
    found = dict(parsers())
    for command, arguments in (("generate", ["--model", "m", "--prompt", "x"]), ("chat", ["--model", "m"])):
        values = vars(found[command,].parse_args(arguments))
        for owner, names in (
            (Decoding, ("max_new_tokens",)),
            (Sampling, ("temperature", "top_k", "top_p", "repetition_penalty", "no_repeat_ngram_size")),
            (Beams, ("length_penalty", "early_stopping")),
        ):
            assert {name: values[name] for name in names} == {name: getattr(owner, name) for name in names}
    values = vars(found["eval",].parse_args(["--model", "m"]))
    for name in ("scoring", "template", "answer_prefix", "normalize", "score_end"):
        assert values[name] == getattr(EvalConfig, name)
    assert (values["shots"], values["batch_size"]) == (EvalConfig.num_fewshot, 16)
    assert found["prepare",].parse_args(["x", "--tokenizer", "t", "--out", "o"]).on_error == "raise"
    assert tuple(KINDS) == QUANTIZE_NAMES


def test_help_names_every_template(run):
    for command in ("generate", "chat", "eval"):
        assert ", ".join(TEMPLATES) in " ".join(run(command, "--help")[1].split())


def test_version(run):
    assert run("--version") == (0, f"k2mini {version('k2mini')}\n", "")


def test_generate_prints_the_answer_on_stdout_only(run, tiny_directory):
    common = ("generate", "--model", tiny_directory, "--prompt", "granite", "--max-new-tokens", 8)
    status, out, err = run(*common)
    assert status == 0
    assert "float32, on cpu" in err
    status, printed, _ = run(*common, "--json")
    (entry,) = json.loads(printed)
    assert status == 0
    assert set(entry) == {"prompt", "answer", "tokens", "finish"}
    assert out == entry["answer"] + "\n"
    assert (len(entry["tokens"]), entry["finish"]) == (8, "length")


def test_generate_with_a_seed_repeats(run, tiny_directory):
    common = ("generate", "--model", tiny_directory, "--prompt", "rock", "--temperature", 1, "--max-new-tokens", 12)
    first, again, other = (run(*common, "--seed", seed)[1] for seed in (1, 1, 2))
    assert first == again != other


def test_chat_reads_lines_and_ends_with_the_input(run, tiny_directory, monkeypatch):
    lines = iter(["granite", "", "/reset", "granite", "/exit", "never read"])
    monkeypatch.setattr("builtins.input", lambda _prompt="": next(lines))
    status, out, err = run("chat", "--model", tiny_directory, "--max-new-tokens", 4)
    assert status == 0
    assert "(forgotten)" in err
    assert next(lines) == "never read"
    half = len(out) // 2
    assert out[:half] == out[half:] != ""  # the same answer, since the history was forgotten


def test_eval_counts_every_published_question(run, tiny_directory, geobench, tmp_path):
    files = (geobench["npee"], geobench["ap"])
    status, out, err = run("eval", "--model", tiny_directory, "--benchmark", *files, "--out", tmp_path, "--json")
    assert status == 0, err
    report = json.loads(out)
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert [(task["task"], task["n"]) for task in report["tasks"]] == [
        ("npee/choice", 182),
        ("npee/tf", 134),
        ("ap", 1395),
    ]
    fields = {"accuracy", "low", "high", "chance", "majority", "scoring", "template", "answer_prefix", "shots"}
    assert all(fields <= set(task) and task["low"] <= task["accuracy"] <= task["high"] for task in report["tasks"])
    assert report["tasks"][0]["unanswerable"] == [155, 175]
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(results) == 182 + 134 + 1395
    for task in report["tasks"]:
        own = [result for result in results if result["task"] == task["task"]]
        assert task["accuracy"] == pytest.approx(sum(r["prediction"] == r["answer"] for r in own) / task["n"])


def test_options_that_are_all_empty_cannot_be_right(run, tiny_directory, geobench):
    few = ["--tasks", "ap", "--limit", "400", "--scoring", "text", "--json"]
    status, out, err = run("eval", "--model", tiny_directory, "--benchmark", geobench["ap"], *few)
    assert status == 0, err
    (task,) = json.loads(out)["tasks"]
    assert (task["n"], task["unanswerable"]) == (400, [195, 384])


def test_eval_prints_a_table(run, tiny_directory, geobench):
    status, out, _ = run("eval", "--model", tiny_directory, "--benchmark", geobench["npee"], "--limit", 5)
    assert status == 0
    assert [line.split()[:2] for line in out.splitlines()[1:3]] == [["npee/choice", "5"], ["npee/tf", "5"]]


def bad_directory(tiny_directory, tmp_path, fault):
    directory = tmp_path / "model"
    shutil.copytree(tiny_directory, directory)
    config = json.loads((directory / "config.json").read_text())
    if fault == "truncated":
        weights = directory / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:5000])
    elif fault == "architecture":
        (directory / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    elif fault == "vocabulary":
        (directory / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] - 10}))
    elif fault == "no tokenizer":
        (directory / "tokenizer.model").unlink()
    return directory


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("truncated", "model.safetensors is truncated or damaged"),
        ("architecture", "model_type is 'gpt2'"),
        ("vocabulary", "this tokenizer belongs to another model"),
        ("no tokenizer", "has no tokenizer.model"),
    ],
)
def test_bad_models(run, tiny_directory, tmp_path, fault, message):
    directory = bad_directory(tiny_directory, tmp_path, fault)
    for command in (("generate", "--prompt", "x"), ("chat",)):
        status, out, err = run(command[0], "--model", directory, *command[1:])
        assert (status, out) == (2, "")
        assert err.startswith("k2mini: ")
        assert message in err
        assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "no/such/directory"), "there is no directory no/such/directory"),
        (("--model", "daven3/k2-v1"), "hf download daven3/k2-v1 --local-dir k2-v1"),
        (("--prompt", "  "), "the prompt is empty"),
        (("--temperature", "-1"), "--temperature must be 0 (greedy) or a positive number, not -1.0"),
        (("--top-p", "1.2"), "--top-p must be above 0 and at most 1, not 1.2"),
        (("--max-new-tokens", "0"), "--max-new-tokens must be at least 1, not 0"),
        (("--max-new-tokens", "2000"), "more than the model's context of 1024"),
        (("--template", "alpacca"), "there is no template 'alpacca'"),
        (("--device", "tpu9"), "--device tpu9 is not a device that is supported; cpu, cuda and cuda:1, … are"),
        (("--device", "cuda:99"), "this machine has"),
        (("--device", "meta"), "--device meta is not a device that is supported"),
        (("--device", "mps"), "--device mps is not a device that is supported"),
        (("--device", "cuda:99999999999"), "is not a device that is supported"),
        (("--prompt", "half \ud800"), "--prompt: 'half \\ud800' is not UTF-8"),
        (("--prompt", "byte \udcff"), "--prompt: 'byte \\udcff' is not UTF-8"),
        (("--context", "byte \udcff"), "--context: 'byte \\udcff' is not UTF-8"),
        (("--threads", "0"), "--threads must be at least 1, not 0"),
    ],
)
def test_bad_options_of_generate(run, tiny_directory, arguments, message):
    defaults = {"--model": tiny_directory, "--prompt": "granite"}
    defaults.update([arguments])
    status, out, err = run("generate", *(word for pair in defaults.items() for word in pair))
    assert (status, out) == (2, "")
    assert message in err.splitlines()[-1]


def test_bad_input_of_eval_writes_nothing(run, tiny_directory, tmp_path, geobench):
    other = tmp_path / "other.json"
    other.write_text('[{"instruction": "x"}]')
    (tmp_path / "file").touch()
    out_dir = tmp_path / "out"
    for arguments, message in [
        (("--benchmark", other), "is neither a GeoBench file nor records of question, choices and answer"),
        (("--benchmark", tmp_path / "none.json"), "there is no benchmark file"),
        (("--benchmark", geobench["npee"], geobench["npee"]), "the same benchmark is named twice"),
        (("--benchmark", geobench["npee"], "--limit", 0), "--limit must be at least 1"),
        (("--benchmark", geobench["npee"], "--template", "x"), "there is no template 'x'"),
        (("--benchmark", geobench["npee"], "--model", tmp_path / "none"), "there is no directory"),
    ]:
        status, out, err = run("eval", "--model", tiny_directory, "--out", out_dir, *arguments)
        assert (status, out) == (2, ""), err
        assert message in err.splitlines()[-1]
        assert not out_dir.exists()
    status, _, err = run("eval", "--model", tiny_directory, "--benchmark", geobench["npee"], "--out", tmp_path / "file")
    assert status == 2
    assert "file is a file; name a folder" in err


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="there is no directory"):
        main(["generate", "--model", "/nowhere", "--prompt", "x", "--debug"])


def test_unknown_commands_exit_with_2(run):
    status, _, err = run("generat")
    assert status == 2
    assert "invalid choice: 'generat'" in err


def test_an_unknown_flag_prints_the_commands_own_usage(run):
    for command in (["info", "x"], ["delta", "apply", "--base", "x", "--delta", "x", "--out", "x"]):
        status, _, err = run(*command, "--frobnicate")
        assert status == 2
        name = " ".join(command[: 1 + (command[0] == "delta")])
        assert err.startswith(f"usage: k2mini {name} ")
        assert f"k2mini {name}: error: unrecognized arguments: --frobnicate" in err


def test_closed_streams(tiny_directory, tiny_tokenizer, tmp_path):
    """What is printed to one that is closed is lost, and lands in no file; the rest is as ever."""
    (tmp_path / "text.txt").write_text("granite")
    command = [sys.executable, "-m", "k2mini", "prepare", str(tmp_path / "text.txt")]
    command += ["--tokenizer", str(tiny_tokenizer.path), "--out"]
    whole = {}
    for name, closing in {"none": "", "in": "<&-", "out": ">&-", "error": "2>&-", "all": "<&- >&- 2>&-"}.items():
        shell = f'"$@" {closing}'
        done = subprocess.run(
            ["bash", "-c", shell, "x", *command, str(tmp_path / name)], capture_output=True, text=True
        )
        assert done.returncode == 0, (name, done.stderr)
        assert ("train: 1 documents" in done.stdout) == (name not in ("out", "all"))
        assert ("encoding" in done.stderr) == (name not in ("error", "all"))
        whole[name] = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
    assert all(content == whole["none"] for content in whole.values())
    done = subprocess.run(["bash", "-c", '"$@" 2>&-', "x", *command, str(tmp_path / "all")], capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, b"", b"")


def test_a_full_standard_output_is_said_once(tiny_directory):
    with open("/dev/full", "w") as full:  # noqa: PTH123
        command = [sys.executable, "-m", "k2mini", "info", str(tiny_directory)]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "k2mini: No space left on device\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_narrow_streams(tiny_directory, monkeypatch, encoding):
    """JSON stays JSON, and text is printed."""
    prompt = "岩 – 🌋"
    for options in (["--json"], []):
        out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr("sys.stdout", out)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(prompt.encode()), encoding="utf-8"))
        with pytest.raises(SystemExit) as end:
            main(["generate", "--model", str(tiny_directory), "--prompt", "-", "--max-new-tokens", "12", *options])
        assert end.value.code == 0
        said = out.buffer.getvalue().decode(encoding)
        assert said.strip()
        if options:
            assert json.loads(said)[0]["prompt"] == prompt


def test_standard_input_that_is_not_utf8_is_named(run, tiny_directory, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"granite \xff quartz"), encoding="utf-8"))
    status, out, err = run("generate", "--model", tiny_directory, "--prompt", "-")
    assert (status, out) == (2, "")
    assert "granite \\udcff" in err.splitlines()[-1]


def no_memory():
    torch.empty(2**50)


def too_large():
    torch.empty(2**40, 2**40)


def deep():
    deep()


def without_words():
    error = OSError("12 requested and 3 written")
    error.filename = "a.bin"
    raise error


def raising(error):
    def call():
        raise error

    return call


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (no_memory, "not enough memory ("),
        (too_large, "not enough memory ("),
        (raising(MemoryError()), "not enough memory; use a smaller batch"),
        (
            raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")),
            "not enough memory (CUDA out of",
        ),
        (deep, "something that was read is nested too deeply"),
        (raising(OverflowError("int too large to convert to float")), "a number is too large (int too large"),
        (without_words, "a.bin: 12 requested and 3 written"),
        (raising(OSError()), "OSError"),
        (raising(PermissionError(13, "Permission denied", "b.bin")), "b.bin: Permission denied"),
    ],
)
def test_faults_are_one_sentence(run, monkeypatch, fault, said):
    monkeypatch.setattr("k2mini.commands.weights.run_info", lambda _: fault())
    status, out, err = run("info", "x")
    assert (status, out) == (2, "")
    assert err.startswith(f"k2mini: {said}")
    assert len(err.splitlines()) == 1


def test_faults_of_the_program_show_where(monkeypatch):
    monkeypatch.setattr("k2mini.commands.weights.run_info", lambda _: raising(RuntimeError("shapes differ"))())
    with pytest.raises(RuntimeError, match="shapes differ"):
        main(["info", "x"])
