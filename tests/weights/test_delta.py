import dataclasses
import json
import signal
import time
from random import Random
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from k2mini.build import load_model
from k2mini.model_config import hf_config
from k2mini.weights.delta import BY_TOKEN, apply_delta, make_delta
from k2mini.weights.model_directory import CheckpointReader
from k2mini.weights.model_files import save_model
from k2mini.weights.verify import verify
from tests.conftest import SHAPES, tiny_config, tiny_llama
from tests.faults.server import Request

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


@pytest.mark.parametrize(
    ("base_dtype", "tuned_dtype", "name"),
    [*((a, b, "multi-head") for a in DTYPES for b in DTYPES)]
    + [(torch.float16, torch.bfloat16, name) for name in ("mistral", "qwen2", "qwen3")],
    ids=str,
)
def test_make_then_apply_gives_back_every_bit(tmp_path, tiny_tokenizer, base_dtype, tuned_dtype, name):
    config = tiny_config(vocab_size=tiny_tokenizer.vocab_size, **SHAPES[name])
    base, tuned = (random_bits(tiny_llama(config, dtype=dtype), i) for i, dtype in enumerate((base_dtype, tuned_dtype)))
    save_model(base, config, tmp_path / "base")
    save_model(tuned, config, tmp_path / "tuned", tokenizer=tiny_tokenizer, shard_bytes=40_000)
    make_delta(tmp_path / "base", tmp_path / "tuned", tmp_path / "delta")
    apply_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "again")
    before, after = bits(tmp_path / "tuned"), bits(tmp_path / "again")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "tuned" / "config.json").read_bytes()
    assert (tmp_path / "again" / "tokenizer.model").read_bytes() == tiny_tokenizer.path.read_bytes()


@pytest.fixture
def trio(tmp_path):
    for name, seed in (("base", 0), ("tuned", 1)):
        model = tiny_llama(seed=seed)
        save_model(model.state_dict(), model.config, tmp_path / name)
    make_delta(tmp_path / "base", tmp_path / "tuned", tmp_path / "delta")
    return tmp_path


def save_bin(model, directory, dtype, shards=1, **side_files):
    """As transformers 4 wrote: `.bin`, in shards with an index or alone, with the rotary frequencies of 2023."""
    directory.mkdir()
    tensors = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    names, files = sorted(tensors), {}
    for number in range(shards):
        file = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{number + 1:05}-of-{shards:05}.bin"
        part = names[number::shards]
        torch.save({name: tensors[name] for name in part}, directory / file)
        files.update(dict.fromkeys(part, file))
    if shards > 1:
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    (directory / "config.json").write_text(json.dumps(hf_config(model.config, "float16", 1, 2)))
    for name, content in side_files.items():
        (directory / f"{name}.model").write_bytes(content)
    return tensors


def grown(model, tokens):
    """The same model with more tokens."""
    config = dataclasses.replace(model.config, vocab_size=model.config.vocab_size + tokens)
    more, state = tiny_llama(config, seed=5), model.state_dict()
    for name in BY_TOKEN:
        more.state_dict()[name][: model.config.vocab_size] = state[name]
    more.load_state_dict({**state, **{name: more.state_dict()[name] for name in BY_TOKEN}})
    return more


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_published_deltas_are_added_as_fastchat_adds(tmp_path, tiny_tokenizer, dtype):
    """Sums in .bin shards without a manifest; the base in other shards and another dtype."""
    config = tiny_config(vocab_size=tiny_tokenizer.vocab_size)
    base, difference = tiny_llama(config), tiny_llama(config, seed=1)
    for tensor in difference.state_dict().values():
        tensor.mul_(0.01 if tensor.dim() > 1 else 0.001)
    a = save_bin(base, tmp_path / "base", dtype, shards=2, tokenizer=tiny_tokenizer.path.read_bytes())
    b = save_bin(difference, tmp_path / "delta", torch.float16, shards=3)
    apply_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "out")
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert set(out) == set(base.state_dict())
    for name, tensor in out.items():
        assert torch.equal(tensor, a[name].half() + b[name].half()), name
    assert load_model(tmp_path / "out")[1] is not None, "K2's delta has no tokenizer: the base's is taken"
    with pytest.raises(ValueError, match="are --base and --delta swapped"):
        apply_delta(tmp_path / "delta", tmp_path / "base", tmp_path / "other")


def test_make_add_counts_what_does_not_come_back(trio):
    lost = make_delta(trio / "base", trio / "tuned", trio / "sums", kind="add")
    apply_delta(trio / "base", trio / "sums", trio / "again")
    tuned, again = load_file(trio / "tuned" / "model.safetensors"), load_file(trio / "again" / "model.safetensors")
    assert lost == sum(int((tuned[n] != again[n].float()).sum()) for n in tuned) > 0
    assert all(torch.allclose(tuned[n], again[n].float(), atol=1e-2) for n in tuned)
    assert verify(trio / "sums")[1] == []


