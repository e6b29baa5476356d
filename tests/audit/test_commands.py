"""`k2mini audit` as a user runs it, and its pages in a browser."""

import colorsys
import html
import json
import math
import re
import shutil
import subprocess

import pytest

from k2mini.audit.page import STYLE
from k2mini.audit.reports import visible
from k2mini.cli import main
from k2mini.config import LoraSection
from k2mini.data.tokenizer import Tokenizer
from k2mini.nn.lora import adapter_tensors, attach, init_adapters
from k2mini.weights.adapter import save_adapter
from k2mini.weights.model_files import save_model
from tests.conftest import ROOT, tiny_config, tiny_llama
from tests.helpers import fill_adapters
from tests.json_tokenizer import write_json_tokenizer

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


def sections_of(page):
    """A page's sections: title -> for each model its name, the cells' (alpha, warm, text) by row, and their heads."""
    found = {}
    for part in page.read_text().split("<section>")[1:]:
        title = html.unescape(re.search(r"<h2>(.*?)</h2>", part)[1])
        found[title] = [
            {
                "model": html.unescape(re.search(r"<figcaption>(.*?)</figcaption>", figure)[1]).split(": ")[0],
                "rows": [
                    [
                        (float(alpha or 0), not cool, html.unescape(text))
                        for alpha, cool, text in re.findall(
                            r'<td(?: style="--a:([\d.]+)")?( class="n")?(?: title="[^"]*")?>([^<]*)', row
                        )
                    ]
                    for row in figure.split("<tr>")[2:]
                ],
                "heads": [html.unescape(text) for text in re.findall(r"<tr><th[^>]*>([^<]*)", figure)],
                "spans": re.findall(r'<span(?: style="--a:([\d.]+)")?', figure),
                "scale": re.search(r'class="scale">(.*?)</div>', part),
            }
            for figure in part.split("<figure>")[1:]
        ]
    return found


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
    sections = sections_of(page)
    for title, figures in sections.items():
        assert [figure["model"] for figure in figures] == [str(tiny_directory), str(other / "model")], title
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
    assert list(sections_of(page)) == ["Where it changed", "The largest changes", "Embeddings that moved most"]
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


def test_the_key_stands_where_the_template_writes_the_answer(benchmark, run):
    base, question = ROOT / "k2mini" / "demo" / "base", ["--question", benchmark, "rocks", "1"]
    status, out, err = run("audit", "lens", "--model", base, *question, "--template", "vicuna", "--json")
    assert (status, json.loads(out)[0]["target"]) == (0, "␣B"), err


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


def test_a_question_in_a_models_own_template(chat_directory, benchmark, run):
    """Special tokens are themselves, and BOS is not put before them."""
    start = ["--model", chat_directory, "--question", benchmark, "rocks"]
    status, out, err = run("audit", "lens", *start, "1", "--json")
    assert status == 0, err
    (found,) = json.loads(out)
    assert found["tokens"][0] == "<|im_start|>"
    assert found["tokens"].count("<|im_end|>") == 1
    assert "".join(found["tokens"]).replace("⏎", "\n").endswith("<|im_end|>\n<|im_start|>assistant\n")
    replaced = ["--replace", "granite", "granitf", "--target", "A", "--foil", "B"]
    status, out, err = run("audit", "patch", *start, "0", *replaced, "--json")
    assert status == 0 or "must be of one length" in err, err
    status, out, _ = run("audit", "lens", *start, "1", "--template", "alpaca", "--json")
    assert (status, "<|im_start|>" in out) == (0, False)


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
    """An adapter of none of the models is named before the first comparison, which takes minutes."""
    monkeypatch.setattr("k2mini.audit.weight_diff.diff_checkpoints", lambda *_, **__: pytest.fail("compared"))
    status, _, err = run("audit", "diff", tiny_directory, tiny_directory, other / "adapter")
    assert (status, "was trained on another base" in err) == (2, True)


def test_an_adapter_is_compared_with_its_own_base(tiny_directory, other, run):
    """Further pretraining and the adapter over it, in one call."""
    command = ["audit", "diff", "--json"]
    both = json.loads(run(*command, tiny_directory, other / "model", other / "adapter")[1])
    assert both[0] == json.loads(run(*command, tiny_directory, other / "model")[1])[0]
    assert both[1] == json.loads(run(*command, other / "model", other / "adapter")[1])[0]
    assert both[1]["model"] == f"{other / 'model'} → {other / 'adapter'}"


@pytest.mark.parametrize("option", ["--target", "--prompt", "--foil", "--corrupted", "--replace"])
def test_options_that_are_not_utf8(tiny_directory, run, option):
    asked = ["--prompt", "granite is a"] if option != "--prompt" else []
    values = ["a\udcff"] if option != "--replace" else ["granite", "a\udcff"]
    status, out, err = run("audit", "patch", "--model", tiny_directory, *asked, option, *values)
    assert (status, out) == (2, "")
    assert f"argument {option}: 'a\\udcff' is not UTF-8" in err


