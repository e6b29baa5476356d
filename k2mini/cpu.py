"""What this machine's processor can do, asked once a process: its instruction sets, and by measurement narrow products.

An instruction set does not say that it pays: Intel's processors with avx512_bf16 but without AMX multiply bfloat16 at
half of float32's rate, AMD's Zen 4 at twice that rate; and without either it is 10 to 100 times slower.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import platform
import re
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)

# Which instructions oneDNN is told to use; if it is not told, all.
LIMITS = {os.environ.get(name, "").upper() for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")}
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
# Whether the processor is Intel's, where PyTorch's own products are as fast as oneDNN's: compiled training keeps them.
MKL = "Intel" in str(getattr(torch.cpu, "get_capabilities", dict[str, str])().get("cpu_name"))
# Whether products of int8 are fast, and right: without VNNI, or where oneDNN is kept from it, they overflow in silence.
MULTIPLIES_INT8 = ONEDNN and getattr(torch.cpu, "_is_vnni_supported", bool)() and {"", "DEFAULT", "ALL"} >= LIMITS
# By PyTorch's names.
SETS = {"avx2": "AVX2", "avx512": "AVX-512", "avx512_bf16": "bf16", "vnni": "VNNI", "amx_tile": "AMX"}
NARROW = (torch.bfloat16, torch.float16, torch.int8)
SIZES = (64, 128, 256)  # of the matrices that are multiplied: the next one takes eight times as long
TIMES, SECONDS = 5, 0.015  # how often, and in how long at most
PAYS = 0.9  # of float32's rate: less is slower, more may be chance


def instruction_sets() -> list[str]:
    """Those of SETS that the processor has, as PyTorch found them."""
    return [label for name, label in SETS.items() if getattr(torch.cpu, f"_is_{name}_supported", bool)()]


@functools.cache
def rate(dtype: torch.dtype) -> float:
    """The rate of products in one of NARROW, as a multiple of float32's, on one thread: several may wait for others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for size in SIZES:
            full, best = torch.ones(size, size, device="cpu"), [math.inf, math.inf]
            for _ in range(TIMES):  # in turns, since others may be at work; the first makes the kernels
                for place, x in enumerate((full, full.to(dtype))):
                    begin = time.perf_counter()
                    _product(x)
                    best[place] = min(best[place], time.perf_counter() - begin)
            if 8 * TIMES * sum(best) > SECONDS:
                break
    finally:
        torch.set_num_threads(threads)
    return best[0] / best[1]


def _product(x: Tensor) -> Tensor:
    if x.dtype == torch.int8:
        return torch._int_mm(x, x)
    if ONEDNN and x.dtype == torch.float32:  # as nn/layers.py
        return torch.ops.mkldnn._linear_pointwise(x, x, None, "none", [], "")
    return F.linear(x, x)


def warn_if_slow(dtype: torch.dtype) -> None:
    """Say where products in a dtype of 16 bits are slower than float32's, and by how much."""
    if (share := rate(dtype)) < PAYS:
        log.warning(
            "%s: on this processor products of many rows (prompts, scores, training) run at %.2f of float32's rate, as "
            "measured; float32 takes twice the memory and is faster",
            _name(dtype),
            share,
        )


def describe() -> str:
    """Name, instruction sets and measured rates, in a line."""
    path = Path("/proc/cpuinfo")  # on Linux PyTorch and Python do not know the name
    info = dict(re.findall(r"^(model name|model)\s*: (.*)$", path.read_text() if path.exists() else "", re.MULTILINE))
    name = info.get("model name") or platform.processor() or platform.machine()
    model = f", model {info['model']}" if "model" in info else ""
    measured = [f"{_name(dtype)} {rate(dtype):.2f}" for dtype in NARROW]
    digits = "; int8 weights are multiplied as int8" if MULTIPLIES_INT8 else ""
    sets = ", ".join(instruction_sets()) or f"none of {', '.join(SETS.values())}"
    return f"{name}{model} ({sets}); products, float32's rate being 1: {', '.join(measured)}{digits}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
