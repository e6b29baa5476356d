"""`k2mini audit` as a user runs it, and its pages in a browser."""

import json
import re
import shutil
import subprocess

import pytest

from k2mini.config import LoraSection
from k2mini.nn.lora import adapter_tensors, attach, init_adapters
from k2mini.weights.adapter import save_adapter
from k2mini.weights.model_files import save_model
from tests.conftest import tiny_config, tiny_llama
from tests.helpers import fill_adapters

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def other(tmp_path_factory, tiny_tokenizer):
    """Another model of the same shape, and an adapter for it."""
    folder = tmp_path_factory.mktemp("other")
    config = tiny_config(vocab_size=tiny_tokenizer.vocab_size, max_seq_len=1024)
    model = tiny_llama(config, seed=3)
    save_model(model.state_dict(), config, folder / "model", tokenizer=tiny_tokenizer)
    section = LoraSection(rank=2, target_modules=["q_proj"])
    attach(model, section)
    init_adapters(model, 0)
    fill_adapters(model)
    save_adapter(adapter_tensors(model), section, folder / "adapter", str(folder / "model"))
    return folder


KINDS = {
    "lens": ["--target", " rock"],
    "attention": ["--layer", "1"],
    "attribute": ["--target", " rock", "--foil", " mantle"],
    "patch": ["--target", " rock", "--corrupted", "basalt is a", "--foil", " crust"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_two_models_side_by_side(tiny_directory, other, tmp_path, run, kind):
    page = tmp_path / "page.html"
    common = ["audit", kind, "--model", tiny_directory, other / "model", "--prompt", "granite is a", *KINDS[kind]]
    status, out, err = run(*common, "--html", page)
    assert status == 0, err
    assert str(other / "model") in out
    text = page.read_text()
    assert text.count("<svg") >= 2
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", text), "nothing is fetched"
    assert not re.findall(r"https?://|@import|url\(|<script", text)
    found = json.loads(run(*common, "--json")[1])
    assert [entry["model"] for entry in found] == [str(tiny_directory), str(other / "model")]


def test_diff_of_models_and_adapters(tiny_directory, other, tmp_path, run):
    page = tmp_path / "page.html"
    status, out, err = run("audit", "diff", tiny_directory, other / "model", "--subspace", "--html", page)
    assert status == 0, err
    assert "effective rank" in out
    assert "embeddings that moved most" in out
    assert page.read_text().count("<svg") == 1
    found = json.loads(run("audit", "diff", other / "model", other / "adapter", "--json")[1])
    assert {change["rank"] for change in found[0]["changes"]} == {2}


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """Two questions of a user's own."""
    file = tmp_path_factory.mktemp("benchmark") / "rocks.jsonl"
    entries = [
        {"question": f"What is {rock}?", "choices": ["igneous", "sedimentary"], "answer": key}
        for rock, key in (("granite", "A"), ("shale", "B"))
    ]
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return file


def test_a_question_of_a_benchmark(tiny_directory, benchmark, run):
    """The prompt is what eval asks, the target the key; a patch may change a word of it."""
    start = ["--model", tiny_directory, "--question", benchmark, "rocks"]
    status, out, err = run("audit", "lens", *start, "1", "--json")
    assert status == 0, err
    (found,) = json.loads(out)
    assert found["target"] == "B"
    text = "".join(found["tokens"]).replace("␣", " ").replace("⏎", "\n")
    assert "What is shale?" in text
    assert "B. sedimentary" in text
    assert text.endswith("### Response:\n")
    replaced = ["--replace", "granite", "basalt", "--foil", "B"]
    status, out, err = run("audit", "patch", *start, "0", *replaced, "--json")
    assert status == 0, err
    (found,) = json.loads(out)
    assert "granite" in "".join(found["tokens"])
    assert found["clean"] != found["corrupted"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["lens", "rocks", "2"], "has no question rocks 2; it has rocks 0 to 1"),
        (["patch", "rocks", "0", "--replace", "basalt", "shale"], "--replace 'basalt': the prompt has it 0 times"),
    ],
)
def test_bad_questions(tiny_directory, benchmark, run, arguments, said):
    kind, task, number, *rest = arguments
    status, out, err = run("audit", kind, "--model", tiny_directory, "--question", benchmark, task, number, *rest)
    assert (status, out) == (2, "")
    assert said in err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["attribute"], "--target TEXT is missing"),
        (["lens", "--template", "k2"], "--template is for --question"),
        (["attention", "--layer", "9"], "--layer 9: the model has layers 0 to 2"),
        (["attention", "--head", "7"], "--head 7: the model has heads 0 to 3"),
        (["lens", "--target", ""], "the target is empty"),
        (["patch", "--target", " rock", "--corrupted", "granite"], "the two prompts must be of one length"),
        (
            ["patch", "--target", " rock", "--corrupted", "basalt is a", "--point", "residual"],
            "there is no point 'layers.*.residual'; the nearest are",
        ),
    ],
)
def test_bad_input(tiny_directory, run, arguments, said):
    kind, *rest = arguments
    status, out, err = run("audit", kind, "--model", tiny_directory, "--prompt", "granite is a", *rest)
    assert (status, out) == (2, "")
    assert said in err.strip().splitlines()[-1]