def test_one_scale_over_all_models(tiny_directory, other, tmp_path, run):
    """The fullest cell of a section is full in one model only; the numbers beside the colours are those of both."""
    page = tmp_path / "page.html"
    asked = ["--model", tiny_directory, other / "model", "--prompt", "granite is a", "--target", " rock"]
    found = json.loads(run("audit", "attribute", *asked, "--html", page, "--json")[1])
    values = [[v for row in [*entry["heads"], entry["mlps"]] for v in row] for entry in found]
    low, high = min(map(min, values)), max(map(max, values))
    figures = sections_of(page)["Who says ␣ro"]
    most = max(-low, high)
    for figure, model in zip(figures, found, strict=True):
        assert figure["scale"][1].startswith(f"{low:.3g}<span>")
        assert figure["scale"][1].endswith(f"{high:.3g} logits")
        for layer, row in enumerate(figure["rows"]):
            for (alpha, warm, _), value in zip(row, [*model["heads"][layer], model["mlps"][layer]], strict=True):
                assert alpha == pytest.approx(abs(value) / most, abs=0.006)
                assert warm == (value >= 0) or alpha == 0


def test_layers_stand_in_one_order(tiny_directory, other, tmp_path, run):
    """Layer 0 on top, on all pages and in the terminal."""
    page, asked = tmp_path / "page.html", ["--model", tiny_directory, "--prompt", "granite is a"]
    commands = [[kind, *asked, *more] for kind, more in KINDS.items()] + [["diff", tiny_directory, other / "model"]]
    for command in commands:
        assert run("audit", *command, "--html", page, "--force")[0] == 0
        figures = [figure["heads"] for figures in sections_of(page).values() for figure in figures]
        maps = [heads for heads in figures if heads and heads[0].endswith("layer ↓")]
        assert maps
        assert all(heads[1:] == ["0", "1", "2"] for heads in maps), command
        assert "0, at the top" in page.read_text()
    lines = run("audit", "lens", *asked)[1].splitlines()[2:]
    assert [line.split()[0] for line in lines] == ["0", "1", "2"]


def test_the_target_is_shown_by_rank_and_log_probability(tiny_directory, tmp_path, run):
    """People count ranks from 1, the field `rank` of --json from 0, as the help says; terminal and page agree."""
    assert "Ranks count from 1; in the arrays of --json from 0" in run("audit", "lens", "--help")[1]
    page = tmp_path / "page.html"
    asked = ["audit", "lens", "--model", tiny_directory, "--prompt", "granite is a", "--target", " rock"]
    (found,) = json.loads(run(*asked, "--json")[1])
    lines = run(*asked, "--html", page)[1].splitlines()[2:-1]
    (figure,) = sections_of(page)["The target ␣ro"]
    even = math.log(json.loads((tiny_directory / "config.json").read_text())["vocab_size"])
    for layer, line in enumerate(lines):
        ranks, logprobs = found["rank"][layer], found["logprob"][layer]
        assert line.split()[-2:] == [f"{logprobs[-1]:.2f}", str(ranks[-1] + 1)]
        assert [text for _, _, text in figure["rows"][layer]] == [str(rank + 1) for rank in ranks]
        shown = [max(0.0, 1 + logprob / even) for logprob in logprobs]
        assert [alpha for alpha, _, _ in figure["rows"][layer]] == pytest.approx(shown, abs=0.006)
        assert math.exp(logprobs[-1]) == pytest.approx(found["probability"][layer][-1], rel=1e-4)


@pytest.mark.parametrize("kind", ["lens", "attribute", "patch"])
def test_a_target_of_several_tokens_is_named_by_its_first(tiny_directory, run, kind):
    more = [*KINDS[kind][2:]] if kind == "patch" else []
    asked = ["audit", kind, "--model", tiny_directory, "--prompt", "granite is a", *more, "--target", " rock of quartz"]
    status, _, err = run(*asked)
    assert status == 0, err
    said = "the target ' rock of quartz' is not one token after the prompt: only the first one, ␣ro, counts"
    assert err.count(said) == 1
    if kind == "patch":
        assert "the foil ' crust' is not one token" in err
    assert "the target" not in run(*asked[:-1], " ro")[2]


def test_every_token_can_be_seen(tiny_tokenizer):
    shown = [visible(tiny_tokenizer, token) for token in range(tiny_tokenizer.vocab_size)]
    assert all(text and text.isprintable() and " " not in text and "\ufffd" not in text for text in shown)
    newline, half = (shown[tiny_tokenizer.encode(text, bos=False, eos=False)[-1]] for text in ("\n", "\u00e9\u200b"))
    assert newline == "⏎"
    assert half == "<0x8B>"


