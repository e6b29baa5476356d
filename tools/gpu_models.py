"""Models of LLaMA-7B's shape with random values, made on the GPU, and batches for them: nothing is read."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from k2mini.data.batches import Batch
from k2mini.data.packing import Example, packed_rows
from k2mini.distributed import local_part
from k2mini.inference.compile import compile_decoding
from k2mini.inference.decoding import Decoding
from k2mini.inference.request import Request
from k2mini.inference.scheduler import Scheduler
from k2mini.model_config import PRESETS
from k2mini.nn.llama import Llama
from k2mini.nn.quant import quantize_blocks, quantized_head

SHAPE = replace(PRESETS["llama-7b"], max_seq_len=4096)  # room for an answer after 2,048 tokens


@torch.no_grad()
def draw(model: Llama) -> Llama:
    """Random values in the place of none."""
    for name, parameter in model.to_empty(device="cuda").named_parameters():
        values = local_part(parameter)
        if values.dtype == torch.int8:
            values.random_(-127, 128)
        elif values.dtype == torch.uint8:
            values.random_()
        elif values.ndim == 1:
            values.fill_(0.02 / 73 if name.endswith(".scale") else 1.0)
        else:
            values.normal_(0.0, 0.02)
    return model


def empty(layers: int, dtype: torch.dtype = torch.bfloat16) -> Llama:
    """A model without storage."""
    with torch.device("meta"):
        return Llama(replace(SHAPE, num_layers=layers)).to(dtype)


def answering(layers: int, *, int8: bool = False, nf4: bool = False, compiled: bool = True) -> Llama:
    """A model that decodes; with `int8` its head is quantised too."""
    model = empty(layers)
    if int8 or nf4:
        quantize_blocks(model.model.layers, "int8" if int8 else "nf4")
    draw(model).eval().requires_grad_(False)
    if int8:
        model.quantized_head = quantized_head(model.head_weight)
    if compiled:
        compile_decoding(model)
    return model


def begun(model: Llama, prompts: list[list[int]], decoding: Decoding) -> Scheduler:
    """An engine that has read the prompts and chosen a token after each; it goes on with `step`."""
    capacity = len(prompts[0]) + decoding.max_new_tokens
    scheduler = Scheduler(model, slots=len(prompts), capacity=capacity)
    for prompt in prompts:
        scheduler.admit(Request(prompt, decoding, (), lambda _event: False))
    while not all(slot.row is None or slot.row.decodes for slot in scheduler.slots):
        scheduler.step()
    return scheduler


def tokens(rows: int, length: int) -> Tensor:
    """Random ids, (rows, length), on the CPU."""
    return torch.randint(3, SHAPE.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))


def batch_of(lengths: list[int]) -> Batch:
    """Four rows, each of documents of these lengths; no positions where it is one."""
    ids = tokens(4, sum(lengths) + len(lengths))
    if len(lengths) == 1:
        return Batch(ids[:, :-1], None, ids[:, 1:].clone())
    ends = [length + 1 for length in lengths]  # the last token of a document is a label alone
    return packed_rows([[Example(part.tolist(), 1) for part in row.split(ends)] for row in ids])
