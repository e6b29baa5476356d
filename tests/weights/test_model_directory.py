"""Reading and writing Hugging Face directories, with transformers at the other end."""

import json
import os
import pickle
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

from k2mini.build import load_model
from k2mini.weights.model_directory import CheckpointReader
from k2mini.weights.model_files import save_model
from k2mini.weights.stream import plan_shards
from tests.conftest import SHAPES, tiny_config, tiny_llama
from tests.reference import to_transformers

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOKENS = torch.randint(199, (2, 30), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["grouped", "tied", "mistral", "qwen2", "qwen3"])
def shape(request):
    """Writing and reading depend on the shapes of tensors and on tying, and on nothing else of the shape."""
    return tiny_config(**SHAPES[request.param])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shard_bytes", [10**9, 50_000], ids=["one file", "shards"])
def test_transformers_loads_what_k2mini_writes(shape, dtype, shard_bytes, tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_llama(shape, dtype=dtype)
    save_model(model.state_dict(), shape, tmp_path / "model", shard_bytes=shard_bytes)
    assert (tmp_path / "model" / "model.safetensors.index.json").exists() == (shard_bytes == 50_000)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype).eval()
    state = theirs.state_dict()
    assert all(same_bits(tensor, state[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        # Through the file or not, transformers computes the same; and it agrees with us where precision allows.
        assert torch.equal(theirs(TOKENS).logits, to_transformers(model)(TOKENS).logits)
        if dtype == torch.float32:
            torch.testing.assert_close(model(TOKENS), theirs(TOKENS).logits, rtol=0, atol=1e-5)
    again, tokenizer = load_model(tmp_path / "model", dtype=dtype)
    assert tokenizer is None
    assert torch.equal(again(TOKENS), model(TOKENS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("max_shard_size", ["1GB", "50KB"])
def test_k2mini_loads_what_transformers_writes(shape, dtype, max_shard_size, tmp_path):
    reference = to_transformers(tiny_llama(shape, dtype=dtype))
    reference.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    model, _ = load_model(tmp_path, dtype=dtype)
    assert model.config == shape
    state = reference.state_dict()
    assert all(same_bits(tensor, state[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(TOKENS), tiny_llama(shape, dtype=dtype)(TOKENS))


@pytest.mark.parametrize("sharded", [False, True])
def test_pytorch_bin_of_2023(shape, sharded, tmp_path):
    """torch.save files, in shards with an index, with the rotary frequencies that transformers 4.28 stored."""
    model = tiny_llama(shape, dtype=torch.float16)
    save_model(model.state_dict(), shape, tmp_path / "new")
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text((tmp_path / "new" / "config.json").read_text())
    tensors = dict(model.state_dict())
    for layer in range(shape.num_layers):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    if sharded:
        names = sorted(tensors)
        files = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)}
        for file in set(files.values()):
            torch.save({name: tensors[name] for name in names if files[name] == file}, old / file)
        (old / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    else:
        torch.save(tensors, old / "pytorch_model.bin")
    loaded, _ = load_model(old, dtype="float16")
    assert all(same_bits(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_the_file_on_disk_is_mapped_not_copied(tmp_path):
    model = tiny_llama()
    save_model(model.state_dict(), model.config, tmp_path / "model")
    loaded, _ = load_model(tmp_path / "model")
    pointers = sorted((p.data_ptr(), p.numel() * 4) for p in loaded.parameters())
    # All parameters lie inside one mapping of the file, back to back.
    assert pointers[-1][0] + pointers[-1][1] - pointers[0][0] == sum(size for _, size in pointers)
    with open("/proc/self/maps") as maps:  # noqa: PTH123
        mapped = [line for line in maps if str(tmp_path / "model" / "model.safetensors") in line]
    assert mapped
    with torch.no_grad():
        loaded.model.norm.weight.fill_(7.0)  # training writes in place; the file stays as it is
    assert load_file(tmp_path / "model" / "model.safetensors")["model.norm.weight"].eq(1).all()


def test_modes_follow_the_umask(tmp_path):
    model = tiny_llama()
    old = os.umask(0o027)
    try:
        save_model(model.state_dict(), model.config, tmp_path / "model")
    finally:
        os.umask(old)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "model").iterdir()} == {0o640}


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    model = tiny_llama()

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("k2mini.weights.stream.raw", full)
    with pytest.raises(OSError, match="No space left"):
        save_model(model.state_dict(), model.config, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_not_overwritten(tiny_directory):
    model = tiny_llama()
    before = sorted(tiny_directory.iterdir())
    with pytest.raises(ValueError, match="exists already"):
        save_model(model.state_dict(), model.config, tiny_directory)
    assert sorted(tiny_directory.iterdir()) == before


def test_shards_are_filled_in_order():
    assert plan_shards({"a": 4, "b": 4, "c": 9, "d": 1}, 8) == [["a", "b"], ["c"], ["d"]]


@pytest.fixture
def broken(tmp_path):
    """A good directory to break, and its tensors."""
    model = tiny_llama()
    directory = tmp_path / "model"
    save_model(model.state_dict(), model.config, directory)
    return directory, load_file(directory / "model.safetensors")


def rewrite(directory, tensors):
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, directory / "model.safetensors")


def test_missing_extra_and_bent_tensors_are_named(broken):
    directory, tensors = broken
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(directory, {k: v for k, v in tensors.items() if k != name})
    with pytest.raises(ValueError, match=f"lacks {name}"):
        load_model(directory)
    rewrite(directory, {**tensors, "model.layers.9.mlp.up_proj.weight": tensors[name]})
    with pytest.raises(ValueError, match=r"holds model.layers.9.mlp.up_proj.weight"):
        load_model(directory)
    rewrite(directory, {**tensors, name: tensors[name][1:]})
    with pytest.raises(ValueError, match=rf"{name} is \(111, 64\), config.json makes it \(112, 64\)"):
        load_model(directory)
    rewrite(directory, {**tensors, name: tensors[name].to(torch.int8)})
    with pytest.raises(ValueError, match=f"{name} is stored as torch.int8"):
        load_model(directory)


def test_a_tied_config_with_another_head_is_not_obeyed_in_silence(broken):
    directory, tensors = broken
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(ValueError, match="set tie_word_embeddings to false"):
        load_model(directory)
    rewrite(directory, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]})
    assert load_model(directory)[0].lm_head is None


def test_truncated_files_are_refused(broken):
    directory, _ = broken
    content = (directory / "model.safetensors").read_bytes()
    for length in (len(content) - 1, 40, 0):
        (directory / "model.safetensors").write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"model.safetensors is truncated or damaged"):
            load_model(directory)


def test_broken_bins_are_refused_and_code_does_not_run(broken, tmp_path):
    directory, tensors = broken
    (directory / "model.safetensors").unlink()
    path = directory / "pytorch_model.bin"
    torch.save(tensors, path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"pytorch_model.bin is truncated"):
        load_model(directory)

    class Planted:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({**tensors, "planted": Planted()}, path)
    with pytest.raises(ValueError, match="code in it is never run"):
        load_model(directory)
    path.write_bytes(pickle.dumps({"planted": Planted()}))
    with pytest.raises(ValueError, match=r"pytorch_model.bin"):
        load_model(directory)
    assert not (tmp_path / "ran").exists()


def test_indexes_that_lie_are_refused(broken):
    directory, tensors = broken
    index = directory / "model.safetensors.index.json"
    right = dict.fromkeys(tensors, "model.safetensors")
    name = "model.norm.weight"
    for wrong, message in [
        ({**right, name: "model-2.safetensors"}, "model-2.safetensors is missing"),
        ({**right, "model.other.weight": "model.safetensors"}, "does not hold model.other.weight"),
        ({**right, name: "../model.safetensors"}, "not a file name in its own directory"),
    ]:
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(ValueError, match=message):
            load_model(directory)
    index.write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        load_model(directory)


def test_reader_knows_shapes_from_headers(broken):
    directory, tensors = broken
    reader = CheckpointReader(directory)
    assert reader.names() == sorted(tensors)
    assert all(reader.shape(name) == tuple(tensor.shape) for name, tensor in tensors.items())
