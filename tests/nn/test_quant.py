"""Quantised weights against plain ones, and int8 on the real model against its own precision."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from k2mini.build import load_model
from k2mini.config import LoraSection
from k2mini.cpu import MULTIPLIES_INT8
from k2mini.nn import nf4
from k2mini.nn.layers import Linear
from k2mini.nn.lora import LoraLinear, attach, init_adapters, lora_modules
from k2mini.nn.quant import (
    KINDS,
    dequantize,
    parts_of,
    product_of_digits,
    quantize_rows,
    quantized_product,
    takes_digits,
)
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
def test_product_and_its_gradient_are_those_of_the_dequantised_weight(monkeypatch, how, width, dtype):
    layer = quantised_linear(how, weight(8, width))
    x = weight(4, width, seed=1).to(dtype).requires_grad_()
    plain = plain_weight(layer, dtype)
    out = layer(x)
    assert out.dtype == dtype
    (gradient,) = torch.autograd.grad(out.sum() * 3, x)
    (expected,) = torch.autograd.grad(F.linear(x, plain).sum() * 3, x)
    torch.testing.assert_close(out, F.linear(x, plain))
    torch.testing.assert_close(gradient, expected)
    monkeypatch.setattr("k2mini.nn.quant.MULTIPLIES_INT8", False)
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
    with pytest.raises(ValueError, match="quantize must be int8 or nf4, not 'int4'"):
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


exact = pytest.mark.skipif(not MULTIPLIES_INT8, reason="products of int8 overflow, or are slow, on this processor")


def most_off(x, weight):
    """What rounding each value by its row's largest / 64,516 can change of x W^T, and float32's own rounding."""
    largest = x.double().abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
    return largest * weight.abs().sum(dim=1) * (1 / 64516 + 1e-6)


@exact
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_of_digits(dtype):
    """Rows of all sizes, one of zeros, one of denormal numbers, beside the product in float64; and each row alone."""
    quantised, scale = quantize_rows(weight(301, 577))
    sizes = torch.tensor([1, 50, 1e-3, 0, 1e-40, 1e3])[:, None]
    x = (weight(6, 577, seed=1).clamp(-1, 1) * sizes).to(dtype)
    with torch.no_grad():
        assert takes_digits(x)
        found = quantized_product(x.view(2, 3, 577), quantised, scale).view(6, 301)
        whole = dequantize(quantised, scale.double(), torch.float64)
        precise, off = x.double() @ whole.T, most_off(x, whole)
        rounding = torch.finfo(dtype).eps * precise.abs() + torch.finfo(dtype).tiny  # of the result
        assert found.dtype == dtype
        assert ((found.double() - precise).abs() <= off + rounding).all()
        assert (found[3] == 0).all()
        for row, whole in zip(x, found, strict=True):
            assert torch.equal(quantized_product(row, quantised, scale), whole)


@exact
def test_the_largest_sums_of_digits_do_not_overflow():
    """Every product is 127 x 127, over LLaMA-65B's widest matrix."""
    ones = torch.ones(3, 22016)
    with torch.no_grad():
        found = product_of_digits(ones, ones.to(torch.int8) * 127, torch.ones(3))
    assert (found == 127 * 22016).all()


@exact
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_digits_of_what_is_not_finite_are_not_finite(bad):
    x = weight(2, 64)
    x[0, 5] = bad
    with torch.no_grad():
        found = product_of_digits(x, *quantize_rows(weight(8, 64, seed=1)))
    assert not found[0].isfinite().any()
    assert found[1].isfinite().all()


@exact
@pytest.mark.parametrize("rows", [1, 4, 5, 8])
def test_a_compiler_sees_one_product_of_few_rows(rows):
    """Up to four rows stay in float32, of more it is digits; one graph either way."""
    quantised, scale = quantize_rows(weight(30, 64))
    x = weight(rows, 64, seed=1)
    torch._dynamo.reset()
    compiled = torch.compile(quantized_product, backend="aot_eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        whole = dequantize(quantised, scale.double(), torch.float64)
        error = (compiled(x, quantised, scale).double() - x.double() @ whole.T).abs()
        assert (error <= most_off(x, whole)).all()
        assert (error.max() < 1e-5) == (rows <= 4)


@exact
def test_many_rows_are_dequantised():
    quantised, scale = quantize_rows(weight(30, 64))
    x = weight(257, 64, seed=1)
    with torch.no_grad():
        assert takes_digits(x[:256])
        expected = F.linear(x, dequantize(quantised, scale, torch.float32))
        torch.testing.assert_close(quantized_product(x, quantised, scale), expected)


@exact
def test_only_what_a_processor_multiplies_right_is_digits():
    """Not with a gradient, nor in float64; nor where oneDNN is kept from VNNI: it would add up in 16 bits."""
    x = weight(2, 64)
    assert not takes_digits(x)
    with torch.no_grad():
        assert not takes_digits(x.double())
        assert not takes_digits(x[:0])
        assert not takes_digits(x[:, :1])
    code = "from k2mini.cpu import MULTIPLIES_INT8; print(MULTIPLIES_INT8)"
    for limit, expected in (("AVX2", "False\n"), ("default", "True\n")):
        limited = {**os.environ, "ONEDNN_MAX_CPU_ISA": limit}
        said = subprocess.run([sys.executable, "-c", code], env=limited, capture_output=True, text=True, check=True)
        assert said.stdout == expected


def test_real_model_keeps_its_perplexity(real_model, geobench, capsys):
    """On GeoBench's own answers: perplexity rises by 1 % at most; KL and agreement of the likeliest token reported."""
    raw = json.loads(geobench["npee"].read_text())
    texts = [f"{q} {a}" for q, a in zip(raw["qa"]["question"], raw["qa"]["answer"], strict=True)][:12]
    plain, tokenizer = load_model(real_model)
    model, _ = load_model(real_model, quantize="int8", quantize_head=True)
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
