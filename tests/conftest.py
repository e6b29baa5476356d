"""One tiny model, one tiny tokenizer, and the assets that live outside the project."""

import os
from pathlib import Path

import pytest
import torch

from k2mini.architectures import LinearRopeScaling, Llama3RopeScaling
from k2mini.cli import main
from k2mini.data.tokenizer import Tokenizer
from k2mini.model_config import ModelConfig
from k2mini.nn.init import init_weights
from k2mini.nn.llama import Llama

torch.set_num_threads(1)  # tiny models are faster so, and a busy machine does not stall them
os.environ.setdefault("OMP_NUM_THREADS", "1")  # nor do programs that tests start
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the hub itself

ROOT = Path(__file__).parents[1]
ASSETS = Path(os.environ.get("K2MINI_ASSETS", ROOT.parent / "shared"))

# The longest files first, so that no worker begins one of them when the other is about to end.
LONG = ["distributed/test_ranks.py", "training/test_plan.py", "demo/test_pipeline.py", "distributed/test_kills.py",
        "test_readme_commands.py", "inference/test_answers.py", "evaluation/test_score.py"]  # fmt: skip

# Shapes that differ in what can go wrong: heads, groups, tying, rotary scaling, head_dim unlike dim / heads, a window
# shorter than most prompts, biases, norms of q and k.
SHAPES = {
    "multi-head": {},
    "grouped": {"num_kv_heads": 2},
    "tied": {"tie_embeddings": True},
    "llama3-rope": {"num_kv_heads": 1, "rope_theta": 5e5, "rope_scaling": Llama3RopeScaling(8.0, 1.0, 4.0, 64)},
    "wide-heads": {"head_dim": 32, "norm_eps": 1e-5, "rope_scaling": LinearRopeScaling(4.0)},
    "mistral": {"num_kv_heads": 2, "sliding_window": 4},
    "qwen2": {"num_kv_heads": 2, "attention_bias": True, "rope_scaling": LinearRopeScaling(2.5)},
    "qwen3": {"num_kv_heads": 2, "head_dim": 32, "qk_norm": True, "tie_embeddings": True},
}


def pytest_collection_modifyitems(items):
    order = {ROOT / "tests" / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


def tiny_config(**changes) -> ModelConfig:
    """4 heads of 16, 3 layers, 199 tokens."""
    shape = {
        "dim": 64,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 4,
        "head_dim": 16,
        "intermediate_dim": 112,
        "vocab_size": 199,
        "max_seq_len": 256,
    }
    return ModelConfig(**{**shape, **changes})


def tiny_llama(config: ModelConfig | None = None, seed: int = 0, dtype=torch.float32) -> Llama:
    """A random model whose logits have a standard deviation near 1, so that tolerances mean something."""
    model = Llama(config or tiny_config())
    init_weights(model, seed, std=0.12)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith((".bias", "q_norm.weight", "k_norm.weight")):
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype).eval()


def asset(*parts: str) -> Path:
    path = ASSETS.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is not there; set K2MINI_ASSETS to the folder that has {Path(*parts)}")
    return path


@pytest.fixture(params=SHAPES)
def shape(request) -> ModelConfig:
    return tiny_config(**SHAPES[request.param])


@pytest.fixture(scope="session")
def llama_tokenizer() -> Tokenizer:
    return Tokenizer(asset("assets", "llama_tokenizer.model"))


@pytest.fixture(scope="session")
def geobench() -> dict[str, Path]:
    folder = asset("data", "geobench")
    return {"npee": folder / "geobench_npee.json", "ap": folder / "geobench_apstudy.json"}


@pytest.fixture(scope="session")
def real_model() -> Path:
    """SmolLM2-135M as a Hugging Face directory."""
    folder = os.environ.get("K2MINI_REAL_MODEL")
    if not folder:
        pytest.skip("no real model; build one (assets/make_smollm2.py DIR) and set K2MINI_REAL_MODEL=DIR")
    return Path(folder)


