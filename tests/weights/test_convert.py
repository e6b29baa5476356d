"""Layouts: there and back without losing a bit, and right by themselves."""

import json

import pytest
import torch
import torch.nn.functional as F

from k2mini.architectures import LinearRopeScaling, Llama3RopeScaling
from k2mini.build import load_model
from k2mini.model_config import tensor_shapes
from k2mini.nn.quant import dequantize, int8_matrices, quantize_rows
from k2mini.weights.convert import convert, open_layout
from k2mini.weights.info import inspect_directory, memory
from k2mini.weights.model_directory import ModelDirectory
from k2mini.weights.model_files import save_model
from k2mini.weights.stream import hash_tensors
from tests.conftest import SHAPES, tiny_config, tiny_llama

KIN = ("mistral", "qwen2", "qwen3")
TO_META = {name: shape for name, shape in SHAPES.items() if name not in ("llama3-rope", "wide-heads", *KIN)}
TO_META["llama3.1-rope"] = {"rope_theta": 5e5, "rope_scaling": Llama3RopeScaling(8.0, 1.0, 4.0, 8192)}


def saved(folder, tokenizer, shape, dtype=torch.float16):
    config = tiny_config(vocab_size=tokenizer.vocab_size, **shape)
    model = tiny_llama(config, dtype=dtype)
    save_model(model.state_dict(), config, folder, tokenizer=tokenizer)
    return model