def test_models_of_different_shapes(tiny_directory, tmp_path, run):
    model = tiny_llama(tiny_config(dim=32))
    save_model(model.state_dict(), model.config, tmp_path / "small")
    status, _, err = run("audit", "diff", tiny_directory, tmp_path / "small")
    assert (status, "are models of different shapes" in err) == (2, True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_is_not_finite(broken, run, kind):
    status, out, err = run("audit", kind, "--model", broken / "layer", "--prompt", "granite is a", *KINDS[kind])
    assert (status, out) == (2, "")
    said = "the logits are not finite; model.layers.2.mlp.up_proj.weight holds NaN or infinity"
    assert said in err.splitlines()[-1]


def test_weights_that_are_not_finite_have_no_difference(tiny_directory, broken, run):
    for pair in ((tiny_directory, broken / "layer"), (broken / "layer", tiny_directory)):
        status, out, err = run("audit", "diff", *pair)
        assert (status, out) == (2, "")
        assert f"{broken / 'layer'}: model.layers.2.mlp.up_proj.weight holds NaN" in err.splitlines()[-1]


def test_a_page_is_written_over_nothing(tiny_directory, other, benchmark, tmp_path, run, monkeypatch):
    page = tmp_path / "page.html"
    page.write_text("mine")
    asked = ["audit", "lens", "--model", tiny_directory, "--question", benchmark, "rocks", "0"]
    with monkeypatch.context() as patch:
        patch.setattr("k2mini.build.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
        for place, said in (
            (page, "page.html exists already"),
            (tiny_directory / "page.html", "which is an input"),
            (benchmark, "a page's name ends in .html"),
            (tmp_path / "none" / "page.html", "there is no folder"),
        ):
            status, out, err = run(*asked, "--html", place)
            assert (status, out, said in err) == (2, "", True)
    assert (
        "which is an input"
        in run("audit", "diff", tiny_directory, other / "model", "--html", other / "model/x.html")[2]
    )
    assert page.read_text() == "mine"
    assert run(*asked, "--html", page, "--force")[0] == 0
    assert page.read_text().startswith("<!doctype html>")


def test_findings_are_printed_though_the_page_can_not_be_written(tiny_directory, tmp_path, run, monkeypatch):
    def full(path, text):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("k2mini.files.write_text", full)
    command = ["audit", "lens", "--model", tiny_directory, "--prompt", "granite is a"]
    status, out, _ = run(*command, "--html", tmp_path / "page.html")
    assert (status, "entropy" in out) == (2, True)


def test_all_that_is_compared_is_checked_first(tiny_directory, other, run, monkeypatch):
    """An adapter of another base is named before the first comparison, which takes minutes."""
    monkeypatch.setattr("k2mini.audit.weight_diff.diff_checkpoints", lambda *_, **__: pytest.fail("compared"))
    status, _, err = run("audit", "diff", tiny_directory, other / "model", other / "adapter")
    assert (status, "was trained on another base" in err) == (2, True)


@pytest.mark.parametrize("option", ["--target", "--prompt", "--foil", "--corrupted", "--replace"])
def test_options_that_are_not_utf8(tiny_directory, run, option):
    asked = ["--prompt", "granite is a"] if option != "--prompt" else []
    values = ["a\udcff"] if option != "--replace" else ["granite", "a\udcff"]
    status, out, err = run("audit", "patch", "--model", tiny_directory, *asked, option, *values)
    assert (status, out) == (2, "")
    assert f"argument {option}: 'a\\udcff' is not UTF-8" in err


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser(tiny_directory, tmp_path, run, scheme):
    """No error on the console, where a request off the page would be one, and a picture, in light and dark."""
    page, picture = tmp_path / "page.html", tmp_path / "page.png"
    run("audit", "lens", "--model", tiny_directory, "--prompt", "granite is a", "--target", " rock", "--html", page)
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
            *("--no-first-run", f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr"),
            *(["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []),
            *("--window-size=1200,1600", f"--screenshot={picture}", page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    assert "Content-Security-Policy" in page.read_text()
    assert picture.stat().st_size > 10_000
