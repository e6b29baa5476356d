"""From a directory to a model that answers (`load_model`) or trains (`training_model`)."""

from __future__ import annotations

import logging
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from k2mini.config import LoraSection, ModelSection, ParallelSection, TrainSection
from k2mini.cpu import warn_if_slow
from k2mini.data.tokenizer import Tokenizer
from k2mini.distributed import World, device_mesh, local_part, local_rows, shard
from k2mini.dtypes import DTYPES, NAMES
from k2mini.gpu import use_gpu
from k2mini.model_config import tensor_shapes
from k2mini.nn import quant
from k2mini.nn.decode_ops import check_compiler
from k2mini.nn.llama import Llama
from k2mini.nn.lora import attach, init_adapters
from k2mini.weights.adapter import check_base, checked_adapter, load_adapter
from k2mini.weights.merge import merged_reader
from k2mini.weights.model_directory import CheckpointReader, ModelDirectory, check_tensors, model_directory

log = logging.getLogger(__name__)


def load_model(
    directory: str | Path | ModelDirectory,
    adapter: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    quantize: str | None = None,
    *,
    merge: bool = False,
    quantize_head: bool = False,
    mesh: DeviceMesh | None = None,
) -> tuple[Llama, Tokenizer | None]:
    """Load a Hugging Face directory of one of `architectures.ARCHITECTURES`, in evaluation mode.

    Weights whose dtype and device are already right stay memory-mapped; others are converted one tensor at a time, so
    that the model is never in memory twice.

    Args:
        directory: config.json, weights and, if there is one, a tokenizer's file.
        adapter: a LoRA adapter's directory (PEFT's format); it is put beside the weights, not merged into them.
        dtype: a torch dtype or its name ('float32', …). None: as stored on a GPU, float32 on a CPU.
        quantize: 'int8' keeps the blocks' matrices in int8 (see nn/quant.py), 'nf4' in four bits (nn/nf4.py), each
            quantised as it is read. A directory of quantised weights says it by itself.
        merge: merge the adapter into the weights as they are read, in full precision.
        quantize_head: quantise the vocabulary projection too.
        mesh: the ranks that share the weights, each of which reads its own.

    Returns: the model, and its tokenizer or None where the directory has no file of one.

    Raises ValueError naming what is wrong: no such directory, another architecture, a missing, extra or wrongly shaped
    tensor, a tokenizer that does not fit the embedding, an adapter that does not fit, too little memory.
    """
    device, opened = torch.device(device), _open(directory)
    tokenizer, model, reader = opened.tokenizer, empty_model(opened), opened.reader
    quantize = quantize or opened.quantized
    if opened.quantized not in (None, quantize):
        raise ValueError(f"{opened.path} is quantised to {opened.quantized}; leave out --quantize {quantize}")
    if quantize_head and quantize != "int8":
        raise ValueError("--quantize-head needs --quantize int8")
    stored = reader.dtype("model.embed_tokens.weight")
    dtype = resolve_dtype(dtype, stored, device)
    if quantize is None and (dtype != stored or device.type != "cpu"):
        check_memory(model.config.num_parameters() // (mesh.size() if mesh else 1), dtype, stored, device)
    model.to(dtype)
    if quantize is not None:
        quant.quantize_blocks(model.model.layers, quantize)
    if adapter is not None and merge:
        reader = merged_reader(opened, [model_directory(adapter)])
    elif adapter is not None:
        attach(model, section := checked_adapter(model_directory(adapter), opened))
    if mesh is not None:
        shard(model, model.units(), ("hidden", "logits"), mesh, None, ParallelSection())
        model.to_empty(device=device).gathered_dtype, model.gathered_device = dtype, device
    _materialise(model, reader, device)
    if adapter is not None and not merge:
        load_adapter(model, model_directory(adapter), section)
    if quantize_head and quantize is not None:
        model.quantized_head = quant.quantized_head(model.head_weight, quantize)
    return model.eval(), tokenizer


def open_model(
    path: str | ModelDirectory, device: str | None, threads: int | None, **wanted: Any
) -> tuple[Llama, ModelDirectory]:
    """A model as a command's options name it, and its directory, which must have a tokenizer; the log says which."""
    set_threads(threads)
    directory = _open(path)
    directory.require_tokenizer()  # before the weights, which take longer
    model, _ = load_model(directory, device=pick_device(device), **wanted)
    millions = model.config.num_parameters() / 1e6
    log.info("%s: %.1f M parameters, %s, on %s", directory.path, millions, NAMES[model.dtype], model.device)
    if model.device.type == "cpu" and model.dtype.itemsize == 2:
        warn_if_slow(model.dtype)
    return model, directory


def set_threads(number: int | None) -> None:
    """`--threads`: how many CPU threads PyTorch uses; None leaves its choice."""
    if number is not None and number < 1:
        raise ValueError(f"--threads must be at least 1, not {number}")
    if number is not None:
        torch.set_num_threads(number)


def pick_device(name: str | None) -> torch.device:
    """`--device`; None or 'auto' is CUDA where there is one. Raises ValueError where there is no such device."""
    if name is None or name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch("(cpu|cuda)(:[0-9]{1,2})?", name):
        raise ValueError(f"--device {name} is not a device that is supported; cpu, cuda and cuda:1, … are")
    return use_gpu(name) if name.startswith("cuda") else torch.device("cpu")


def is_sharded(section: ModelSection, parallel: ParallelSection, lora: LoraSection | None, world_size: int) -> bool:
    """Whether FSDP keeps the model: what trains on several ranks or in bfloat16; a frozen base if that is asked for."""
    if lora is not None:
        return (parallel.replicate or world_size) < world_size or parallel.offload is not None
    return world_size > 1 or section.dtype == "bfloat16" or parallel.offload is not None


def kept_dtype(section: ModelSection, lora: LoraSection | None) -> torch.dtype:
    """The dtype of the model's parameters in training: float32 at least where all train, else that of the frozen base.

    Adapters are kept in float32 at least in any case (see `nn/lora.py`).
    """
    return DTYPES[section.dtype] if lora is not None else torch.promote_types(DTYPES[section.dtype], torch.float32)


def make_trainable(
    model: Llama,
    section: ModelSection,
    train: TrainSection,
    parallel: ParallelSection,
    lora: LoraSection | None,
    device: torch.device,
    mesh: DeviceMesh | None,
) -> None:
    """Prepare a model whose parameters have no values yet (they are on the meta device, or fake) for training.

    The one place that knows the order: quantisation, LoRA, activation checkpointing, compilation, sharding.

    Args:
        model: its parameters are of `kept_dtype`.
        lora: train adapters only; None: all parameters.
        device: where it will train.
        mesh: the ranks that share it; None: it is not sharded (see `is_sharded`).

    Raises ValueError where `lora` names a module that the model does not have, or there is no compiler.
    """
    if section.quantize is not None:
        quant.quantize_blocks(model.model.layers, section.quantize)
    if lora is not None:
        attach(model, lora, whole=True)
    model.model.recompute_every = train.activation_checkpointing
    model.model.by_document = device.type == "cpu"  # a GPU takes all documents in one call (see nn/packed.py)
    if train.compile:
        check_compiler(device)
        for layer in model.model.layers:
            layer.compile(dynamic=None if lora is None else True)  # instructions come in rows of any number and length
        if section.quantize is not None and train.activation_checkpointing != 1:  # or its floats are kept, too
            torch._functorch.config.ban_recompute_materialized_backward = False
    if mesh is not None:
        compute = DTYPES[section.dtype]
        cast = compute if kept_dtype(section, lora) != compute else None
        shard(model, model.units(), ("loss", "hidden", "logits"), mesh, cast, parallel)
        model.gathered_dtype, model.gathered_device = compute, device
    if train.compile and lora is not None:
        # Or the first block would be a graph of its own: its input has no gradient, the inputs of the others have.
        model.model.embed_tokens.register_forward_hook(lambda *x: x[-1].requires_grad_(torch.is_grad_enabled()))


def training_model(
    section: ModelSection,
    train: TrainSection,
    parallel: ParallelSection,
    world: World,
    lora: LoraSection | None = None,
    seed: int = 0,
) -> tuple[Llama, ModelDirectory]:
    """Load a model to be trained, spread over the ranks: each reads from the files what it keeps, and nothing else.

    Args:
        lora: train fresh adapters, drawn from `seed`; None: all parameters.

    Returns: the model, and its directory, whose tokenizer is there and is opened when it is first asked for.

    Raises ValueError as `load_model` does, and where the directory has no tokenizer.
    """
    model = empty_model(directory := _open(section.path))
    if world.device.type == "cpu" and section.dtype == "bfloat16":
        warn_if_slow(torch.bfloat16)
    check_stored(directory.path, directory.quantized, section.quantize)
    directory.require_tokenizer_file()
    if lora is not None and lora.init_adapter is not None:
        check_base(model_directory(lora.init_adapter), directory)
    model.to(kept := kept_dtype(section, lora))
    mesh = device_mesh(world, parallel) if is_sharded(section, parallel, lora, world.size) else None
    make_trainable(model, section, train, parallel, lora, world.device, mesh)
    if mesh is not None:
        model.to_empty(device=parallel.offload or world.device)
    elif section.quantize is None:
        check_memory(model.config.num_parameters(), kept, kept, world.device)
    _materialise(model, directory.reader, world.device)
    del directory.reader  # it would keep the files mapped all the while; asked for again, it opens them again
    if lora is not None:
        init_adapters(model, seed)
    return model, directory


def check_stored(path: Path, stored: str | None, quantize: str | None) -> None:
    """Raise ValueError where the base's matrices are stored quantised, and not as `model.quantize` says."""
    if stored not in (None, quantize):
        raise ValueError(f"{path} is quantised; train adapters over it with model.quantize={stored}")


def _open(directory: str | Path | ModelDirectory) -> ModelDirectory:
    (opened := directory if isinstance(directory, ModelDirectory) else ModelDirectory(directory)).require_model()
    return opened


def empty_model(directory: ModelDirectory) -> Llama:
    """A model without storage, whose tensors are checked to be in the files, of the right shapes and dtypes."""
    expected, reader = tensor_shapes(directory.config), directory.reader
    parts = quant.quantized_tensors(expected, how) if (how := directory.quantized) else {}
    check_tensors(reader, expected | {name: shape for name, (shape, _) in parts.items()}, directory.path)
    for name in expected:
        if name not in parts:
            reader.dtype(name)  # refuses integer and 8-bit types before anything is read
    with torch.device("meta"):
        return Llama(directory.config)


@torch.no_grad()
def _materialise(model: Llama, reader: CheckpointReader, device: torch.device) -> None:
    """Give every parameter its stored values, in the dtype that it has; adapters get storage without values.

    A parameter whose dtype and device are already right stays memory-mapped; a sharded one is read by its rows; what is
    kept quantised is filled matrix by matrix.
    """
    for name, parameter in list(model.named_parameters()):
        stem, _, part = name.rpartition(".")
        if parameter.dtype in quant.PARTS and part == "weight":
            stored = f"{stem}.scale" in reader.files
            quant.fill(model.get_submodule(stem), name, reader.rows, device, stored=stored)
        if parameter.dtype in quant.PARTS or part == "scale":  # filled with its matrix
            continue
        if hasattr(parameter, "placements"):  # see `distributed.is_dtensor`
            if name in reader.files:
                local_part(parameter).copy_(reader.rows(name, *local_rows(parameter)))
            continue
        if name in reader.files:
            values = reader.tensor(name).to(device).to(parameter.dtype)  # converted there, where that is fast
        else:
            values = torch.empty_like(parameter, device=device)
        setattr(model.get_submodule(stem), part, nn.Parameter(values, requires_grad=parameter.requires_grad))


def resolve_dtype(dtype: torch.dtype | str | None, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to compute in: the one asked for, else as stored on a GPU and float32 on a CPU."""
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
        return DTYPES[dtype]
    return dtype or (stored if device.type != "cpu" or stored == torch.float64 else torch.float32)


def check_memory(num_parameters: int, dtype: torch.dtype, stored: torch.dtype, device: torch.device) -> None:
    """Raise ValueError, saying what would fit, where the weights alone are larger than the memory that is free."""
    free, needed = free_memory(device), num_parameters * dtype.itemsize
    if needed <= free:
        return
    half = dtype.itemsize > 2 and num_parameters * 2 <= free
    remedy = "--dtype bfloat16 fits" if half else "use a device with more memory"
    if device.type == "cpu" and stored.itemsize < dtype.itemsize:
        remedy = f"--dtype {NAMES[stored]}, as stored, is read from the file and fits"
    sizes = f"{needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free on {device}"
    raise ValueError(f"{num_parameters:,} weights in {NAMES[dtype]} take {sizes}; {remedy}")


def free_memory(device: torch.device) -> float:
    """Bytes that can be allocated on a device, a CPU's too; infinite where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError, ValueError):  # elsewhere than on Linux
        fields = Path("/proc/meminfo").read_text().split()
        return int(fields[fields.index("MemAvailable:") + 1]) * 1024
    return float("inf")
