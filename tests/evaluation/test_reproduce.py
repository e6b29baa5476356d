"""`k2mini reproduce k2` on tiny local folders: base, delta, adapter, and two files laid out as GeoBench's."""

import json
import shutil
from dataclasses import replace

import pytest

from k2mini.build import load_model
from k2mini.config import LoraSection
from k2mini.data.prompts import get_template
from k2mini.evaluation.benchmarks import read_benchmark
from k2mini.evaluation.evaluate import evaluate
from k2mini.evaluation.instances import EvalConfig
from k2mini.files import sha256
from k2mini.nn.lora import adapter_tensors
from k2mini.weights.adapter import save_adapter
from k2mini.weights.delta import make_delta
from k2mini.weights.model_directory import ModelDirectory
from k2mini.weights.model_files import save_model
from tests.conftest import tiny_llama
from tests.helpers import adapted

WORDS = ["granite", "basalt", "quartz", "crust"]


@pytest.fixture(scope="module")
def k2(tiny_directory, tmp_path_factory):
    """Base and further pretrained model with the delta between them, an adapter, NPEE and the AP tests."""
    folder = tmp_path_factory.mktemp("k2")
    base = ModelDirectory(tiny_directory)
    tuned = tiny_llama(base.config, seed=5).state_dict()
    save_model(tuned, base.config, folder / "further", tokenizer=base.require_tokenizer())
    make_delta(tiny_directory, folder / "further", folder / "delta", kind="bits")
    section = LoraSection(rank=4, alpha=6.0, target_modules=["q_proj", "k_proj", "v_proj"])
    save_adapter(adapter_tensors(adapted(base.config)), section, folder / "adapter", "further")
    listed = "".join(f"\n{label}. {word}" for label, word in zip("ABCD", WORDS, strict=True))
    choice = {"question": [f"What is {w}?\nChoose from:\n{listed}" for w in WORDS], "answer": list("ABCD")}
    statements = {"question": ["Granite is a rock."], "answer": ["True"]}
    (folder / "npee.json").write_text(json.dumps({"choice": choice, "tf": statements}))
    choices = [{"label": label, "text": word} for label, word in zip("ABCDE", [*WORDS, "rock"], strict=True)]
    tests = [{"question": {"stem": f"Where is {w}?", "choices": choices}, "answerKey": "B"} for w in WORDS]
    (folder / "ap.json").write_text(json.dumps(tests))
    (folder / "shots.txt").write_text("What is mantle?\nA")
    return folder


def asked(k2, tiny_directory, *more):
    parts = ["--base", tiny_directory, "--delta", k2 / "delta", "--adapter", k2 / "adapter"]
    return ["reproduce", "k2", *parts, "--benchmark", k2 / "npee.json", k2 / "ap.json", "--scoring", "letter", *more]


def test_rows_are_those_of_each_model_with_all_hashes(k2, tiny_directory, tmp_path, run):
    out = tmp_path / "out"
    command = asked(k2, tiny_directory, "--shots-file", k2 / "shots.txt", "--out", out)
    status, said, err = run(*command)
    assert status == 0, err
    report = json.loads((out / "report.json").read_text())
    rows = {row["model"]: row for row in report["rows"]}
    questions = [question for name in ("npee", "ap") for question in read_benchmark(k2 / f"{name}.json")]
    config = EvalConfig("letter", get_template("k2_wa"), fewshot_file=str(k2 / "shots.txt"))
    for name, model, adapter in (
        ("LLaMA-7B", tiny_directory, None),
        ("LLaMA-7B + delta", k2 / "further", None),
        ("K2-7B", k2 / "further", k2 / "adapter"),
    ):
        results = evaluate(*load_model(model, adapter), questions, config)
        for column, task in (("NPEE", "npee/choice"), ("APTest", "ap")):
            ours = rows[name][column]["ours"]
            assert ours["accuracy"] == sum(r.is_right for r in results if r.task == task) / 4
            assert ours["n"] == 4
    predictions = [
        [json.loads(line)["logprobs"] for line in (out / folder / "results.jsonl").read_text().splitlines()]
        for folder in ("base", "delta", "k2")
    ]
    assert predictions[0] != predictions[1] != predictions[2]
    assert (rows["Random"]["NPEE"], rows["Random"]["APTest"]) == (
        {"ours": {"accuracy": 0.25}, "quoted": pytest.approx(0.271)},
        {"ours": {"accuracy": 0.2}, "quoted": pytest.approx(0.2)},
    )
    assert rows["K2-7B"]["NPEE"]["quoted"] == pytest.approx(0.399)
    assert rows["ChatGPT"]["NPEE"] == {"ours": None, "quoted": pytest.approx(0.488)}
    assert rows["MPT-7B"]["APTest"] == {"ours": None, "quoted": None}
    lines = {line[:16].strip(): line for line in said.splitlines()}
    assert lines["K2-7B"].endswith("29.3 %")
    assert lines["LLaMA-7B + delta"].endswith("not quoted")
    settings = report["settings"]
    assert settings["hashes"]["base"] == ModelDirectory(tiny_directory).fingerprint()
    assert settings["hashes"].keys() == {"base", "delta", "adapter"}
    assert settings["benchmarks"] == {str(k2 / name): sha256(k2 / name) for name in ("npee.json", "ap.json")}
    assert settings["shots_sha256"] == sha256(k2 / "shots.txt")
    assert (settings["scoring"], settings["template"], settings["dtype"]) == ("letter", "k2_wa", None)
    assert report["used"] == {"device": "cpu", "dtype": "float32"}, "which were not asked for, but were"
    assert "scored by 'letter'; K2's code reads fixed ids" in said
    # A run that was killed goes on, and comes to the same.
    lines = (out / "k2" / "results.jsonl").read_text().splitlines(keepends=True)
    (out / "k2" / "results.jsonl").write_text("".join(lines[:3]) + lines[3][:9])
    (out / "report.json").unlink()
    again = run(*command)
    assert (again[0], again[1]) == (0, said)
    assert json.loads((out / "report.json").read_text()) == report
    # The same folder with another adapter is refused, before anything is made anew.
    section = LoraSection(rank=4, alpha=7.0, target_modules=["q_proj", "k_proj", "v_proj"])
    model = adapted(ModelDirectory(tiny_directory).config)
    save_adapter(adapter_tensors(model), section, tmp_path / "other", "further")
    status, _, err = run(*command, "--limit", 2)
    assert (status, "has a result of question 2" in err) == (2, True)
    command[command.index("--adapter") + 1] = tmp_path / "other"
    status, _, err = run(*command)
    assert (status, f"{out / 'k2'} holds results of another adapter; name another --out" in err) == (2, True)
    command[command.index("--base") + 1] = k2 / "further"
    status, _, err = run(*command)
    assert (status, "holds a reproduction with other hashes (reproduce.json)" in err) == (2, True)


