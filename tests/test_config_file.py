import re
from dataclasses import fields, is_dataclass
from typing import get_args, get_type_hints

import pytest

from k2mini.config import LORA_TARGETS, FinetuneConfig, PretrainConfig
from k2mini.config_file import config_kind, load_config
from tests.conftest import ROOT

GOOD = """
run: {dir: runs/x}
model: {path: base}
data: {path: corpus.jsonl}
train: {lr: 1e-5, max_steps: 10}
"""


@pytest.fixture
def write(tmp_path):
    def call(text):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return call


def test_values_defaults_and_overrides(write):
    config = load_config(
        PretrainConfig,
        write(GOOD),
        ["run.seed=3", "train.max_steps=null", "train.epochs=2", "checkpoint.resume=none", "data.eos=false"],
    )
    assert config.train.lr == 1e-5  # YAML 1.1 reads this as text
    assert (config.run.seed, config.train.max_steps, config.train.epochs) == (3, None, 2.0)
    assert (config.checkpoint.resume, config.data.eos, config.data.seq_len) == ("none", False, 1024)
    tuned = load_config(FinetuneConfig, write(GOOD), ["lora.target_modules=[q_proj, o_proj]"])
    assert tuned.lora.target_modules == ["q_proj", "o_proj"]
    assert tuned.lora.rank == 8


def test_all_errors_come_at_once(write):
    with pytest.raises(ValueError, match=r"config\.yaml") as caught:
        load_config(
            PretrainConfig,
            write("run: {dir: 3}\nmodel: {pth: base}\ntrain: {lr: fast, max_step: 10}\nlor: {rank: 8}\n"),
            ["train.schedule=sine", "nonsense"],
        )
    message = str(caught.value)
    for part in [
        "run.dir must be text, not 3",
        "unknown key model.pth; did you mean model.path?",
        "model.path is missing",
        "train.lr must be a number, not 'fast'",
        "unknown key train.max_step; did you mean train.max_steps?",
        "train.schedule must be one of constant, linear, cosine, not 'sine'",
        "data is missing",
        "unknown key lor; did you mean lora?",
        "override 'nonsense' is not section.key=value",
    ]:
        assert part in message


def test_lora_may_be_null_and_its_modules_a_word(write):
    assert load_config(PretrainConfig, write(GOOD)).lora is None
    everything = load_config(PretrainConfig, write(GOOD), ["lora.rank=4", "lora.target_modules=all"]).lora
    assert everything.rank == 4
    assert everything.target_modules == [*LORA_TARGETS]
    assert load_config(FinetuneConfig, write(GOOD), ["lora=null"]).lora is None
    assert load_config(FinetuneConfig, write(GOOD + "lora: null"), ["lora.rank=4"]).lora.rank == 4
    with pytest.raises(ValueError, match="override 'lora=5' is not section"):
        load_config(PretrainConfig, write(GOOD), ["lora=5"])


@pytest.mark.parametrize(
    ("sections", "kind"),
    [
        ("data: {seq_len: 8}\nlora: {rank: 2}\n", PretrainConfig),
        ("data: {template: alpaca}\nlora: null\n", FinetuneConfig),
        ("data: {path: x}\nlora: {rank: 2}\n", FinetuneConfig),
        ("data: {path: x}\n", PretrainConfig),
    ],
)
def test_the_keys_of_data_say_what_a_file_is_for(write, sections, kind):
    assert config_kind(write(sections)) is kind


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr=0", "train.lr must be positive, not 0.0"),
        ("train.global_batch_size=6", "must be a multiple of train.micro_batch_size"),
        ("train.epochs=1", "set exactly one of train.max_steps and train.epochs"),
        ("train.max_steps=2.5", "train.max_steps must be a whole number, not 2.5"),
        ("train.max_steps=true", "train.max_steps must be a whole number, not True"),
        ("checkpoint.every=0", "checkpoint.every must be positive, not 0"),
        ("run=5", "override 'run=5' is not section.key=value"),
    ],
)
def test_values_out_of_range(write, override, message):
    with pytest.raises(ValueError, match=message):
        load_config(PretrainConfig, write(GOOD), [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.rank=0", "lora.rank must be positive, not 0"),
        ("lora.dropout=1", "lora.dropout must be at least 0 and below 1"),
        ("lora.target_modules=[]", "lora.target_modules is empty"),
        ("lora.target_modules=q_proj", "must be a list of words, not 'q_proj'"),
    ],
)
def test_lora_values_out_of_range(write, override, message):
    with pytest.raises(ValueError, match=message):
        load_config(FinetuneConfig, write(GOOD), [override])


def test_files_that_are_no_configuration(write, tmp_path):
    with pytest.raises(ValueError, match="there is no configuration file"):
        load_config(PretrainConfig, tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="is not valid YAML"):
        load_config(PretrainConfig, write("run: {dir"))
    with pytest.raises(ValueError, match="must hold sections"):
        load_config(PretrainConfig, write("- 1"))


