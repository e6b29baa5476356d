"""From a checkpoint to what a run is for: a model's directory, or an adapter's."""

from __future__ import annotations

from pathlib import Path

from k2mini.config import LoraSection, check_fields
from k2mini.data.tokenizer import open_tokenizer
from k2mini.distributed import ALONE
from k2mini.dtypes import DTYPES
from k2mini.files import output
from k2mini.model_config import tensor_shapes
from k2mini.training.checkpoint import STATE, check_files, read_state
from k2mini.training.metadata import StoredModel
from k2mini.weights.adapter import save_adapter
from k2mini.weights.model_directory import ModelDirectory, check_tensors
from k2mini.weights.model_files import save_model


def export(
    checkpoint: Path, out: Path, dtype: str | None = None, *, force: bool = False, checked: bool = False
) -> None:
    """Write a checkpoint of `pretrain` as a Hugging Face directory, tensor by tensor.

    Args:
        dtype: of the tensors written; None: that of the run's `model.dtype`.
        force: replace a directory that exists.
        checked: this process has saved the checkpoint, or compared its files with their hashes.

    Raises ValueError where it is no such checkpoint, or is damaged, the base is another one than it was trained from,
    or `out` exists and is not to be replaced.
    """
    state, where = read_state(checkpoint), checkpoint / STATE
    identity = state["identity"]
    if identity.get("lora") is not None:
        raise ValueError(f"{checkpoint} holds an adapter, not a model; the run's end writes it to run.dir/adapter")
    check_fields(identity, {"model": str, "dtype": str}, f"{where}, identity")
    base = ModelDirectory(identity["model"])
    with output(out, force=force, inputs=(checkpoint, base.path)):
        if not checked:
            check_files(checkpoint, state["files"], ALONE, "export another checkpoint")
        if identity.get("base", fingerprint := base.fingerprint()) != fingerprint:
            raise ValueError(f"{base.path} is no longer the base that {checkpoint} was trained from; put that back")
        tensors = StoredModel(checkpoint, DTYPES[dtype or identity["dtype"]])
        check_tensors(tensors, tensor_shapes(base.config), checkpoint)
        tokenizer = open_tokenizer(base.require_tokenizer_file())
        save_model(tensors, base.config, out, tokenizer=tokenizer, force=force, inputs=(checkpoint, base.path))


def export_adapter(kept: Path, out: Path, section: LoraSection, base: str, quantized_from: str | None = None) -> None:
    """Write the adapter that a checkpoint holds; its base counts as the model that it was quantised from, if it was.

    Raises ValueError where the checkpoint is damaged.
    """
    state = read_state(kept)
    check_files(kept, state["files"], ALONE, f"remove {kept} to train on from an earlier checkpoint")
    stored = StoredModel(kept)
    adapters = {name: stored.tensor(name) for name in stored.names()}
    note = {key: value for key in ("base", "quantize") if (value := state["identity"].get(key))}
    if quantized_from is not None:
        note["base"] = quantized_from
    save_adapter(adapters, section, out, base=base, note=note if "base" in note else None)