def test_k2_in_one_without_delta_or_adapter(k2, tiny_directory, tmp_path, run):
    command = asked(k2, tiny_directory, "--full", k2 / "further", "--out", tmp_path / "out", "--json")
    status, _, err = run(*command)
    assert (status, "--full is K2 in one, in the place of --delta and --adapter" in err) == (2, True)
    status, said, err = run(*command[:4], *command[8:])
    assert status == 0, err
    report = json.loads(said)
    rows = {row["model"]: row for row in report["rows"]}
    assert rows["LLaMA-7B + delta"]["NPEE"]["ours"] is None
    assert rows["K2-7B"]["APTest"]["ours"]["n"] == 4
    assert report["settings"]["parts"].keys() == {"base", "full"}
    assert "asked without K2's four examples (--shots-file)" in report["notes"]
    assert not (tmp_path / "out" / "further_pretrained").exists()


def test_what_can_not_be_reproduced_is_refused(k2, tiny_directory, tmp_path, run):
    command = asked(k2, tiny_directory, "--out", tmp_path / "out")
    one = [part for part in command if part != k2 / "ap.json"]
    for asked_for, said in (
        (one, "--benchmark has no questions of ap; name both of GeoBench's files"),
        ([*command, "--limit", 0], "--limit must be at least 1, not 0"),
        ([part if part != "letter" else "k2" for part in command], "scoring 'k2' reads LLaMA's ids of the letters"),
        ([part if part != tiny_directory else tmp_path / "nowhere" for part in command], "nowhere"),
        ([part if part != k2 / "adapter" else k2 / "delta" for part in command], "adapter_config.json"),
    ):
        status, out, err = run(*asked_for)
        assert (status, out, said in err) == (2, "", True), err
    assert not (tmp_path / "out").exists()
    # A delta that belongs to another base is found before anything is evaluated.
    command[command.index("--delta") + 1] = k2 / "further"
    status, out, err = run(*command)
    assert (status, out) == (2, "")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["reproduce.json"]


def test_mistakes_are_found_early_and_what_is_done_is_kept(k2, tiny_directory, tmp_path, run):
    """An adapter of another shape, corrected in the same folder; then one byte changed in what was made there."""
    command, out = asked(k2, tiny_directory, "--out", tmp_path / "out"), tmp_path / "out"
    wide = adapted(replace(ModelDirectory(tiny_directory).config, dim=128, head_dim=32))
    section = LoraSection(rank=4, alpha=6.0, target_modules=["q_proj", "k_proj", "v_proj"])
    save_adapter(adapter_tensors(wide), section, tmp_path / "wide", "further")
    place = command.index("--adapter") + 1
    status, said, err = run(*command[:place], tmp_path / "wide", *command[place + 1 :])
    assert (status, said, "has another shape than the model's" in err) == (2, "", True), err
    assert "asked without K2's four examples (--shots-file)" in err, "said before hours, not after"
    assert sorted(path.name for path in out.iterdir()) == ["further_pretrained", "reproduce.json"]
    status, said, err = run(*command)
    assert status == 0, err
    (weights,) = (out / "further_pretrained").glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-3] ^= 64
    weights.write_bytes(content)
    status, _, err = run(*command)
    assert (status, f"{weights} differs" in err) == (2, True), err
    assert f"remove {out / 'further_pretrained'}, and it is made anew" in err
    shutil.rmtree(out / "further_pretrained")
    assert run(*command)[:2] == (0, said)
