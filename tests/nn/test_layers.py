"""The product on a CPU, through whichever library, against PyTorch's own linear."""

import pytest
import torch
import torch.nn.functional as F

from k2mini.nn import layers
from k2mini.nn.layers import product


def tensors(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, 48, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randn(80, 48, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1,), (5,), (2, 7), (1, 1), (0,)], ids=str)
def test_values_and_gradients(shape, dtype):
    x, weight = tensors(*shape, dtype=dtype)
    torch.testing.assert_close(product(x, weight), F.linear(x, weight))
    gradients = []
    for function in (product, F.linear):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
        function(*leaves).square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient(frozen):
    leaves = [tensor.requires_grad_(index != frozen) for index, tensor in enumerate(tensors(4))]
    product(*leaves).sum().backward()
    assert [leaf.grad is None for leaf in leaves] == [index == frozen for index in range(2)]


@pytest.mark.parametrize("rows", [1, 4])
def test_compiled(rows):
    x, weight = tensors(rows, 1)
    with torch.inference_mode():
        torch.testing.assert_close(torch.compile(product, dynamic=False)(x, weight), F.linear(x, weight))


@pytest.mark.parametrize("mkl", [False, True])
def test_compiled_training_takes_the_faster_library(mkl, monkeypatch):
    """oneDNN as uncompiled code does, forward and backward; on Intel's processors PyTorch's own products."""
    from functorch.compile import aot_module_simplified

    graphs, ours = [], torch.ops.k2mini.onednn_product.default

    def keep(graph, _inputs):
        graphs.append({node.target for node in graph.graph.nodes})
        return graph

    monkeypatch.setattr(layers, "MKL", mkl)
    torch._dynamo.reset()
    compiled = torch.compile(
        product, backend=lambda graph, inputs: aot_module_simplified(graph, inputs, keep, bw_compiler=keep)
    )
    results = []
    for function in (compiled, product):
        leaves = [tensor.requires_grad_() for tensor in tensors(5, 3)]
        out = function(*leaves)
        out.square().sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(*results)
    assert [ours in graph for graph in graphs] == [layers.ONEDNN and not mkl] * 2
