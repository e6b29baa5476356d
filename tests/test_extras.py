"""What needs an extra: where it is installed, the file is written; where it is not, one sentence and status 2."""

import json
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from k2mini.config import RunSection
from k2mini.distributed import World
from k2mini.errors import EXTRAS, need_extra
from k2mini.evaluation.report import Result
from k2mini.training.boards import check_boards, open_boards
from tests.conftest import ROOT
from tests.helpers import one_step
from tests.json_tokenizer import write_json_tokenizer

PNG = b"\x89PNG\r\n\x1a\n"
# What an extra brings, and the modules through which k2mini gets at it.
PACKAGES = {
    "plot": ["matplotlib"],
    "gguf": ["gguf"],
    "tensorboard": ["tensorboard", "torch.utils.tensorboard"],
    "wandb": ["wandb"],
    "serve": ["uvicorn"],
    "tokenizers": ["tokenizers"],
    "chat": ["jinja2"],
    "corpus": ["lxml", "pypdfium2", "ftfy", "py3langid"],
    "hub": ["huggingface_hub"],
    "reference": ["transformers"],
}


@pytest.fixture
def without(monkeypatch):
    """Call with an extra's name to make its packages impossible to import."""

    def hide(extra):
        for package in PACKAGES[extra]:
            for name in [name for name in sys.modules if f"{name}.".startswith(f"{package}.")]:
                monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, PACKAGES[extra][0], None)

    return hide


@pytest.fixture
def training(tmp_path):
    """A run's folder with metrics, as `pretrain` leaves it."""
    entries = [{"step": step, "loss": 3.0 / step} for step in (1, 2, 3)] + [{"step": 3, "val_loss": 1.5}]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return tmp_path


@pytest.fixture
def evaluated(tmp_path):
    """Two runs of `eval --out`."""
    row = {"task": "rocks", "accuracy": 0.5, "low": 0.1, "high": 0.9, "chance": 0.25}
    result = Result("rocks", 0, "A", "A", [-1.0], [[3]], digest="of the question")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps({"model": name, "tasks": [row]}))
        (tmp_path / name / "results.jsonl").write_text(result.line() + "\n")
    return tmp_path


