"""Quantised weights against plain ones, and int8 on the real model against its own precision."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from k2mini.build import load_model
from k2mini.config import LoraSection
from k2mini.nn import nf4
from k2mini.nn.kv_cache import KVCache
from k2mini.nn.layers import Linear
from k2mini.nn.lora import LoraLinear, attach, init_adapters, lora_modules
from k2mini.nn.quant import KINDS, dequantize, parts_of, quantize_rows
from tests.helpers import TOKENS

both = pytest.mark.parametrize("how", ["int8", "nf4"])


def weight(rows=6, columns=128, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def quantised_linear(how, values):
    layer = KINDS[how](Linear(values.shape[1], values.shape[0]))
    parts = quantize_rows(values) if how == "int8" else nf4.quantize(values)
    for part, given in zip(parts_of(layer), parts, strict=True):
        part.data.copy_(given)
    return layer


def plain_weight(layer, dtype=torch.float32):
    how = dequantize if layer.how == "int8" else nf4.dequantize
    return how(*parts_of(layer), dtype).view(layer.out_features, layer.in_features)


def test_rounding_is_at_most_half_a_step():
    values = torch.cat([weight() * torch.logspace(-4, 4, 6)[:, None], torch.zeros(1, 128)])
    quantised, scale = quantize_rows(values)
    assert quantised.dtype == torch.int8
    assert quantised.abs().amax(dim=1).tolist() == [127] * 6 + [0]
    error = (dequantize(quantised, scale, torch.float32) - values).abs()
    assert (error <= scale[:, None] * 0.5001).all()
    with pytest.raises(ValueError, match="is not finite"):
        quantize_rows(torch.tensor([[1.0, math.inf]]))


@pytest.mark.parametrize(("how", "width"), [("int8", 130), ("nf4", 128), ("nf4", 344)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_product_and_its_gradient_are_those_of_the_dequantised_weight(how, width, dtype):
    layer = quantised_linear(how, weight(8, width))
    x = weight(4, width, seed=1).to(dtype).requires_grad_()
    plain = plain_weight(layer, dtype)
    out = layer(x)
    assert out.dtype == dtype
    (gradient,) = torch.autograd.grad(out.sum() * 3, x)
    (expected,) = torch.autograd.grad(F.linear(x, plain).sum() * 3, x)
    torch.testing.assert_close(out, F.linear(x, plain))
    torch.testing.assert_close(gradient, expected)
    with torch.no_grad():
        assert torch.equal(layer(x), out)
    assert not any(parameter.requires_grad for parameter in layer.parameters())


@both
def test_lora_over_quantised_weights_is_lora_over_the_dequantised_ones(how):
    base = quantised_linear(how, weight())
    plain = Linear(128, 6)
    plain.weight.data.copy_(plain_weight(base))
    layers = [LoraLinear(layer, LoraSection(rank=2, dropout=0.0)) for layer in (base, plain)]
    for layer in layers:
        layer.lora_A.data.copy_(weight(2, seed=2))
        layer.lora_B.data.copy_(weight(6, 2, seed=3))
    x = weight(4, seed=1)
    first, second = (layer(x) for layer in layers)
    assert torch.equal(first, second)
    first.square().sum().backward()
    second.square().sum().backward()
    assert torch.equal(layers[0].lora_A.grad, layers[1].lora_A.grad)
    assert torch.equal(layers[0].lora_B.grad, layers[1].lora_B.grad)
    assert layers[0].lora_A.dtype == torch.float32


def test_a_model_is_quantised_as_it_is_loaded(tiny_directory):
    plain, _ = load_model(tiny_directory)
    model, _ = load_model(tiny_directory, quantize="int8")
    names = dict(model.named_parameters())
    assert {name for name, p in names.items() if p.dtype == torch.int8} == {
        f"model.layers.{layer}.{part}_proj.weight"
        for layer in range(3)
        for part in [f"self_attn.{x}" for x in "qkvo"] + [f"mlp.{x}" for x in ("gate", "up", "down")]
    }
    assert torch.equal(names["lm_head.weight"], plain.lm_head.weight)
    with torch.no_grad():
        error = (model(TOKENS) - plain(TOKENS)).std() / plain(TOKENS).std()
    assert 1e-4 < error < 0.05
    with pytest.raises(ValueError, match="quantize must be int8 or w8a8"):
        load_model(tiny_directory, quantize="int4")


@both
def test_adapters_train_over_a_quantised_model(wide_directory, how):
    model, _ = load_model(wide_directory, quantize=how)
    attach(model, LoraSection(target_modules=["q_proj", "down_proj"]))
    init_adapters(model, 0)
    model.loss(TOKENS[:, :-1], None, TOKENS[:, 1:]).backward()
    assert all(module.lora_B.grad.abs().sum() > 0 for module in lora_modules(model).values())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{name}.{kind}" for name in lora_modules(model) for kind in ("lora_A", "lora_B")
    }


def test_real_model_keeps_its_perplexity(real_model, geobench, capsys):
    """On GeoBench's own answers: perplexity rises by 1 % at most; KL and agreement of the likeliest token reported."""
    raw = json.loads(geobench["npee"].read_text())
    texts = [f"{q} {a}" for q, a in zip(raw["qa"]["question"], raw["qa"]["answer"], strict=True)][:12]
    plain, tokenizer = load_model(real_model)
    model, _ = load_model(real_model, quantize="int8")
    losses, divergence, agreeing, count = torch.zeros(2), 0.0, 0, 0
    with torch.no_grad():
        for text in texts:
            tokens = torch.tensor([tokenizer.encode(text, bos=True, eos=False)[:256]])
            first, second = (m(tokens[:, :-1])[0].log_softmax(-1) for m in (plain, model))
            picked = tokens[0, 1:, None]
            losses -= torch.stack([first.gather(1, picked).sum(), second.gather(1, picked).sum()])
            divergence += F.kl_div(second, first, reduction="sum", log_target=True).item()
            agreeing += int((first.argmax(-1) == second.argmax(-1)).sum())
            count += len(picked)
    before, after = (losses / count).exp().tolist()
    with capsys.disabled():
        print(
            f"\nint8 on {count} tokens: perplexity {before:.3f} -> {after:.3f}, mean KL {divergence / count:.5f} nats, "
            f"the same likeliest token {100 * agreeing / count:.1f} %"
        )
    assert count > 500
    assert after <= 1.01 * before