@pytest.fixture(scope="session")
def smollm2_json(real_model) -> Path:
    """SmolLM2-135M with its own tokenizer, a tokenizer.json."""
    folder = real_model.with_name(f"{real_model.name}-json")
    if not folder.is_dir():
        pytest.skip(f"no {folder}; python tests/make_smollm2_json.py {real_model} makes it")
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory) -> Tokenizer:
    """A SentencePiece BPE like LLaMA's (byte fallback, dummy prefix, split digits), of 400 pieces."""
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def make_tokenizer(folder: Path) -> Tokenizer:
    """The tiny tokenizer in a folder, which is made."""
    import sentencepiece

    folder.mkdir(exist_ok=True)
    text = folder / "text.txt"
    words = "granite basalt quartz rock mineral is made of the a and that which plates crust mantle volcano erodes"
    text.write_text(
        "".join(f"{a} {b} {c}. Response: The answer is: A\n" for a in words.split() for b in words.split()
                for c in ("quickly", "slowly", "under pressure", "### Instruction:", "True", "False")),
        encoding="utf-8",
    )  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        hard_vocab_limit=False,
        pad_id=-1,
        minloglevel=2,
    )
    return Tokenizer(folder / "tokenizer.model")


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory, tiny_tokenizer) -> Path:
    """A tiny random model with the tiny tokenizer, as k2mini writes it."""
    from k2mini.weights.model_files import save_model

    directory = tmp_path_factory.mktemp("model") / "tiny"
    config = tiny_config(vocab_size=tiny_tokenizer.vocab_size, max_seq_len=1024)
    save_model(tiny_llama(config).state_dict(), config, directory, tokenizer=tiny_tokenizer)
    return directory


@pytest.fixture(scope="session")
def wide_directory(tmp_path_factory, tiny_tokenizer) -> Path:
    """Another, whose matrices have rows of whole blocks of NF4."""
    from k2mini.weights.model_files import save_model

    directory = tmp_path_factory.mktemp("wide") / "wide"
    config = tiny_config(intermediate_dim=320, num_kv_heads=2, vocab_size=tiny_tokenizer.vocab_size)
    save_model(tiny_llama(config).state_dict(), config, directory, tokenizer=tiny_tokenizer)
    return directory


@pytest.fixture(scope="session")
def chat_directory(tmp_path_factory) -> Path:
    """A tiny random model with a byte-level tokenizer.json and a ChatML template of its own."""
    from tests.helpers import make_chat_model

    for package in ("tokenizers", "jinja2"):
        pytest.importorskip(package)
    return make_chat_model(tmp_path_factory.mktemp("chat") / "tiny")


@pytest.fixture(scope="session")
def broken(tmp_path_factory, tiny_tokenizer) -> Path:
    """Models whose head, or whose last layer, holds a NaN; and one whose activations overflow in float16."""
    from k2mini.weights.model_files import save_model

    folder = tmp_path_factory.mktemp("broken")
    config = tiny_config(vocab_size=tiny_tokenizer.vocab_size, max_seq_len=1024)
    for name, tensor in (("head", "lm_head.weight"), ("layer", "model.layers.2.mlp.up_proj.weight")):
        state = tiny_llama(config).state_dict()
        state[tensor][-1, 3] = torch.nan
        save_model(state, config, folder / name, tokenizer=tiny_tokenizer)
    state = tiny_llama(config).state_dict()
    state["model.norm.weight"] *= 60000
    save_model(state, config, folder / "large", tokenizer=tiny_tokenizer)
    return folder


@pytest.fixture(scope="session")
def forks():
    """Starts command lines in processes of their own, for which torch is loaded once."""
    from tests.faults.server import Forks

    with Forks() as started:
        yield started


@pytest.fixture
def run(capfd):
    """Run a command line; returns (status, stdout, stderr)."""

    def call(*arguments):
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return end.value.code, captured.out, captured.err

    return call