@pytest.fixture
def pretraining(tiny_directory, tmp_path):
    """The command line of a short run that writes for TensorBoard."""
    (tmp_path / "corpus.txt").write_text("granite is made of quartz\n\nbasalt is a rock of the mantle\n\n" * 40)
    config = {
        "run": {"dir": str(tmp_path / "run"), "tensorboard": True},
        "model": {"path": str(tiny_directory)},
        "data": {"path": str(tmp_path / "corpus.txt"), "seq_len": 16},
        "train": {"lr": 1e-3, "global_batch_size": 2, "micro_batch_size": 2, "max_steps": 2},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    return ["pretrain", tmp_path / "config.yaml"]


def assert_one_sentence(done, extra):
    status, out, err = done
    assert (status, out) == (2, "")
    assert err.splitlines()[-1] == f"k2mini: {need_extra(extra)}"
    assert f"pip install -c constraints.txt -e '.[{extra}]'" in err
    assert "Traceback" not in err


def test_every_extra_has_a_sentence():
    """One that names the feature, the extra and the command, for each extra of pyproject.toml that users install."""
    section = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    extras = set(re.findall(r"^(\w+) = ", section, re.MULTILINE))
    assert set(EXTRAS) == set(PACKAGES) == extras - {"test"}
    assert str(need_extra("plot")) == (
        "a picture of losses or accuracies needs the extra 'plot'; in the folder of k2mini's clone: "
        "pip install -c constraints.txt -e '.[plot]'"
    )


def test_extras_are_named_in_one_way():
    """In helps and comments as (extra: NAME); how one is installed, `need_extra` alone says."""
    for path in sorted((ROOT / "k2mini").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for named in re.findall(r"\(extra[: ].*?\)", text):
            assert named in {f"(extra: {name})" for name in EXTRAS}, path
        assert path.name == "errors.py" or not re.search(r"pip install (?!huggingface_hub)", text), path


def test_plot_without_its_extra(training, run, without):
    without("plot")
    assert_one_sentence(run("plot", training / "one", "--out", training / "loss.png"), "plot")
    assert not (training / "loss.png").exists()


def test_a_picture_is_a_file(training, run):
    """matplotlib would write FOLDER.png beside a folder, and a picture needs a folder that is there."""
    for out, said in [(training, "is a folder; name a file"), (training / "no" / "loss.png", "there is no folder")]:
        status, _, err = run("plot", training / "one", "--out", out)
        assert status == 2
        assert said in err
    assert not training.with_name(f"{training.name}.png").exists()


def test_compare_without_its_extra(evaluated, run, without):
    without("plot")
    done = run("compare", evaluated / "one", evaluated / "two", "--chart", evaluated / "chart.png")
    assert_one_sentence(done, "plot")
    assert not (evaluated / "chart.png").exists()


def test_gguf_without_its_extra(tiny_directory, tmp_path, run, without):
    without("gguf")
    assert_one_sentence(run("convert", tiny_directory, "--to", "gguf", "--out", tmp_path / "m.gguf"), "gguf")
    assert list(tmp_path.iterdir()) == []


def test_tokenizer_json_without_its_extra(tiny_directory, tmp_path, run, without):
    """Beside a tokenizer.model that has all its tokens it is not needed."""
    path = write_json_tokenizer(tmp_path / "model")
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(tiny_directory / name, tmp_path / "model" / name)
    (tmp_path / "text.txt").write_text("granite")
    without("tokenizers")
    assert_one_sentence(run("generate", "--model", tmp_path / "model", "--prompt", "granite"), "tokenizers")
    prepare = ["prepare", tmp_path / "text.txt", "--out", tmp_path / "out", "--tokenizer"]
    assert_one_sentence(run(*prepare, path), "tokenizers")
    assert_one_sentence(run(*prepare, tmp_path / "model"), "tokenizers")
    assert not (tmp_path / "out").exists()
    shutil.copyfile(tiny_directory / "tokenizer.model", tmp_path / "model" / "tokenizer.model")
    content = json.loads(path.read_text())
    content["model"]["vocab"], content["added_tokens"] = {"<s>": 1}, []
    path.write_text(json.dumps(content))
    status, _, err = run("generate", "--model", tmp_path / "model", "--prompt", "granite", "--max-new-tokens", 1)
    assert status == 0, err
    assert "has two tokenizers; tokenizer.model is taken, for it has all tokens of the other" in err


def test_tensorboard_without_its_extra(pretraining, run, without):
    without("tensorboard")
    assert_one_sentence(run(*pretraining), "tensorboard")


def test_wandb_without_its_extra(pretraining, run, without):
    without("wandb")
    assert_one_sentence(run(*pretraining, "run.tensorboard=false", "run.wandb=true"), "wandb")


def test_a_login_that_fails_ends_all_ranks(monkeypatch):
    """What its login says reaches a rank that does not log in, before it waits for anything else."""
    told = []

    class Rank(World):
        def all_gather(self, value):
            told.append(value)
            return [told[0], None]

    def login(**_how):
        raise KeyError("no key;")

    wandb = SimpleNamespace(login=login, errors=SimpleNamespace(Error=KeyError))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr("k2mini.training.boards.find_spec", lambda _name: True)
    monkeypatch.setenv("WANDB_SILENT", "true")
    for rank in (0, 1):
        with pytest.raises(ValueError, match="'no key;' WANDB_MODE=offline needs no account"):
            check_boards(RunSection("x", wandb=True), Rank(rank, 2))
    assert told[1] is None


def test_what_wandb_loses_is_said_once(tmp_path, monkeypatch, caplog):
    def fails(*_values, **_named):
        raise BrokenPipeError("its service has ended")

    wandb = SimpleNamespace(Settings=dict, init=lambda **_: SimpleNamespace(log=fails, finish=fails))
    wandb.errors = SimpleNamespace(UsageError=KeyError, CommError=OSError)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    (board,) = open_boards(RunSection(str(tmp_path), wandb=True), 0)
    with caplog.at_level("WARNING"):
        for step in (3, 4):
            board.write(step, {"loss": 1.0})
        board.close()
    (said,) = caplog.messages
    assert said == "wandb gets nothing from step 3 on (its service has ended); metrics.jsonl has it"


def test_a_run_begun_anew_is_another_one_for_wandb(tmp_path, monkeypatch):
    wandb, begun = SimpleNamespace(Settings=dict, init=lambda **how: begun.append(how["id"])), []
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for step in (0, 4, 0):
        open_boards(RunSection(str(tmp_path), wandb=True), step)
    assert begun[0] == begun[1] != begun[2]


def followed(pretraining, tmp_path, *overrides, **environment):
    """A run with `run.wandb` in a process of its own, whose service begins without our settings or accounts."""
    pytest.importorskip("wandb")
    left = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    command = [sys.executable, "-m", "k2mini", *map(str, pretraining), "run.tensorboard=false", "run.wandb=true"]
    return subprocess.run(
        [*command, *overrides],
        capture_output=True,
        text=True,
        timeout=240,
        env={**left, "HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT), **environment},
    )


def wandb_records(path):
    """The records of a .wandb file, as its service reads them: a log in LevelDB's format, of protocol buffers."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = path.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while at < len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole = (whole if kind in (3, 4) else b"") + data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record


def history(path):
    """What was logged: {step: {name: value}}."""
    found = {}
    for record in wandb_records(path):
        if record.WhichOneof("record_type") == "history":
            values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            found[record.history.step.num] = {k: v for k, v in values.items() if not k.startswith("_")}
    return found


def test_wandb_gets_what_metrics_jsonl_has(pretraining, tmp_path):
    """Offline, it writes a run, quietly, which goes on under its id after a kill, and which wandb itself can show."""
    settings = ("train.max_steps=4", "checkpoint.every=2", f"data.val_path={tmp_path}/corpus.txt", "train.val_every=2")
    folder = tmp_path / "run"
    for number in (1, 2):
        done = followed(pretraining, tmp_path, *settings, WANDB_MODE="offline")
        assert (done.returncode, done.stdout) == (0, f"{folder}/model\n"), done.stderr
        assert not re.search("^wandb", done.stderr, re.MULTILINE)
        expected = {}
        for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
            expected.setdefault(row.pop("step"), {}).update(row)
        files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
        assert len(files) == number
        assert history(files[-1]) == {step: row for step, row in expected.items() if number == 1 or step > 2}
        shutil.rmtree(folder / "model")
        shutil.rmtree(folder / "checkpoints/step_0000004")
    (name,) = {path.name for path in files}
    assert name == f"run-{(folder / 'wandb/id').read_text()}.wandb"
    (begun,) = [record.run for record in wandb_records(files[0]) if record.WhichOneof("record_type") == "run"]
    assert (begun.display_name, begun.project) == ("run", "k2mini")
    config = {item.key: json.loads(item.value_json) for item in begun.config.update}
    assert config["train"] == json.loads((folder / "config.yaml").read_text())["train"]
    seen = shown(["wandb", "leet", "run", str(files[0].parent)], f"ID: {begun.run_id}", "val_loss", "Finished")
    assert "Project: k2mini" in seen


def shown(command, *awaited):
    """What a program has drawn on a terminal, once it has drawn what is awaited; at most for a minute."""
    number, end = pty.fork()
    if number == 0:
        os.environ.update(TERM="xterm-256color", COLUMNS="160", LINES="50")
        os.execvp(command[0], command)
    drawn, text, until = b"", "", time.monotonic() + 60
    replies = {b"\x1b[6n": b"\x1b[1;1R", b"\x1b]11;?": b"\x1b]11;rgb:0000/0000/0000\x07", b"\x1b[c": b"\x1b[?62;c"}
    try:
        while not all(word in text for word in awaited) and time.monotonic() < until:
            if select.select([end], [], [], 0.2)[0]:
                part = os.read(end, 65536)
                drawn += part
                for question, reply in replies.items():
                    if question in part:
                        os.write(end, reply)
            text = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]|\x1b\][^\x07]*\x07", b" ", drawn).decode(errors="replace")
            text = re.sub(" +", " ", text)
    finally:
        os.kill(number, 9)
        os.waitpid(number, 0)
        os.close(end)
    assert all(word in text for word in awaited), text
    return text


def test_wandb_without_an_account(pretraining, tmp_path):
    """Said before documents are prepared."""
    done = followed(pretraining, tmp_path, f"data.path={tmp_path}/corpus.txt")
    assert (done.returncode, done.stdout) == (2, "")
    (said,) = [line for line in done.stderr.splitlines() if "run.wandb" in line]
    assert said.startswith("k2mini: run.wandb: No API key configured.")
    assert said.endswith("WANDB_MODE=offline needs no account")
    assert "Traceback" not in done.stderr
    assert "corpus.txt" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_wandb_without_a_network(pretraining, tmp_path):
    """The run is trained and written offline, which is said."""
    key, nowhere = "a" * 40, "http://127.0.0.1:9"
    done = followed(pretraining, tmp_path, WANDB_API_KEY=key, WANDB_BASE_URL=nowhere, WANDB_INIT_TIMEOUT="1")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/run/model\n"), done.stderr
    (said,) = [line for line in done.stderr.splitlines() if re.match("wandb|k2mini: wandb", line)]
    assert said.startswith("k2mini: wandb can't be reached (")
    assert f"`wandb sync` sends later what {tmp_path}/run/wandb gets" in said
    (path,) = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    assert sorted(history(path)) == [1, 2]


def test_a_models_own_template_without_its_extra(tiny_directory, tmp_path, run, without):
    """No other template is taken in its place, unless one is named."""
    without("chat")
    shutil.copytree(tiny_directory, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    chat = [{"role": "user", "content": "granite is"}, {"role": "assistant", "content": "rock"}]
    (tmp_path / "data.json").write_text(json.dumps([{"messages": chat}]))
    settings = one_step(tmp_path, tmp_path / "model", path=str(tmp_path / "data.json"), max_seq_len=64)
    assert_one_sentence(run("preview", settings), "chat")
    assert_one_sentence(run("finetune", settings), "chat")
    assert not (tmp_path / "run").exists()
    assert run("preview", settings, "data.template=llama2")[0] == 0


def test_the_demo_without_the_picture(tmp_path, monkeypatch, caplog, without):
    """The report is whole, and one line says what is missing and how to get it."""
    from k2mini.demo import report

    without("plot")
    for name in report.TRAINED:
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    monkeypatch.setattr(report, "stage_table", lambda _stages: "")
    with caplog.at_level("INFO", logger="k2mini"):
        report.write_report(tmp_path, 1.0, [], [])
    (line,) = caplog.messages
    assert line == f"no loss.png, the stages' loss curves: {need_extra('plot')}"
    assert (tmp_path / "report.json").exists()
    assert not (tmp_path / "loss.png").exists()


@pytest.mark.parametrize("command", ["generate", "chat", "eval", "serve"])
def test_asking_in_a_models_own_template_without_its_extra(chat_directory, tmp_path, run, without, command):
    """It is not passed over in silence; another template does without."""
    (tmp_path / "rocks.jsonl").write_text('{"question": "What?", "choices": ["rock", "fruit"], "answer": "A"}\n')
    more = {"generate": ["--prompt", "granite"], "eval": ["--benchmark", tmp_path / "rocks.jsonl"]}.get(command, [])
    without("chat")
    assert_one_sentence(run(command, "--model", chat_directory, *more), "chat")
    if more:
        assert run(command, "--model", chat_directory, *more, "--template", "alpaca")[0] == 0


def drawn(monkeypatch):
    """The figures that are saved, to look into."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (figures.append(self), save(self, *args, **kwargs))
    )
    return figures


@pytest.mark.parametrize(("chain", "second"), [([], [1, 2, 3]), (["--chain"], [4, 5, 6])])
def test_plot_draws_runs_over_one_another_or_in_a_chain(training, run, monkeypatch, chain, second):
    pytest.importorskip("matplotlib")
    figures = drawn(monkeypatch)
    picture = training / "loss.png"
    status, out, err = run("plot", training / "one", training / "two", "--out", picture, *chain)
    assert (status, out) == (0, f"{picture}\n"), err
    assert picture.read_bytes().startswith(PNG)
    (axes,) = figures[0].axes
    steps = [list(line.get_xdata()) for line in axes.get_lines()]
    assert steps == [[1, 2, 3], [3], second, second[-1:]]
    assert list(axes.get_lines()[2].get_ydata()) == [3.0, 1.5, 1.0]
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["one", "two"]
    assert legend.get_title().get_text() == "solid: training\ndashed, dots: held out"
    train, held_out = axes.get_lines()[:2]
    assert (train.get_linestyle(), held_out.get_linestyle()) == ("-", "--")
    assert train.get_color() == held_out.get_color() != axes.get_lines()[2].get_color()


@pytest.mark.parametrize("steps", [1, 2, 5, 30, 1000])
@pytest.mark.parametrize("number", [1, 8])
def test_steps_are_whole_and_the_legend_stands_off_the_curves(training, run, monkeypatch, steps, number):
    pytest.importorskip("matplotlib")
    figures = drawn(monkeypatch)
    runs = [training / f"run{place}" for place in range(number)]
    for folder in runs:
        folder.mkdir()
        lines = [json.dumps({"step": step, "loss": 2 + 1 / step}) + "\n" for step in range(1, steps + 1)]
        (folder / "metrics.jsonl").write_text("".join(lines))
    assert run("plot", *runs, "--out", training / "loss.png")[0] == 0
    (axes,), (legend,) = figures[0].axes, figures[0].legends
    low, high = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert ticks
    assert all(tick == int(tick) for tick in ticks)
    assert [text.get_text() for text in legend.get_texts()] == [folder.name for folder in runs]
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())
    assert len({line.get_color() for line in axes.get_lines()}) == number


def test_plot_of_a_folder_without_losses(training, run):
    pytest.importorskip("matplotlib")
    (training / "two" / "metrics.jsonl").write_text("")
    for name in ("two", "none"):
        status, out, err = run("plot", training / name, "--out", training / "loss.png")
        assert (status, out) == (2, "")
        assert f"{training / name} has no losses to draw" in err


def test_compare_draws_a_chart(evaluated, run, monkeypatch):
    """Runs by what differs in their names, off the bars; the accuracy in each bar; chance as a dashed line."""
    pytest.importorskip("matplotlib")
    figures = drawn(monkeypatch)
    chart = evaluated / "chart.png"
    status, out, err = run("compare", evaluated / "one", evaluated / "two", "--chart", chart)
    assert status == 0, err
    assert "rocks (1 questions)" in out
    assert chart.read_bytes().startswith(PNG)
    (axes,), (legend,) = figures[0].axes, figures[0].legends
    assert sorted(text.get_text() for text in legend.get_texts()) == ["chance", "one", "two"]
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())
    assert [text.get_text() for text in axes.texts] == ["100", "100"]
    (levels,) = [lines for lines in axes.collections if lines.get_label() == "chance"]
    assert [path.vertices[:, 1].tolist() for path in levels.get_paths()] == [[25.0, 25.0]]