@pytest.mark.slow
def test_real_model_with_quantised_activations(real_model, geobench, capsys):
    """W8A8 quantises single rows only, so the text goes through a token at a time; beside weight-only on the same."""
    raw = json.loads(geobench["npee"].read_text())
    texts = [f"{q} {a}" for q, a in zip(raw["qa"]["question"], raw["qa"]["answer"], strict=True)][:12]
    models = {None: load_model(real_model), "int8": load_model(real_model, quantize="int8")}
    models["w8a8"] = load_model(real_model, quantize="w8a8")
    models["w8a8, head"] = load_model(real_model, quantize="w8a8", quantize_head=True)
    found = {}
    for name, (model, tokenizer) in models.items():
        loss, count = 0.0, 0
        with torch.inference_mode():
            for text in texts:
                tokens = torch.tensor([tokenizer.encode(text, bos=True, eos=False)[:256]])
                cache = KVCache(model.config, 1)
                logits = torch.cat([model(tokens[:, i : i + 1], cache=cache)[:, 0] for i in range(tokens.shape[1] - 1)])
                loss += F.cross_entropy(logits, tokens[0, 1:], reduction="sum").item()
                count += tokens.shape[1] - 1
        found[name] = math.exp(loss / count)
    with capsys.disabled():
        print("\nperplexity, a token at a time:", {name: round(value, 3) for name, value in found.items()})
    assert found["int8"] <= 1.01 * found[None]
    assert found["w8a8"] <= 1.1 * found[None]