def test_an_empty_prompt_without_bos(tiny_directory, tmp_path, run):
    shutil.copytree(tiny_directory, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*", "*ion*", "manif*"))
    write_json_tokenizer(tmp_path / "model")
    for kind, more in KINDS.items():
        asked = ["audit", kind, "--model", tmp_path / "model", "--prompt", "", *more]
        status, out, err = run(*asked)
        assert (status, out) == (2, "")
        assert err.splitlines()[-1] == "k2mini: the prompt is empty" or kind == "patch"


def test_every_token_of_a_tokenizer_json_can_be_seen(tmp_path):
    tokenizer = Tokenizer(write_json_tokenizer(tmp_path))
    shown = [visible(tokenizer, token) for token in range(tokenizer.vocab_size)]
    assert all(text and text.isprintable() and " " not in text and "\ufffd" not in text for text in shown)
    ids = tokenizer.encode(" granite\n é", bos=False, eos=True)
    assert [shown[token] for token in ids] == ["␣granite", "⏎", "␣", "<0xC3>", "<0xA9>", "<|im_end|>"]


def test_a_long_question_is_folded(tiny_directory, other, benchmark, tmp_path, run):
    """The question is read at once, the prompt with its template on demand; what a patch can't change is left out."""
    page = tmp_path / "page.html"
    asked = ["--model", tiny_directory, other / "model", "--question", benchmark, "rocks", "0"]
    assert run("audit", "attention", *asked, "--html", page)[0] == 0
    text = page.read_text()
    assert 'question: <span class="said">rocks 0: What is granite?</span>' in text
    assert re.search(r"<details><summary>prompt</summary><pre>[^<]*### Response:\n</pre></details>", text)
    assert text.count("<summary>show</summary>") == 4, "the patterns of each head"
    first = next(iter(sections_of(page)))
    assert first == "Layer 2: where the last token looks"
    assert run("audit", "attention", *asked, "--head", "1", "--html", page, "--force")[0] == 0
    assert "<summary>show</summary>" not in page.read_text()
    replaced = ["--replace", "granite", "basalt", "--foil", "B"]
    (found, _) = json.loads(run("audit", "patch", *asked, *replaced, "--html", page, "--force", "--json")[1])
    rows = sections_of(page)["Patched: residual_out"][0]["rows"]
    left_out = len(found["tokens"]) - len(rows[0])
    assert 10 < left_out < len(found["tokens"])
    assert all(value == 0 for row in found["positions"] for value in row[:left_out])
    assert f"The first {left_out} tokens are the same in both" in page.read_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_on_cells_can_be_read(scheme):
    """WCAG 2.2, 1.4.3: a contrast of 4.5 between --ink and a cell of either hue, however full."""
    blocks = dict(zip(("light", "dark"), re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL), strict=True))
    colours = dict(re.findall(r"--(\w+): ([^;]+);", blocks[scheme]))

    def rgb(text):
        if text.startswith("#"):
            return [int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        hue, saturation, lightness = (float(part.rstrip("%")) for part in text.split())
        return colorsys.hls_to_rgb(hue / 360, lightness / 100, saturation / 100)

    def luminance(colour):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one, other):
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    card = rgb(colours["card"])
    for hue in ("up", "down"):
        for alpha in (0, 0.25, 0.5, 0.75, 1):
            cell = [alpha * a + (1 - alpha) * b for a, b in zip(rgb(colours[hue]), card, strict=True)]
            assert contrast(rgb(colours["ink"]), cell) >= 4.5, (hue, alpha)
        assert contrast(rgb(colours[hue]), card) > 2.5, "a full cell stands out"
    assert contrast(rgb(colours["soft"]), card) >= 4.5
    assert contrast(rgb(colours["soft"]), rgb(colours["paper"])) >= 4.5


@pytest.fixture(scope="module")
def pages(tiny_directory, other, benchmark, tmp_path_factory):
    """A page of each kind, over two models and a benchmark's question, as `k2mini audit` writes them."""
    folder = tmp_path_factory.mktemp("pages")
    asked = ["--model", tiny_directory, other / "model", "--question", benchmark, "rocks", "0"]
    replaced = ["--replace", "granite", "basalt", "--foil", "B"]
    commands = {kind: [*asked, *(replaced if kind == "patch" else [])] for kind in KINDS}
    commands["diff"] = [tiny_directory, other / "model", other / "model"]
    for kind, arguments in commands.items():
        with pytest.raises(SystemExit, match="0"):
            main(["audit", kind, *map(str, arguments), "--html", str(folder / f"{kind}.html")])
    return folder


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", [*KINDS, "diff"])
def test_the_pages_in_a_browser(pages, tmp_path, kind, scheme):
    """No error on the console, where a request off the page would be one, and a picture, in light and dark."""
    page, picture = pages / f"{kind}.html", tmp_path / "page.png"
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
    assert not re.findall(r"https?://|@import|url\(|<script", page.read_text())
    assert picture.stat().st_size > 10_000
