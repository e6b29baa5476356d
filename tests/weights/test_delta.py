import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from k2mini.weights.delta import apply_delta, make_delta
from k2mini.weights.formats import CheckpointReader
from k2mini.weights.model_files import save_model
from tests.conftest import tiny_config, tiny_llama

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WORDS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def random_bits(model, seed):
    """Every bit pattern is possible: subnormals, infinities, NaNs of any payload, -0.0."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, tensor in model.state_dict().items():
        words = WORDS[tensor.dtype]
        span = torch.iinfo(words)
        bits = torch.randint(span.min, span.max, tensor.shape, generator=generator, dtype=torch.int64).to(words)
        tensors[name] = bits.view(tensor.dtype)
    special = [
        torch.inf,
        -torch.inf,
        torch.nan,
        -0.0,
        0.0,
        torch.finfo(tensor.dtype).max,
        torch.finfo(tensor.dtype).tiny / 4,
    ]
    tensors["model.norm.weight"][: len(special)] = torch.tensor(special, dtype=tensor.dtype)  # fmt: skip
    return tensors


def bits(directory):
    reader = CheckpointReader(directory)
    return {name: reader.tensor(name).view(WORDS[reader.dtype(name)]) for name in reader.names()}


@pytest.mark.parametrize("base_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tuned_dtype", DTYPES, ids=str)
def test_make_then_apply_gives_back_every_bit(tmp_path, tiny_tokenizer, base_dtype, tuned_dtype):
    config = tiny_config(vocab_size=tiny_tokenizer.vocab_size)
    base, tuned = (random_bits(tiny_llama(config, dtype=dtype), i) for i, dtype in enumerate((base_dtype, tuned_dtype)))
    save_model(base, config, tmp_path / "base")
    save_model(tuned, config, tmp_path / "tuned", tokenizer=tiny_tokenizer, shard_bytes=40_000)
    make_delta(tmp_path / "base", tmp_path / "tuned", tmp_path / "delta")
    apply_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "again")
    before, after = bits(tmp_path / "tuned"), bits(tmp_path / "again")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "again" / "tokenizer.model").read_bytes() == tiny_tokenizer.path.read_bytes()


@pytest.fixture
def trio(tmp_path):
    for name, seed in (("base", 0), ("tuned", 1)):
        model = tiny_llama(seed=seed)
        save_model(model.state_dict(), model.config, tmp_path / name)
    make_delta(tmp_path / "base", tmp_path / "tuned", tmp_path / "delta")
    return tmp_path


def test_another_base_is_refused(trio):
    with pytest.raises(ValueError, match=r"differs from the base that .* was made against"):
        apply_delta(trio / "tuned", trio / "delta", trio / "out")
    with pytest.raises(ValueError, match="is not a delta that k2mini made"):
        apply_delta(trio / "delta", trio / "base", trio / "out")
    assert not (trio / "out").exists()


def test_a_flipped_bit_is_found(trio):
    path = trio / "delta" / "delta.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] ^= 1
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.weight does not give the tuned weights"):
        apply_delta(trio / "base", trio / "delta", trio / "out")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="is missing or damaged"):
        apply_delta(trio / "base", trio / "delta", trio / "out")
    assert not (trio / "out").exists()


def test_models_of_other_shapes_are_refused(trio):
    other = tiny_llama(tiny_config(dim=32))
    save_model(other.state_dict(), other.config, trio / "other")
    with pytest.raises(ValueError, match="models of different shapes"):
        make_delta(trio / "base", trio / "other", trio / "out")
    raw = json.loads((trio / "delta" / "manifest.json").read_text())
    raw["tensors"].pop("model.norm.weight")
    (trio / "delta" / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"do not have the same tensors \(model.norm.weight\)"):
        apply_delta(trio / "base", trio / "delta", trio / "out")


def test_an_existing_target_stays(trio):
    before = (trio / "tuned" / "model.safetensors").read_bytes()
    for call in (
        lambda: make_delta(trio / "base", trio / "tuned", trio / "tuned"),
        lambda: apply_delta(trio / "base", trio / "delta", trio / "tuned"),
    ):
        with pytest.raises(ValueError, match="exists already"):
            call()
    assert (trio / "tuned" / "model.safetensors").read_bytes() == before
