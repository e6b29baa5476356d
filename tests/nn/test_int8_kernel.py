"""The kernel in Triton's interpreter, which does as a GPU would, on the CPU."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from k2mini.nn.int8_kernel import takes_kernel
from tests.conftest import ROOT

CODE = """
import torch
from k2mini.nn.int8_kernel import int8_rows
from k2mini.nn.quant import quantize_rows
torch.manual_seed(0)
# bfloat16 is not among them: the interpreter has none.
for shape, out, dtype, bound in [
    ((1, 192), 256, torch.float32, 1e-6),
    ((3, 1, 130), 100, torch.float32, 1e-6),
    ((2, 8, 512), 64, torch.float16, 1e-3),
    ((33, 64), 70, torch.float16, 1e-3),
    ((64, 200), 96, torch.float32, 1e-6),
]:
    x = torch.randn(shape).to(dtype)
    weight, scale = quantize_rows(torch.randn(out, shape[-1]))
    found, exact = int8_rows(x, weight, scale), x.double() @ (weight.double() * scale.double()[:, None]).T
    assert (found.dtype, found.shape) == (dtype, exact.shape)
    assert (found - exact).abs().max() <= bound * exact.abs().max(), (shape, dtype)
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="triton, which comes with PyTorch for CUDA, is not installed")
def test_products_equal_those_in_float64():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_cpu_and_training_take_other_products():
    assert not takes_kernel(torch.zeros(1, 8))
    x = torch.zeros(1, 8, device="meta")
    assert not takes_kernel(x)
