"""The GPU of a process: which one it is, and how PyTorch is to use it."""

from __future__ import annotations

import os

import torch


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
