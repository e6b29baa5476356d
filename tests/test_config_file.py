import pytest

from k2mini.config import FinetuneConfig, PretrainConfig
from k2mini.config_file import load_config

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
            write("run: {dir: 3}\nmodel: {pth: base}\ntrain: {lr: fast, max_step: 10}\nlora: {rank: 8}\n"),
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
        "unknown key lora",
        "override 'nonsense' is not section.key=value",
    ]:
        assert part in message


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