# Each of twelve anchors holds the one before it nine times.
LAUGHS = "v0: &v0 [x, x]\n" + "".join(f"v{n + 1}: &v{n + 1} [{', '.join([f'*v{n}'] * 9)}]\n" for n in range(12))
MERGES = "v0: &v0 {x: 1}\n" + "".join(f"v{n + 1}: &v{n + 1} {{<<: [{', '.join([f'*v{n}'] * 9)}]}}\n" for n in range(12))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS + "run: {dir: *v12}", "run.dir must be text, not "),
        (MERGES, "is not valid YAML"),
        ("[" * 20_000, "is nested too deeply"),
        ("a: " + "{b: " * 20_000, "is nested too deeply"),
        (GOOD + "run: {dir: other}", "'run' stands twice"),
        (GOOD.replace("runs/x", "x, dir: y"), "'dir' stands twice"),
        (GOOD.replace("10}", "1" * 5000 + "}"), "is not valid YAML: Exceeds the limit"),
        (GOOD.replace("10}", "0x" + "f" * 5000 + "}"), r"train.max_steps must be below 2\*\*63"),
        (GOOD.replace("run: {dir: runs/x}", "run: 0x" + "f" * 5000), "config.yaml: Exceeds the limit"),
        (GOOD.replace("10}", "1" + "0" * 30 + "}"), r"train.max_steps must be below 2\*\*63"),
        (GOOD.replace("1e-5", "1" + "0" * 400), r"train.lr must be below 2\*\*63"),
        (GOOD.replace("1e-5", ".nan"), "train.lr must be finite, not nan"),
        (GOOD.replace("1e-5", "1e999"), "train.lr must be finite, not inf"),
        (GOOD.replace("runs/x", r'"a\0b"'), "run.dir has a character that no text or path may have"),
        (GOOD.replace("runs/x", r'"a\ud800b"'), "run.dir has a character that no text or path may have"),
        (GOOD.replace("runs/x", "2020-13-45"), "config.yaml is not valid YAML: month must be"),
        (GOOD.replace("10}", "!!int ''}"), "config.yaml is not valid YAML"),
        (GOOD.replace("10}", "!!timestamp x}"), "config.yaml is not valid YAML"),
        (GOOD + "#" * 200_000, "has more than 131,072 bytes"),
        ("".join(f"k{n}: 1\n" for n in range(200)), "and 174 more"),
        ("", "must hold sections"),
    ],
)
def test_what_can_not_be_trusted_is_one_sentence(write, text, message):
    path = write(text)
    for read in (lambda: load_config(PretrainConfig, path), lambda: load_config(FinetuneConfig, path)):
        with pytest.raises(ValueError, match=message) as caught:
            read()
        assert str(path) in str(caught.value)
        assert len(str(caught.value)) < 5000


@pytest.mark.parametrize("value", ["1" * 5000, "[" * 3000, "!!int ''", "\udcff"])
def test_overrides_are_read_as_strictly(write, value):
    with pytest.raises(ValueError, match="the value is not valid YAML"):
        load_config(PretrainConfig, write(GOOD), [f"run.dir={value}"])


def test_bytes_that_are_not_utf8(write):
    path = write(GOOD)
    path.write_bytes(path.read_bytes() + b"#\xff")
    with pytest.raises(ValueError, match=r"config\.yaml is not valid YAML: 'utf-8' codec can't decode byte 0xff"):
        load_config(PretrainConfig, path)


def test_the_page_of_all_keys(run):
    """As the repository has it: `k2mini config --list > configs/README.md`."""
    status, out, err = run("config", "--list")
    assert (status, err) == (0, "")
    assert out == (ROOT / "configs/README.md").read_text(encoding="utf-8")
    for kind in (PretrainConfig, FinetuneConfig):
        for name, section in get_type_hints(kind).items():
            for key in fields(next(filter(is_dataclass, (section, *get_args(section))))):
                assert re.search(rf"^- `{name}\.{key.name}` \(.+\): .+$", out, re.MULTILINE), f"{name}.{key.name}"
    assert "- `train.lr` (number; required): the peak learning rate" in out
    assert "- `train.schedule` (constant or linear or cosine; default linear): after warm-up" in out
    assert "- `model.quantize` (int8 or nf4 or null; default null)" in out
    assert "\n## data (pretrain only)\n" in out
    assert "\n## lora\n\nLow-rank adapters" in out


def test_a_configuration_with_its_defaults_can_be_given_back(write, run, tmp_path):
    for kind, section in ((PretrainConfig, ""), (FinetuneConfig, "lora: {rank: 4}\n")):
        given, overrides = write(GOOD + section), ["train.eps=1e-9", "run.dir=\u00e9"]
        status, out, err = run("config", given, *overrides)
        assert (status, err) == (0, "")
        assert "val_every: null" in out
        (tmp_path / "whole.yaml").write_text(out, encoding="utf-8")
        assert load_config(kind, tmp_path / "whole.yaml") == load_config(kind, given, overrides)
    assert "unknown key train.lrr" in run("config", given, "train.lrr=3")[2]
    assert run("config")[0] == run("config", "--list", given)[0] == 2


def test_a_key_given_twice_is_said(tmp_path, caplog):
    (tmp_path / "run.yaml").write_text(
        "run: {dir: x}\nmodel: {path: m}\ndata: {path: d}\ntrain: {lr: 1, max_steps: 1}\n"
    )
    assert load_config(PretrainConfig, tmp_path / "run.yaml", ["train.lr=2", "run.dir=y"]).train.lr == 2
    assert not caplog.text
    assert load_config(PretrainConfig, tmp_path / "run.yaml", ["train.lr=2", "run.dir=y", "train.lr=3"]).train.lr == 3
    assert "train.lr is given 2 times: the last one holds" in caplog.text
