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
from k2mini.nn import nf4
from k2mini.nn.int8_kernel import int8_rows
from k2mini.nn.nf4_kernel import nf4_rows
from k2mini.nn.quant import dequantize, quantize_rows
HOW = {"int8": (quantize_rows, int8_rows, dequantize, 1e-3), "nf4": (nf4.quantize, nf4_rows, nf4.dequantize, 2e-3)}
torch.manual_seed(0)
quantize, rows, plain, half = HOW[how]
odd = (130, 200) if how == "int8" else (128, 256)  # NF4 has no odd rows
# bfloat16 is not among them: the interpreter has none.
for shape, out, dtype, bound in [
    ((1, 192), 256, torch.float32, 1e-6),
    ((3, 1, odd[0]), 100, torch.float32, 1e-6),
    ((2, 8, 512), 64, torch.float16, half),
    ((33, 64), 70, torch.float16, half),
    ((64, odd[1]), 96, torch.float32, 1e-6),
]:
    x = torch.randn(shape).to(dtype)
    parts = quantize(torch.randn(out, shape[-1]))
    found, exact = rows(x, *parts), x.double() @ plain(*parts, torch.float64).T
    assert (found.dtype, found.shape) == (dtype, exact.shape)
    assert (found - exact).abs().max() <= bound * exact.abs().max(), (shape, dtype)
"""


@pytest.mark.parametrize("how", ["int8", "nf4"])
@pytest.mark.skipif(find_spec("triton") is None, reason="triton, which comes with PyTorch for CUDA, is not installed")
def test_products_equal_those_in_float64(how):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", f"how = {how!r}\n{CODE}"], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_cpu_and_training_take_other_products():
    assert not takes_kernel(torch.zeros(1, 8))
    x = torch.zeros(1, 8, device="meta")
    assert not takes_kernel(x)
