"""Hooks against transformers, against the model itself, and against a naive model."""

import pytest
import torch

from k2mini.audit.hooks import find_points, intervene, point_names, trace
from k2mini.config import LoraSection
from k2mini.inference.compile import compile_decoding
from k2mini.nn.kv_cache import KVCache
from k2mini.nn.lora import attach, init_adapters
from tests.conftest import tiny_config, tiny_llama
from tests.helpers import fill_adapters, quantised
from tests.reference import to_transformers

TOKENS = torch.arange(5, 25).view(2, 10) * 7 % 199


def hooked(model):
    """The attributes that hooks leave on modules."""
    return {key for module in model.modules() for key in ("hook", "attention_override") if key in module.__dict__}


def assert_no_hooks(model):
    assert not hooked(model)
    assert "_hooks" not in model.__dict__


def test_looking_on_changes_no_bit(shape):
    model = tiny_llama(shape)
    with torch.inference_mode():
        before = model(TOKENS)
        with trace(model, ["*"]) as cache:
            assert hooked(model) == {"hook", "attention_override"}
            assert torch.equal(model(TOKENS), before)
        assert list(cache) == point_names(model)
        assert torch.equal(cache["logits"], before)
        assert torch.equal(model(TOKENS), before)
    assert_no_hooks(model)


def test_streams_and_patterns_equal_transformers(shape):
    model = tiny_llama(shape)
    reference = to_transformers(model)
    reference.set_attn_implementation("eager")
    with torch.inference_mode():
        theirs = reference(TOKENS, output_hidden_states=True, output_attentions=True)
        with trace(model, ["*"]) as cache:
            model(TOKENS)
    number = shape.num_layers
    for layer in range(number):
        torch.testing.assert_close(cache[f"layers.{layer}.residual_in"], theirs.hidden_states[layer], atol=1e-5, rtol=0)
        torch.testing.assert_close(
            cache[f"layers.{layer}.attention.pattern"], theirs.attentions[layer], atol=1e-5, rtol=0
        )
    torch.testing.assert_close(cache["final_norm"], theirs.hidden_states[number], atol=1e-5, rtol=0)


@torch.no_grad()
def test_points_are_what_their_names_say(shape):
    model = tiny_llama(shape)
    with trace(model, ["*"]) as c:
        model(TOKENS)
    for layer, block in enumerate(model.model.layers):
        at = {name.removeprefix(f"layers.{layer}."): tensor for name, tensor in c.items()}
        groups = shape.num_heads // shape.num_kv_heads
        v = at["attention.v"].transpose(1, 2).repeat_interleave(groups, 1)
        heads = (at["attention.pattern"] @ v).transpose(1, 2)
        torch.testing.assert_close(heads, at["attention.head_out"], atol=1e-5, rtol=0)
        out = block.self_attn.o_proj(at["attention.head_out"].flatten(2))
        torch.testing.assert_close(out, at["attention.out"])
        torch.testing.assert_close(at["residual_in"] + at["attention.out"], at["residual_mid"])
        hidden = torch.nn.functional.silu(at["mlp.gate"]) * at["mlp.up"]
        torch.testing.assert_close(hidden, at["mlp.hidden"])
        torch.testing.assert_close(at["residual_mid"] + at["mlp.out"], at["residual_out"])


def test_positions_and_the_cache(shape):
    """Single tokens over a cache give what the whole text gives at their places; padded rows theirs."""
    model = tiny_llama(shape)
    with torch.inference_mode():
        with trace(model, ["layers.*"], positions=[-1, 3], device="cpu") as whole:
            model(TOKENS)
        assert whole["layers.0.mlp.out"].shape == (2, 2, shape.dim)
        assert whole["layers.0.attention.pattern"].shape == (2, shape.num_heads, 2, 10)
        cache = KVCache(shape, 2)
        model(TOKENS[:, :9], cache=cache)
        with trace(model, ["layers.*"]) as last:
            model(TOKENS[:, 9:], cache=cache)
    for name, tensor in last.items():
        expected = whole[name][:, :, :1] if name.endswith("pattern") else whole[name][:, :1]
        torch.testing.assert_close(tensor, expected, atol=1e-5, rtol=0)


def test_an_edited_pattern_is_used_and_only_then(shape):
    model = tiny_llama(shape)
    point = "layers.1.attention.pattern"
    with torch.inference_mode():
        before = model(TOKENS)
        with intervene(model, {point: lambda pattern: pattern}):
            torch.testing.assert_close(model(TOKENS), before, atol=1e-5, rtol=0)
        with intervene(model, {point: torch.zeros_like}), trace(model, ["layers.1.attention.*"]) as cache:
            assert not torch.allclose(model(TOKENS), before)
        assert not cache["layers.1.attention.head_out"].any()
        assert not cache[point].any(), "who looks on later sees what was edited"


@pytest.mark.parametrize("kind", ["lora", "int8", "nf4"])
def test_adapters_and_quantised_weights(kind):
    model = tiny_llama(tiny_config(intermediate_dim=128))
    if kind == "lora":
        attach(model, LoraSection(target_modules=["q_proj", "o_proj", "down_proj"]))
        init_adapters(model, 0)
        fill_adapters(model)
        model.eval()
    else:
        quantised(model, kind)
    with torch.inference_mode():
        before = model(TOKENS)
        with trace(model, ["*"]) as cache:
            assert torch.equal(model(TOKENS), before)
        with intervene(model, {"layers.2.residual_out": lambda x: cache["layers.2.residual_out"]}):
            assert torch.equal(model(TOKENS), before)


def test_points_by_pattern():
    model = tiny_llama()
    assert find_points(model, ["layers.*.residual_out"]) == [f"layers.{i}.residual_out" for i in range(3)]
    assert find_points(model, ["layers.-1.mlp.out", "embed"]) == ["embed", "layers.2.mlp.out"]
    for pattern, said in (
        ("layers.1.mlp.gates", "the nearest are layers.1.mlp.gate"),
        ("layers.3.mlp.out", "the model has layers 0 to 2"),
        ("layers.-4.mlp.out", "the model has layers 0 to 2"),
        ("logit", "the nearest are logits"),
    ):
        with pytest.raises(ValueError, match=said):
            find_points(model, [pattern])


def test_what_takes_no_hooks():
    model = tiny_llama(tiny_config(num_layers=1))
    with (
        pytest.raises(ValueError, match=r"layers.0.mlp.out: the edit made \(2, 10\) of \(2, 10, 64\)"),
        torch.inference_mode(),
        intervene(model, {"layers.0.mlp.out": lambda x: x[..., 0]}),
    ):
        model(TOKENS)
    assert_no_hooks(model)
    model.model.layers[0].compile()
    with pytest.raises(ValueError, match="a compiled model takes no hooks"), trace(model, ["embed"]):
        pass


@torch.inference_mode()
def test_compiled_decoding_stands_aside():
    model = tiny_llama(tiny_config(num_layers=1))
    compile_decoding(model)
    compiled = model.model.decode_blocks
    cache = KVCache(model.config, 2, fixed=True)
    with trace(model, ["embed", "logits"]) as seen, trace(model, ["layers.0.mlp.out"]):
        logits = model(TOKENS[:, :1], cache=cache)
    assert torch.equal(seen["logits"], logits)
    assert model.model.decode_blocks is compiled is not None
    assert model.decode_logits is not None