def test_tensorboard_gets_what_metrics_jsonl_has(pretraining, tmp_path, run):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run(*pretraining)[0] == 0
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    lines = [json.loads(line) for line in Path(tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    events = board.Scalars("loss")
    assert [event.step for event in events] == [line["step"] for line in lines] == [1, 2]
    assert [event.value for event in events] == pytest.approx([line["loss"] for line in lines])
    assert set(board.Tags()["scalars"]) == set(lines[0]) - {"step"}


@pytest.mark.parametrize(
    ("arguments", "missing", "by_hand"),
    [
        (["info", "daven3/k2-v1"], "there is no directory daven3/k2-v1", "daven3/k2-v1 --local-dir k2-v1"),
        (["info", "daven3/k2-v1@main"], "there is no directory", "daven3/k2-v1 --revision main --local-dir k2-v1"),
        (["prepare", "hf://datasets/o/d/x.txt", "--tokenizer", "t", "--out", "o"], "there is no file hf://datasets/o/d",
         "o/d x.txt --repo-type dataset --local-dir d"),
    ],
)  # fmt: skip
def test_the_hub_by_hand(without, run, monkeypatch, tmp_path, arguments, missing, by_hand):
    """The command that downloads, beside the extra that would."""
    without("hub")
    monkeypatch.chdir(tmp_path)
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"k2mini: {missing}")
    assert f"download it first (pip install huggingface_hub): hf download {by_hand}; or {need_extra('hub')}" in err
    assert len(err.splitlines()) == 1


def test_other_models_without_their_extra(tiny_directory, tmp_path, run, without):
    without("reference")
    (tmp_path / "rocks.jsonl").write_text('{"question": "a rock?", "choices": ["granite", "a fruit"], "answer": "A"}\n')
    command = ("eval", "--model", tiny_directory, "--benchmark", tmp_path / "rocks.jsonl", "--backend", "transformers")
    status, _, err = run(*command)
    assert status == 2
    assert str(need_extra("reference")) in err
