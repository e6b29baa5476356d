"""The GPU of a process: which one it is, how PyTorch is to use it, what it can do."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable

import torch

# Dense products of bfloat16 with float32 sums (V100, T4: of float16), in TFLOP/s, as the makers' data sheets have them,
# by the names that cards go by. Where two fit, the first counts.
PEAKS = {
    "GB[23]00": 2500, "B[23]00": 2250, "H200 NVL": 835, "G?H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989,
    "A100": 312, "A40": 150, "A30": 165, "A10G": 70, "A10": 125, "L40S": 362, "L40": 181, "L4": 121, "V100-PCIE": 112,
    "V100": 125, "T4": 65, "RTX 5090": 209, "RTX 4090": 165, "RTX 3090": 71, "RTX 6000 Ada": 364, "RTX A6000": 155,
}  # fmt: skip
# By the names that they are rented under: which of PEAKS, and the memory in GiB that CUDA reports of them.
CARDS = {
    "b200": ("B[23]00", 178), "h200": ("G?H200", 139.5), "h100-80g": ("H100", 79), "a100-80g": ("A100", 79),
    "a100-40g": ("A100", 39), "l40s": ("L40S", 44), "a6000": ("RTX A6000", 47), "a10g": ("A10G", 22), "l4": ("L4", 22),
    "v100-32g": ("V100", 31.5), "v100-16g": ("V100", 15.5), "t4": ("T4", 14.5), "rtx-5090": ("RTX 5090", 31),
    "rtx-4090": ("RTX 4090", 23.5), "rtx-3090": ("RTX 3090", 23.5),
}  # fmt: skip
# What may follow: its memory and how it is built in. A "Ti", a laptop's or a MIG slice of a card is another one.
VARIANT = r"([ -](SXM\d?|PCIE?|\d+GB?|HBM\d?e?|AC|Generation))*"


def use_gpu(name: str) -> torch.device:
    """Make a GPU the current one: 'cuda:1', or 'cuda', which is the first one or, under torchrun, the rank's own.

    Raises ValueError where there is no such GPU.
    """
    index, local, number = name.partition(":")[2], os.environ.get("LOCAL_RANK"), torch.cuda.device_count()
    if index and local is not None:
        raise ValueError(f"--device {name}: each rank takes a GPU of its own, of those in CUDA_VISIBLE_DEVICES")
    device = torch.device("cuda", int(index or local or 0))
    if device.index >= number:
        wanted = f"--device {name}" if local is None else f"rank {local} of torchrun has no GPU"
        raise ValueError(f"{wanted}: this machine has {number} CUDA devices")
    # A cache grows, and gathered weights come and go: without this a tenth of the memory is lost between them.
    if not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & set(os.environ):
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    # On an H100 this attention comes first, and plans anew for each length of keys: one plan a token.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # What asks for "the" GPU (graphs, Triton, checkpoints that are copied) asks for the current one.
    torch.cuda.set_device(device)
    return device


def repeat_exactly() -> None:
    """Let PyTorch take only algorithms that repeat bit for bit; an operation that has none raises an error."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
    torch.use_deterministic_algorithms(True)


def peak_flops(device: torch.device) -> tuple[float, str]:
    """The FLOP/s of a GPU's dense bf16 products, by the data sheet or measured; and which of the two, as text."""
    name = torch.cuda.get_device_name(device)
    for known, peak in PEAKS.items():
        if re.fullmatch(f"((NVIDIA|Tesla|GeForce) )*{known}{VARIANT}", name, re.IGNORECASE):
            return peak * 1e12, f"the data sheet's {peak} TFLOP/s"
    rate = product_rate(device)
    return rate, f"{rate / 1e12:.0f} TFLOP/s measured"


def product_rate(device: torch.device, size: int = 4096) -> float:
    """The FLOP/s of bf16 products of square matrices on a GPU."""
    a = torch.ones(size, size, dtype=torch.bfloat16, device=device)
    out = a @ a
    return 2 * size**3 / best_seconds(lambda: torch.mm(a, a, out=out))


def best_seconds(work: Callable[[], object]) -> float:
    """The seconds that a GPU takes for some work, the best of three means over thirty times."""
    means = []
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(30):
            work()
        torch.cuda.synchronize()
        means.append((time.perf_counter() - start) / 30)
    return min(means)