def test_a_vocabulary_that_grew(tmp_path):
    base = tiny_llama()
    tuned = grown(base, 1)
    save_model(base.state_dict(), base.config, tmp_path / "base")
    save_model(tuned.state_dict(), tuned.config, tmp_path / "tuned")
    for kind in ("bits", "add"):
        make_delta(tmp_path / "base", tmp_path / "tuned", tmp_path / kind, kind=kind)
        with pytest.raises(ValueError, match=r"199 rows in .* and 200 in .*: tokens were added; --resize-vocab takes"):
            apply_delta(tmp_path / "base", tmp_path / kind, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        apply_delta(tmp_path / "base", tmp_path / kind, tmp_path / f"{kind}_out", resize_vocab=True)
    for name, bits_ in bits(tmp_path / "tuned").items():
        assert torch.equal(bits_, bits(tmp_path / "bits_out")[name]), name
    added = CheckpointReader(tmp_path / "add_out").tensor("lm_head.weight")
    assert torch.equal(added[199], tuned.lm_head.weight[199].half())
    with pytest.raises(ValueError, match="the base has more tokens"):
        make_delta(tmp_path / "tuned", tmp_path / "base", tmp_path / "out")


def test_another_base_is_refused(trio):
    with pytest.raises(ValueError, match=r"tuned is not the base that .*delta was made against"):
        apply_delta(trio / "tuned", trio / "delta", trio / "out")
    with pytest.raises(ValueError, match="delta is a delta, not a base; are the two swapped"):
        apply_delta(trio / "delta", trio / "base", trio / "out")
    with pytest.raises(ValueError, match="tuned is not a delta: its manifest says that it is of kind 'model'"):
        apply_delta(trio / "base", trio / "tuned", trio / "out")
    with pytest.raises(ValueError, match="is a delta, not a model; k2mini delta apply"):
        load_model(trio / "delta")
    assert not (trio / "out").exists()


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("side", ["base", "delta"])
def test_a_flipped_bit_is_found_and_its_side_named(trio, side):
    path = trio / side / "model.safetensors"
    tensors = load_file(path)
    words = tensors[NAME].view(torch.int32)
    words[3, 4] ^= 1
    save_file(tensors, path)
    with pytest.raises(ValueError, match=rf"{NAME} does not come out as the tuned weights: .*/{side} is damaged there"):
        apply_delta(trio / "base", trio / "delta", trio / "out")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="is truncated or damaged"):
        apply_delta(trio / "base", trio / "delta", trio / "out")
    path.unlink()
    with pytest.raises(ValueError, match="has no weights"):
        apply_delta(trio / "base", trio / "delta", trio / "out")
    assert sorted(path.name for path in trio.iterdir()) == ["base", "delta", "tuned"]


def test_a_tensor_in_another_dtype_than_the_manifest_says(trio):
    """Someone has saved the delta anew, as floating-point numbers."""
    path = trio / "delta" / "model.safetensors"
    save_file({name: tensor.float() if name == NAME else tensor for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ValueError, match=rf"{NAME} is stored as torch.float32, .* so it should be torch.int32; copy"):
        apply_delta(trio / "base", trio / "delta", trio / "out")
    assert not (trio / "out").exists()


def test_models_of_other_shapes_are_refused(trio):
    other = tiny_llama(tiny_config(dim=32))
    save_model(other.state_dict(), other.config, trio / "other")
    with pytest.raises(ValueError, match=r"models of different shapes: by their config.json, dim is 64 and 32"):
        make_delta(trio / "base", trio / "other", trio / "out")


def test_targets_that_are_refused(trio, monkeypatch):
    before = (trio / "tuned" / "model.safetensors").read_bytes()
    for target, said in (
        (trio / "tuned", "exists already"),
        (trio / "base", "is itself an input"),
        (trio / "base" / "deep" / "er", "is inside .*base, which is an input"),
        (trio, "an input, is inside"),
    ):
        for force in (False, True):
            if force and said == "exists already":
                continue
            with pytest.raises(ValueError, match=said):
                apply_delta(trio / "base", trio / "delta", target, force=force)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"would take 0.00 GB, 0.00 GB are free on its disk"):
        apply_delta(trio / "base", trio / "delta", trio / "out")
    assert (trio / "tuned" / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in trio.iterdir()) == ["base", "delta", "tuned"]


def test_force_replaces(trio):
    apply_delta(trio / "base", trio / "delta", trio / "out")
    (trio / "out" / "model.safetensors").write_bytes(b"old")
    apply_delta(trio / "base", trio / "delta", trio / "out", force=True)
    assert verify(trio / "out")[0] == 2
    assert sorted(path.name for path in trio.iterdir()) == ["base", "delta", "out", "tuned"]


@pytest.mark.parametrize("number", [pytest.param(6, id="few"), pytest.param(50, id="many", marks=pytest.mark.slow)])
def test_killed_at_any_moment(trio, number, forks):
    """Over and over a process replaces the target, until it is killed: what stands there, or comes back, is whole."""
    replacing = Request(
        [["delta", "apply", "--base", "base", "--delta", "delta", "--out", "out", "--force"]] * 1000, str(trio)
    )
    apply_delta(trio / "base", trio / "delta", trio / "out")
    random = Random(0)
    for _ in range(number):
        process = forks.start(replacing)
        time.sleep(random.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        load_model(trio / "out")  # puts a killed swap right
        verify(trio / "out")
    apply_delta(trio / "base", trio / "delta", trio / "out", force=True)
    assert sorted(path.name for path in trio.iterdir()) == ["base", "delta", "out", "tuned"]
