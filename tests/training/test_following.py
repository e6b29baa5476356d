"""Following a run: what `eval.prompts` answers while it trains, and `k2mini report`, as text, numbers and a page."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from k2mini.cli import main
from k2mini.training.loop import read_metrics, summary
from tests.training.test_run import TRAIN, base, settings, tuning  # noqa: F401 (fixtures)

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROMPTS = ["granite", "What is <basalt> & why?"]
NASTY = "</script><img src=x onerror=alert(1)> & \"'"


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def unchanged(folder):
    """A run's metrics without what no two runs have in common."""
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows(folder / "metrics.jsonl")]


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_prompts_are_answered_at_each_validation(request, command, tmp_path, run):
    """The last answers are those of `k2mini generate`; the run itself is, bit for bit, the one without prompts."""
    file = request.getfixturevalue("settings" if command == "pretrain" else "tuning")
    common = ["train.val_every=2", "eval.max_new_tokens=9", "train.lr=1e-2"]
    common += ["data.template=vicuna"] if command == "finetune" else ["eval.template=vicuna"]
    asked = [f"eval.prompts={json.dumps(PROMPTS)}"]
    status, out, err = run(command, file, *common, *asked, f"run.dir={tmp_path}/asked")
    assert status == 0, err
    samples = rows(tmp_path / "asked/samples.jsonl")
    assert [(row["step"], row["prompt"]) for row in samples] == [(step, text) for step in (2, 4) for text in PROMPTS]
    assert run(command, file, *common, f"run.dir={tmp_path}/plain")[0] == 0
    assert unchanged(tmp_path / "asked") == unchanged(tmp_path / "plain")
    assert not (tmp_path / "plain/samples.jsonl").exists()
    name = "model" if command == "pretrain" else "adapter"
    weights = {
        folder: next((tmp_path / folder / name).glob("*.safetensors")).read_bytes() for folder in ("asked", "plain")
    }
    assert weights["asked"] == weights["plain"]
    model = ["--model", out.strip()] if name == "model" else ["--model", tmp_path / "base", "--adapter", out.strip()]
    for row in samples[-2:]:
        how = ["--template", "vicuna", "--max-new-tokens", "9"]
        status, said, err = run("generate", *model, *how, "--prompt", row["prompt"])
        assert status == 0, err
        assert said == row["answer"] + "\n"


def test_documents_are_followed_without_a_template(settings, tmp_path, run):  # noqa: F811
    status, out, err = run("pretrain", settings, f"eval.prompts={json.dumps(PROMPTS)}", "eval.max_new_tokens=9")
    assert status == 0, err
    row = rows(Path(out.strip()).parent / "samples.jsonl")[-1]
    how = ["--template", "none", "--max-new-tokens", "9", "--prompt", row["prompt"]]
    assert run("generate", "--model", out.strip(), *how)[1] == row["answer"] + "\n"


def test_answers_after_a_kill(settings, tmp_path, run):  # noqa: F811
    """What stands after the checkpoint that a run goes on from is answered again, and stands once."""
    asked = [f"eval.prompts={json.dumps(PROMPTS)}", "eval.max_new_tokens=4", "train.val_every=1"]
    assert run("pretrain", settings, *asked)[0] == 0
    folder = tmp_path / "run"
    whole = (folder / "samples.jsonl").read_text()
    assert len(whole.splitlines()) == 8
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "checkpoints/step_0000004")
    (folder / "samples.jsonl").write_text(whole[:-20])  # cut short in its last line
    assert run("pretrain", settings, *asked)[0] == 0
    assert (folder / "samples.jsonl").read_text() == whole


def test_prompts_that_cannot_be_asked(settings, tmp_path, run):  # noqa: F811
    for value, said in [
        ('[""]', "eval.prompts: the prompt is empty"),
        (json.dumps(["granite " * 4000]), "leaves no room for an answer in the model's context of"),
        ("granite", "eval.prompts must be a list of words"),
    ]:
        status, out, err = run("pretrain", settings, f"eval.prompts={value}")
        assert (status, out) == (2, "")
        assert said in err.splitlines()[-1]
        assert not (tmp_path / "run/metrics.jsonl").exists()
    assert "eval.max_new_tokens must be positive" in run("pretrain", settings, "eval.max_new_tokens=0")[2]


