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

from k2mini.cli import build_parser, main
from k2mini.config import QUANTIZE_NAMES
from k2mini.data.prompts import TEMPLATES
from k2mini.evaluation.instances import EvalConfig
from k2mini.inference.beam import Beams
from k2mini.inference.decoding import Decoding
from k2mini.inference.sampling import Sampling
from k2mini.nn.quant import KINDS


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
    for name in ("scoring", "answer_prefix", "normalize", "score_end"):
        assert values[name] == getattr(EvalConfig, name)
    assert (values["shots"], values["batch_size"]) == (EvalConfig.num_fewshot, 16)
    assert found["prepare",].parse_args(["x", "--tokenizer", "t", "--out", "o"]).on_error == "raise"
    assert sorted(KINDS) == sorted(QUANTIZE_NAMES)


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
        model = () if "--model" in arguments else ("--model", tiny_directory)
        status, out, err = run("eval", *model, "--out", out_dir, *arguments)
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


def values_of(action):
    """Words that an option takes."""
    word = str(action.choices[0]) if action.choices else "1"
    return [word] * (action.nargs if isinstance(action.nargs, int) else 1)


def test_an_option_given_twice_is_refused_or_adds_up(capsys):
    """Every option of every command, those that commands share too; none of them is abbreviated."""
    counted = {"refused": 0, "adds": 0}
    for path, parser in parsers():
        options = [action for action in parser._actions if action.option_strings and action.nargs != 0]
        for action in options:
            name, value = action.option_strings[-1], values_of(action)
            for twice in ([name, *value, name, *value], [f"{name}=1", f"{name}=1"])[: 1 if len(value) > 1 else 2]:
                with pytest.raises(SystemExit) as end:
                    parser.parse_args([*twice, "--no-such-option"])
                assert end.value.code == 2
                said, refused = capsys.readouterr().err, f"{' '.join(path)}: error: {name} is given twice\n"
                adds = action.nargs == "+" or isinstance(action, argparse._AppendAction)
                assert not adds or not action.default
                assert said.endswith(refused) != adds or "invalid choice" in said, (path, name, said)
                counted["adds" if adds else "refused"] += 1
    assert min(counted.values()) > 4, counted
    found = dict(parsers())
    parse = found["eval",].parse_args
    assert parse(["--model", "m", "--tasks", "a", "b", "--tasks", "c"]).tasks == ["a", "b", "c"]
    assert (parse(["--model", "m"]).tasks, parse(["--model", "m", "--tasks", "d"]).tasks) == (None, ["d"])
    for length in ("--length", "--length-penalt"):
        with pytest.raises(SystemExit):
            found["generate",].parse_args(["--model", "m", "--prompt", "x", length, "9"])
        assert f"unrecognized arguments: {length} 9" in capsys.readouterr().err


def test_a_command_line_with_an_option_twice(run, tiny_directory):
    for command in (
        ["generate", "--model", tiny_directory, "--prompt", "a", "--prompt", "a"],
        ["merge", "--base", "b", "--adapter", "a", "--base", "b", "--out", "o"],
        ["delta", "make", "--base", "a", "--tuned", "b", "--out", "o", "--base", "c"],
        ["audit", "patch", "--model", "m", "--replace", "a", "b", "--replace", "c", "d"],
        ["pretrain", "x.yaml", "--seed", "0", "--seed=0"],
    ):
        status, out, err = run(*command)
        assert (status, out) == (2, "")
        assert err.startswith(f"usage: k2mini {command[0]} ")
        assert "is given twice" in err.splitlines()[-1]


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


NO_DEVICE_MEMORY = (
    "CUDA out of memory. Tried to allocate 30.00 GiB. GPU 1 has a total capacity of 24.00 GiB of which 23.41 GiB is "
    "free. Of the allocated memory 0 bytes is allocated by PyTorch, and 0 bytes is reserved by PyTorch but unallocated."
)


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
        (
            raising(torch.OutOfMemoryError(NO_DEVICE_MEMORY)),
            "GPU 1 is out of memory: 30.00 GiB more were wanted, 23.41 GiB of its 24.00 GiB are free; "
            "a smaller batch, shorter answers or int8 weights take less",
        ),
        (
            raising(RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel")),
            "the installed PyTorch has no code for this GPU; install",
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
