"""Every byte of what k2mini writes is proved."""

import hashlib
import json
import re
from random import Random

import pytest
import torch

from k2mini.config import LoraSection
from k2mini.nn.lora import adapter_tensors, attach, init_adapters
from k2mini.weights.adapter import save_adapter
from k2mini.weights.convert import convert
from k2mini.weights.delta import make_delta
from k2mini.weights.merge import merge_adapters
from k2mini.weights.model_directory import CheckpointReader, read_manifest
from k2mini.weights.model_files import save_model
from k2mini.weights.verify import verify
from tests.conftest import tiny_config, tiny_llama
from tests.helpers import fill_adapters


@pytest.fixture(scope="module")
def written(tmp_path_factory, tiny_tokenizer):
    """One directory of each kind."""
    folder = tmp_path_factory.mktemp("written")
    config = tiny_config(vocab_size=tiny_tokenizer.vocab_size)
    for name, seed in (("base", 0), ("tuned", 1)):
        save_model(
            tiny_llama(config, seed).state_dict(), config, folder / name, tokenizer=tiny_tokenizer, shard_bytes=200_000
        )
    make_delta(folder / "base", folder / "tuned", folder / "delta")
    model = tiny_llama(config)
    section = LoraSection(rank=2, alpha=4, target_modules=["q_proj"])
    attach(model, section)
    init_adapters(model, 0)
    fill_adapters(model)
    save_adapter(adapter_tensors(model), section, folder / "adapter", str(folder / "base"))
    merge_adapters(folder / "base", [folder / "adapter"], folder / "merged")
    convert(folder / "base", "bin", folder / "bin", shard_bytes=200_000)
    convert(folder / "base", "meta", folder / "meta")
    return folder


KINDS = ["base", "delta", "adapter", "merged", "bin", "meta"]


@pytest.mark.parametrize("kind", KINDS)
def test_one_flipped_byte_anywhere_is_found(written, kind):
    directory, random = written / kind, Random(0)
    number, unknown = verify(directory)
    files = sorted(directory.iterdir())
    assert (number, unknown) == (len(files) - 1, [])
    for path in files:
        content = bytearray(path.read_bytes())
        for _ in range(4):
            place, bit = random.randrange(len(content)), 1 << random.randrange(8)
            content[place] ^= bit
            path.write_bytes(content)
            with pytest.raises(ValueError, match="manifest" if path.name == "manifest.json" else re.escape(path.name)):
                verify(directory)
            content[place] ^= bit
        path.write_bytes(content)
    verify(directory)


@pytest.mark.parametrize("kind", ["base", "delta", "bin", "meta"])
def test_the_tensor_is_named(written, kind):
    directory = written / kind
    manifest = read_manifest(directory)
    name = "layers.1.feed_forward.w1.weight" if kind == "meta" else "model.layers.1.mlp.gate_proj.weight"
    path = directory / manifest["tensors"][name]["file"]
    before = path.read_bytes()
    if path.suffix == ".safetensors":
        size = int.from_bytes(before[:8], "little")
        place = 8 + size + json.loads(before[8 : 8 + size])[name]["data_offsets"][0] + 5
    else:
        stored = torch.load(path, weights_only=True)[name]
        place = before.index(stored.numpy().tobytes()[:64]) + 5
    path.write_bytes(before[:place] + bytes([before[place] ^ 1]) + before[place + 1 :])
    with pytest.raises(ValueError, match=rf"{path.name} differs: {name}$"):
        verify(directory)
    path.write_bytes(before)


def test_missing_cut_and_unknown_files(tmp_path):
    config = tiny_config()
    save_model(tiny_llama(config).state_dict(), config, tmp_path / "model")
    (tmp_path / "model" / "notes.txt").touch()
    assert verify(tmp_path / "model") == (2, ["notes.txt"])
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config.json is missing; .*model.safetensors is [\d,]+ bytes, not"):
        verify(tmp_path / "model")
    (tmp_path / "model" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"has no manifest.json of k2mini's weights"):
        verify(tmp_path / "model")


def test_the_hashes_are_those_of_the_raw_bytes(written):
    reader, manifest = CheckpointReader(written / "base"), read_manifest(written / "base")
    for name, entry in manifest["tensors"].items():
        assert entry["sha256"] == hashlib.sha256(reader.tensor(name).numpy().tobytes()).hexdigest()