def assert_equal(one, other):
    """Bit for bit, whatever the order in the files."""
    a, b = (hash_tensors(open_layout(ModelDirectory(directory))[0]) for directory in (one, other))
    assert a == b
    for name in ("config.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def naive_meta_logits(directory, tokens):
    """LLaMA as Meta's model.py has it, from Meta's files alone: interleaved complex rotary. (T,) -> (T, V), fp32."""
    w = {k: v.float() for k, v in torch.load(directory / "consolidated.00.pth", weights_only=True).items()}
    p = json.loads((directory / "params.json").read_text())
    heads, kv_heads = p["n_heads"], p.get("n_kv_heads", p["n_heads"])
    width, length = p["dim"] // heads, len(tokens)
    frequencies = 1.0 / p.get("rope_theta", 10000.0) ** (torch.arange(0, width, 2).double() / width)
    if p.get("use_scaled_rope"):
        for i, f in enumerate(frequencies.tolist()):
            wavelength = 2 * torch.pi / f
            smooth = min(max((8192 / wavelength - 1) / (4 - 1), 0), 1)
            frequencies[i] = (1 - smooth) * f / 8 + smooth * f
    turns = torch.polar(torch.ones(length, width // 2).double(), torch.outer(torch.arange(length), frequencies))

    def norm(x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + p["norm_eps"]) * weight

    def turned(x):  # (T, heads, E)
        pairs = torch.view_as_complex(x.double().reshape(length, x.shape[1], -1, 2))
        return torch.view_as_real(pairs * turns[:, None]).flatten(2).float()

    x = F.embedding(tokens, w["tok_embeddings.weight"])
    for n in range(p["n_layers"]):
        block = {name: w[f"layers.{n}.{name}.weight"] for name in (
            "attention.wq", "attention.wk", "attention.wv", "attention.wo", "attention_norm", "ffn_norm",
            "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")}  # fmt: skip
        h = norm(x, block["attention_norm"])
        q = turned((h @ block["attention.wq"].T).view(length, heads, width)).transpose(0, 1)
        k = turned((h @ block["attention.wk"].T).view(length, kv_heads, width)).transpose(0, 1)
        v = (h @ block["attention.wv"].T).view(length, kv_heads, width).transpose(0, 1)
        k, v = (t.repeat_interleave(heads // kv_heads, 0) for t in (k, v))
        scores = (q @ k.transpose(1, 2) / width**0.5).masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        x = x + (scores.softmax(-1) @ v).transpose(0, 1).reshape(length, -1) @ block["attention.wo"].T
        h = norm(x, block["ffn_norm"])
        x = x + (F.silu(h @ block["feed_forward.w1"].T) * (h @ block["feed_forward.w3"].T)) @ block["feed_forward.w2"].T
    # Meta's code computes intermediate_dim and would refuse weights of another one.
    hidden = int(p.get("ffn_dim_multiplier", 1) * int(2 * 4 * p["dim"] / 3))
    assert -(-hidden // p["multiple_of"]) * p["multiple_of"] == w["layers.0.feed_forward.w1.weight"].shape[0]
    return norm(x, w["norm.weight"]) @ w["output.weight"].T


@pytest.mark.parametrize("shape", TO_META.values(), ids=TO_META)
def test_to_meta_and_back(tmp_path, tiny_tokenizer, shape):
    model = saved(tmp_path / "hf", tiny_tokenizer, shape)
    convert(tmp_path / "hf", "meta", tmp_path / "meta")
    tokens = torch.arange(3, 40)
    logits = model.float()(tokens[None])[0]
    assert torch.allclose(naive_meta_logits(tmp_path / "meta", tokens), logits, atol=1e-4)
    convert(tmp_path / "meta", "hf", tmp_path / "again")
    assert_equal(tmp_path / "again", tmp_path / "hf")


@pytest.mark.parametrize("embedding", [0, 1])
def test_several_model_parallel_files(tmp_path, tiny_tokenizer, embedding, caplog):
    """As Meta splits 13B and more: LLaMA 2 its embedding by columns, LLaMA 3 by rows. params.json alone is there."""
    saved(tmp_path / "hf", tiny_tokenizer, {"num_kv_heads": 2, "max_seq_len": 2048})
    convert(tmp_path / "hf", "meta", tmp_path / "meta")
    whole = torch.load(tmp_path / "meta" / "consolidated.00.pth", weights_only=True)
    (tmp_path / "split").mkdir()
    for rank in range(2):
        part = {"rope.freqs": torch.ones(8)}
        for name, tensor in whole.items():
            along = 1 if name.endswith(("wo.weight", "w2.weight")) else 0
            along = embedding if name.startswith("tok_") else along
            part[name] = tensor if tensor.dim() == 1 else tensor.chunk(2, along)[rank].clone()
        torch.save(part, tmp_path / "split" / f"consolidated.{rank:02}.pth")
    params = (tmp_path / "meta" / "params.json").read_text()
    (tmp_path / "split" / "params.json").write_text(params)
    (tmp_path / "tokenizer.model").write_bytes(tiny_tokenizer.path.read_bytes())  # where Meta's download puts it
    convert(tmp_path / "split", "hf", tmp_path / "again")
    assert "does not say how long the context is; config.json will say 2048" in caplog.text
    assert_equal(tmp_path / "again", tmp_path / "hf")
    (tmp_path / "split" / "params.json").write_text(json.dumps({**json.loads(params), "sliding_window": 4096}))
    with pytest.raises(ValueError, match=r"params\.json: sliding_window is of Mistral's own layout"):
        convert(tmp_path / "split", "hf", tmp_path / "other")
    (tmp_path / "split" / "consolidated.00.pth").unlink()
    with pytest.raises(ValueError, match="are not numbered 00, 01, …; one is missing"):
        convert(tmp_path / "split", "hf", tmp_path / "other")


@pytest.mark.parametrize(
    ("shard_bytes", "name"), [(10**9, "multi-head"), (60_000, "multi-head"), *((10**9, name) for name in KIN)]
)
def test_to_bin_and_back(tmp_path, tiny_tokenizer, shard_bytes, name):
    from transformers import AutoModelForCausalLM

    model = saved(tmp_path / "hf", tiny_tokenizer, SHAPES[name])
    convert(tmp_path / "hf", "bin", tmp_path / "bin", shard_bytes=shard_bytes)
    files = sorted(path.name for path in (tmp_path / "bin").glob("*.bin"))
    assert files[0] == ("pytorch_model.bin" if shard_bytes == 10**9 else f"pytorch_model-00001-of-{len(files):05}.bin")
    for file in files:
        for mmap in (False, True):
            for name, tensor in torch.load(tmp_path / "bin" / file, weights_only=True, mmap=mmap).items():
                assert torch.equal(tensor, model.state_dict()[name])
                assert not mmap or tensor.data_ptr() % 64 == 0
    if len(files) == 1:
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "bin", use_safetensors=False, dtype=torch.float16)
        assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in model.state_dict().items())
    convert(tmp_path / "bin", "hf", tmp_path / "again")
    assert_equal(tmp_path / "again", tmp_path / "hf")


def test_dtypes(tmp_path, tiny_tokenizer):
    model = saved(tmp_path / "hf", tiny_tokenizer, {}, torch.float32)
    convert(tmp_path / "hf", "hf", tmp_path / "half", dtype=torch.bfloat16)
    half, _ = load_model(tmp_path / "half", dtype="bfloat16")
    assert all(torch.equal(t, model.state_dict()[n].bfloat16()) for n, t in half.state_dict().items())
    model.model.norm.weight.data[3] = 1e6
    save_model(model.state_dict(), model.config, tmp_path / "large")
    with pytest.raises(ValueError, match=r"model.norm.weight: 1 values are too large for float16"):
        convert(tmp_path / "large", "hf", tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()


GGUF_SHAPES = {name: SHAPES[name] for name in ("multi-head", "grouped", "tied", "llama3-rope", *KIN)}
GGUF_SHAPES["linear-rope"] = {"rope_scaling": LinearRopeScaling(4.0)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", GGUF_SHAPES.values(), ids=GGUF_SHAPES)
def test_gguf_read_back(tmp_path, tiny_tokenizer, shape, dtype, caplog):
    """Through the gguf package: values, the order of q's and k's rows, metadata and the vocabulary."""
    import gguf

    model = saved(tmp_path / "hf", tiny_tokenizer, shape, torch.float32)
    convert(tmp_path / "hf", "gguf", tmp_path / "model.gguf", dtype=dtype)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    stored = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    config, weights = model.config, model.state_dict()
    scaled, kind = isinstance(config.rope_scaling, Llama3RopeScaling), config.model_type
    assert len(stored) == len(weights) + scaled
    assert torch.equal(stored["blk.1.ffn_down.weight"], weights["model.layers.1.mlp.down_proj.weight"].to(dtype))
    assert torch.equal(stored["blk.2.attn_norm.weight"], weights["model.layers.2.input_layernorm.weight"])
    for name, part in (("attn_q", "q_proj.bias"), ("attn_k", "k_proj.bias"), ("attn_v", "v_proj.bias")):
        assert (f"blk.1.{name}.bias" in stored) == (kind == "qwen2")
        if kind == "qwen2":
            assert torch.equal(stored[f"blk.1.{name}.bias"], weights[f"model.layers.1.self_attn.{part}"])
    for part in ("q_norm.weight", "k_norm.weight") if kind == "qwen3" else ():
        assert torch.equal(stored[f"blk.1.attn_{part}"], weights[f"model.layers.1.self_attn.{part}"])
    # llama.cpp turns neighbouring rows: rows 2i and 2i+1 of a head there are rows i and i + E/2 here. But for Qwen.
    for name, heads, ours in (("attn_q", config.num_heads, "q_proj"), ("attn_k", config.num_kv_heads, "k_proj")):
        theirs, mine = stored[f"blk.0.{name}.weight"], weights[f"model.layers.0.self_attn.{ours}.weight"].to(dtype)
        half = config.head_dim // 2
        if kind.startswith("qwen"):
            assert torch.equal(theirs, mine)
            continue
        for head in range(heads):
            for i in range(half):
                row = head * config.head_dim
                assert torch.equal(theirs[row + 2 * i], mine[row + i])
                assert torch.equal(theirs[row + 2 * i + 1], mine[row + half + i])

    def field(name):
        return reader.get_field(name).contents()

    arch = kind if kind.startswith("qwen") else "llama"
    assert field("general.architecture") == arch
    assert field(f"{arch}.attention.head_count_kv") == config.num_kv_heads
    assert field(f"{arch}.rope.freq_base") == config.rope_theta
    if isinstance(config.rope_scaling, LinearRopeScaling):
        assert (field(f"{arch}.rope.scaling.type"), field(f"{arch}.rope.scaling.factor")) == (
            "linear", config.rope_scaling.factor
        )  # fmt: skip
    if config.sliding_window:
        assert field("llama.attention.sliding_window") == config.sliding_window
    assert ("has no sliding window for this model: past 4 tokens" in caplog.text) == bool(config.sliding_window)
    assert field("tokenizer.ggml.tokens") == [tiny_tokenizer.piece(i) for i in range(tiny_tokenizer.vocab_size)]
    assert field("tokenizer.ggml.eos_token_id") == tiny_tokenizer.eos_id
    kinds = field("tokenizer.ggml.token_type")
    assert (kinds[tiny_tokenizer.bos_id], kinds[tiny_tokenizer.unk_id]) == (3, 2)
    assert kinds.count(6) == 256
    if scaled:
        assert stored["rope_freqs.weight"].shape == (config.head_dim // 2,)
        assert stored["rope_freqs.weight"].max() == pytest.approx(config.rope_scaling.factor)
    with pytest.raises(ValueError, match="exists already"):
        convert(tmp_path / "hf", "gguf", tmp_path / "model.gguf")


def test_what_a_format_cannot_say(tmp_path, tiny_tokenizer):
    saved(tmp_path / "wide", tiny_tokenizer, SHAPES["wide-heads"])
    saved(tmp_path / "scaled", tiny_tokenizer, SHAPES["llama3-rope"])
    saved(tmp_path / "linear", tiny_tokenizer, GGUF_SHAPES["linear-rope"])
    said_of = {"wide": "no head_dim of its own", "scaled": "LLaMA 3.1's rotary scaling only"}
    said_of["linear"] = said_of["scaled"]
    for name in KIN:
        saved(tmp_path / name, tiny_tokenizer, SHAPES[name])
        said_of[name] = "Meta's format has no biases, norms of q and k, or sliding window"
    for name, said in said_of.items():
        with pytest.raises(ValueError, match=said):
            convert(tmp_path / name, "meta", tmp_path / "out")
    saved(tmp_path / "both", tiny_tokenizer, {**SHAPES["llama3-rope"], "attention_bias": True})
    with pytest.raises(ValueError, match=r"llama.cpp's qwen2 has no rotary scaling of type llama3"):
        convert(tmp_path / "both", "gguf", tmp_path / "out.gguf")
    with pytest.raises(ValueError, match="GGUF is written in float32 or float16, not bfloat16"):
        convert(tmp_path / "scaled", "gguf", tmp_path / "out.gguf", dtype=torch.bfloat16)
    for kind in ("gguf", "meta", "bin"):
        with pytest.raises(ValueError, match=f"--quantize int8 --to {kind} is not possible"):
            convert(tmp_path / "wide", kind, tmp_path / "out", quantize="int8")
    assert not (tmp_path / "out").exists()
    (tmp_path / "scaled" / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match="GGUF holds the vocabulary too"):
        convert(tmp_path / "scaled", "gguf", tmp_path / "out.gguf")


@pytest.mark.parametrize("name", KIN)
def test_to_int8(tmp_path, tiny_tokenizer, name):
    """Biases and norms stay as they are, matrices are those of `quantize_rows`; so in a file, so as it is loaded."""
    plain = saved(tmp_path / "hf", tiny_tokenizer, SHAPES[name], torch.float32)
    convert(tmp_path / "hf", "hf", tmp_path / "int8", quantize="int8")
    stored, _ = load_model(tmp_path / "int8")
    fresh, _ = load_model(tmp_path / "hf", quantize="int8")
    assert all(torch.equal(tensor, fresh.state_dict()[key]) for key, tensor in stored.state_dict().items())
    for key, tensor in plain.state_dict().items():
        if tensor.dim() == 1:
            assert torch.equal(stored.state_dict()[key], tensor)
        elif key in int8_matrices(tensor_shapes(plain.config)):
            tensor.copy_(dequantize(*quantize_rows(tensor), torch.float32))
    tokens = torch.arange(3, 33).view(2, 15)
    torch.testing.assert_close(stored(tokens), plain(tokens), rtol=0, atol=1e-5)
    with torch.inference_mode():  # where a CPU multiplies int8, rows are rounded to 16 bits
        assert (stored(tokens) - plain(tokens)).std() / plain(tokens).std() < 2e-4


def test_code_in_a_pickle_does_not_run(tmp_path, tiny_tokenizer):
    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    saved(tmp_path / "hf", tiny_tokenizer, {})
    convert(tmp_path / "hf", "meta", tmp_path / "meta")
    torch.save({"tok_embeddings.weight": Evil()}, tmp_path / "meta" / "consolidated.00.pth")
    with pytest.raises(ValueError, match="holds more than tensors; code in it is never run"):
        convert(tmp_path / "meta", "hf", tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_shapes_in_closed_form(shape):
    assert tensor_shapes(shape) == {name: tuple(t.shape) for name, t in tiny_llama(shape).state_dict().items()}


def test_info(tmp_path, shape):
    model = tiny_llama(shape, dtype=torch.bfloat16)
    save_model(model.state_dict(), shape, tmp_path / "model")
    found = inspect_directory(tmp_path / "model")
    assert found["kind"] == "model"
    assert found["parameters"] == shape.num_parameters()
    assert found["dtypes"] == {"bfloat16": shape.num_parameters()}
    assert found["tokenizer"] is None
    int8, _ = load_model(tmp_path / "model", dtype="bfloat16", quantize="int8")
    assert memory(shape)["int8"]["weights"] == sum(p.numel() * p.element_size() for p in int8.parameters())