def test_what_was_cut_is_noted(tuning, tmp_path, run):  # noqa: F811
    """The counts of data.json are those of the log."""
    status, _, err = run("finetune", tuning, "data.max_seq_len=20", "data.template=alpaca_short")
    assert status == 0, err
    (counts,) = json.loads((tmp_path / "tuned/data.json").read_text()).values()
    said = re.search(r"max_seq_len 20, (\d+) examples lose .*? and (\d+) their .*?; (\d+) are used", err)
    assert [counts[key] for key in ("cut", "left out", "examples used")] == [int(n) for n in said.groups()]
    assert (counts["records"], counts["skipped"]) == (20, 0)
    assert counts["cut"] + counts["left out"] > 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs, as training leaves them: one of a few steps, one of a thousand with answers and a benchmark."""
    folder = tmp_path_factory.mktemp("runs")
    config = {"run": {"dir": "x"}, "train": {"lr": 0.5, "schedule": NASTY}, "eval": {"prompts": []}, "lora": None}
    for name, steps in (("short", 4), (f"long {NASTY[-9:]}", 1000)):
        here = folder / name
        here.mkdir()
        with (here / "metrics.jsonl").open("w") as file:
            for step in range(1, steps + 1):
                row = {"step": step, "loss": 2 + 9 / step, "grad_norm": 1.0, "lr": 1e-3 / step}
                file.write(json.dumps({**row, "tokens": 64 * step, "tokens_per_second": 1e3 + step}) + "\n")
                if step % (steps // 4) == 0:
                    file.write(json.dumps({"step": step, "val_loss": 2.5 + 1 / step}) + "\n")
                    file.write(json.dumps({"step": step, "accuracy/rocks": 0.25 + step / 4000}) + "\n")
        (here / "config.yaml").write_text(json.dumps(config | {"train": {"lr": 1 / steps, "schedule": NASTY}}))
    samples = [{"step": step, "prompt": prompt, "answer": f"{NASTY} {step > 500}"} for step in range(100, 1001, 100)
               for prompt in (f"Why {NASTY}?", "And?")]  # fmt: skip
    (here / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    (here / "data.json").write_text(json.dumps({f"{NASTY}.json": {"records": 1200, "cut": 34, "left out": 5}}))
    return folder / "short", here


def test_report_prints_the_summaries(runs, run):
    status, out, _ = run("report", *runs)
    assert status == 0
    assert out == "\n\n".join(f"{folder.name}\n{summary(folder / 'metrics.jsonl')}" for folder in runs) + "\n"
    status, out, _ = run("report", *runs, "--json")
    for folder, found in zip(runs, json.loads(out), strict=True):
        assert found["metrics"] == read_metrics(folder / "metrics.jsonl")
        assert found["summary"] == summary(folder / "metrics.jsonl")
    assert found["config"]["train.lr"] == 0.001
    assert found["samples"] == rows(runs[1] / "samples.jsonl")


def made(folders, out):
    with pytest.raises(SystemExit) as end:
        main(["report", *map(str, folders), "--html", str(out)])
    assert end.value.code == 0
    return out.read_text(encoding="utf-8")


def test_the_page_says_what_differs_and_what_is_answered(runs, tmp_path):
    text = made(runs, tmp_path / "page.html")
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    assert [html.unescape(re.sub("<.*?>", "", title)) for title in titles] == [
        *(folder.name for folder in runs), "What differs", "Loss", "loss from step 500 on", "accuracy of rocks, %",
        "norm of the gradient", "learning rate", "tokens a second", "Answers", "Data",
    ]  # fmt: skip
    differs, same = re.search(r"What differs(.*?)<details>(.*?)</section>", text, re.DOTALL).groups()
    assert re.findall(r"<tr><td>(.*?)</td>", differs) == ["train.lr"]
    assert re.findall(r"<td>(.*?)</td>", differs)[1:] == ["0.25", "0.001"]
    assert "train.schedule" in same
    assert "run.dir" not in text
    assert html.escape(NASTY) in text
    assert "<img" not in text
    for prompt in text.split("<details open>")[1:]:
        steps = [
            int(step.replace(",", "")) for step in re.findall(r"<tr><td>([\d,]+)</td>", prompt.split("</table>")[0])
        ]
        assert (steps[0], steps[-1], len(steps)) == (100, 1000, 6)
        assert prompt.split("</table>")[0].count("<td class=same>") == 4  # the answer changes once
    assert re.findall(r"<td>([\d,]+)</td>", text.split("<h2>Data</h2>")[1]) == ["1,200", "34", "5"]


def test_the_curves_are_those_of_the_metrics(runs, tmp_path):
    """Every point of a short run stands where its step and value say; a long one's are averages of neighbours."""
    section = made(runs[:1], tmp_path / "page.html").split("<h2>Loss</h2>")[1].split("</section>")[0]
    labels = re.findall(r'class="y" style="top:([\d.]+)%">([\d.]+)<', section)
    (top, high), (bottom, low) = [(float(place), float(value)) for place, value in (labels[0], labels[-1])]
    train, held_out = re.findall(r'class="c0 \w+" d="M(.*?)"/>', section)
    for line, values in ((train, [11, 6.5, 5, 4.25]), (held_out, [3.5, 3, 2.5 + 1 / 3, 2.75])):
        points = [tuple(map(float, point.split())) for point in line.split("L")]
        assert [x for x, _ in points] == pytest.approx([0, 1000 / 3, 2000 / 3, 1000], abs=0.1)
        read = [high + (y / 10 - top) * (low - high) / (bottom - top) for _, y in points]
        assert read == pytest.approx(values, abs=0.03)
    section = made(runs[1:], tmp_path / "other.html").split("<h2>Loss</h2>")[1].split("</section>")[0]
    assert 150 < section.split('class="c0 faint" d="M')[1].split('"')[0].count("L") < 240


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 500])
def test_the_page_in_a_browser(runs, tmp_path, scheme, width):
    """No error on the console, where a request off the page would be one, and a picture, in light and dark."""
    page, picture = tmp_path / "page.html", tmp_path / "page.png"
    text = made(runs, page)
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
            *("--no-first-run", f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr"),
            *(["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []),
            *(f"--window-size={width},1600", f"--screenshot={picture}", page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    assert "Content-Security-Policy" in text
    assert not re.findall(r"https?://|@import|url\(|<script", text)
    assert picture.stat().st_size > 10_000


def test_report_of_what_is_no_run(runs, tmp_path, run):
    (tmp_path / "new").mkdir()
    (tmp_path / "new/metrics.jsonl").write_text("")
    bad = shutil.copytree(runs[1], tmp_path / "bad")
    (bad / "samples.jsonl").write_text('{"step": 1, "prompt": "x", "answer": 3}\n')
    for folder, said in [
        (tmp_path / "none", "has no metrics.jsonl; name the run.dir of a run that has begun"),
        (tmp_path / "new", "has no metrics yet: the first step is not done"),
        (bad, "line 1: answer must be text, not 3"),
    ]:
        status, out, err = run("report", runs[0], folder, "--html", tmp_path / "page.html")
        assert (status, out) == (2, "")
        assert len(err.splitlines()) == 1
        assert said in err
        assert not (tmp_path / "page.html").exists()
    assert "a page's name ends in .html" in run("report", runs[0], "--html", tmp_path / "page.png")[2]
    (tmp_path / "page.html").write_text("mine")
    status, _, err = run("report", runs[0], "--html", tmp_path / "page.html")
    assert status == 2
    assert "exists already" in err
    assert (tmp_path / "page.html").read_text() == "mine"
