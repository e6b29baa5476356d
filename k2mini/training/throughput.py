"""What people throughput beside the loss: tokens a second, how much of the device's arithmetic is used, memory."""

from __future__ import annotations

import resource
import sys
import time

import torch

from k2mini.distributed import World
from k2mini.nn.llama import Llama

# Dense bf16 rates of makers' data sheets, in FLOP/s; what is not here is measured.
PEAKS = {"V100": 125e12, "A100": 312e12, "H100": 989e12, "RTX 3090": 71e12, "RTX 4090": 165e12}


class Throughput:
    """Numbers for the progress line of one rank's device.

    MFU (Chowdhery et al. 2022, arXiv 2204.02311, appendix B) is the arithmetic that the tokens need, without what is
    recomputed, over what the devices could do: 6 FLOP a trained parameter and 4 a frozen one, attention left out.
    """

    def __init__(self, model: Llama, world: World) -> None:
        embedding = model.model.embed_tokens.weight
        self._flops_per_token = sum(
            (6 if parameter.requires_grad else 4) * parameter.numel()
            for parameter in model.parameters()
            if parameter is not embedding or model.lm_head is None
        )
        self._device = world.device
        self._peak = world.size * peak_flops(world.device, model.dtype)

    def line(self, rate: float) -> str:
        """For a rate in tokens a second over all ranks."""
        mfu = 100 * rate * self._flops_per_token / self._peak
        return f"{rate:,.0f} tokens/s, MFU {mfu:.0f} %, {memory_used(self._device) / 2**30:.1f} GiB"


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of matrix products: from the data sheet for known GPUs, else measured on one product."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, peak in PEAKS.items():
            if known in name:
                return peak
    size = 512 if device.type == "cpu" else 4096
    # bf16 products are slow on many CPUs; what counts there is what fp32 could do.
    dtype = torch.float32 if device.type == "cpu" else dtype
    a = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def memory_used(device: torch.device) -> int:
    """The most bytes used so far: of the GPU by tensors, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
