"""Adapters, examples and settings that several test modules use."""

import torch
from torch.overrides import TorchFunctionMode

from k2mini.config import LoraSection, TrainSection
from k2mini.data.packing import Example
from k2mini.nn.llama import Llama
from k2mini.nn.lora import adapter_tensors, attach, init_adapters
from tests.conftest import tiny_llama

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = torch.randint(199, (2, 25), generator=torch.Generator().manual_seed(1))


def fill_adapters(model: Llama, std: float = 0.1) -> None:
    """Random B matrices: a fresh adapter's are zero, so that it does nothing yet."""
    generator = torch.Generator().manual_seed(2)
    for name, tensor in adapter_tensors(model).items():
        if name.endswith("lora_B"):
            tensor.normal_(0, std, generator=generator)


def adapted(config=None, targets=("q_proj", "k_proj", "v_proj"), dropout=0.0, fill=True, dtype=torch.float32):
    """A tiny model with an adapter that does something."""
    model = tiny_llama(config, dtype=dtype)
    attach(model, LoraSection(rank=4, alpha=6.0, dropout=dropout, target_modules=list(targets)))
    init_adapters(model, seed=1)
    if fill:
        fill_adapters(model)
    return model


def examples(number=23):
    """Examples of 5 to 41 tokens, of which the second half is supervised."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 40, (number,), generator=generator).tolist()
    return [
        Example([1, *torch.randint(3, 199, (length,), generator=generator).tolist(), 2], length // 2)
        for length in lengths
    ]


def section(**changes):
    return TrainSection(**{"lr": 1e-3, "global_batch_size": 4, "micro_batch_size": 4, "max_steps": 20, **changes})


class HostWaits(TorchFunctionMode):
    """What inside of it would make the host wait for a GPU, in `found`: names of tensors' methods."""

    NAMES = ("tolist", "item", "__bool__", "__float__", "__int__", "nonzero", "numpy", "cpu")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, _types, args=(), kwargs=None):
        places = args[1] if func.__name__ in ("__getitem__", "__setitem__") else None
        places = places if isinstance(places, tuple) else (places,)
        if func.__name__ in self.NAMES or any(isinstance(p, torch.Tensor) and p.dtype == torch.bool for p in places):
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))
