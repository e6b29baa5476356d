"""Checkpoints: what trains and its optimiser's state as safetensors, all else as JSON; complete once named."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from k2mini.files import new_directory, read_json

MOMENTS = ("exp_avg", "exp_avg_sq")


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> Path:
    """Write `folder/step_N`: trained parameters, AdamW's moments and `state` (plain JSON). It appears whole or not."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        tensors[f"model.{name}"] = parameter.detach()
        for moment in MOMENTS:
            tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    path = folder / f"step_{step:07}"
    with new_directory(path) as beside:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, beside / "tensors.safetensors")
        (beside / "state.json").write_text(json.dumps({**state, "step": step}, indent=2) + "\n", encoding="utf-8")
    return path


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put a checkpoint's values into the model and the optimiser. Returns its state.

    Raises ValueError where it is not a checkpoint, is damaged, or belongs to another model.
    """
    state = read_state(path)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    try:
        with safe_open(path / "tensors.safetensors", framework="pt") as file:
            expected = {f"{kind}.{name}" for kind in ("model", *MOMENTS) for name in trained}
            if expected != set(file.keys()):
                odd = sorted(expected ^ set(file.keys()))[0]
                raise ValueError(f"{path} belongs to another model or other trained parameters ({odd})")
            for name, parameter in trained.items():
                with torch.no_grad():
                    parameter.copy_(file.get_tensor(f"model.{name}"))
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(state["step"]), device=parameter.device),
                    # Copies: the file's pages are mapped, and the optimiser writes in place.
                    **{m: file.get_tensor(f"{m}.{name}").clone().to(parameter.device) for m in MOMENTS},
                }
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}/tensors.safetensors is damaged ({error}); resume from another checkpoint") from None
    return state


def read_state(path: Path) -> dict[str, Any]:
    """A checkpoint's state. Raises ValueError where `path` is not a checkpoint."""
    if not (path / "state.json").is_file():
        raise ValueError(f"{path} is not a checkpoint (it has no state.json)")
    state = read_json(path / "state.json")
    assert isinstance(state, dict)
    return state


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"step_\d+", path.name))


def prune(folder: Path, keep_last: int) -> None:
    """Remove all but the newest checkpoints, and what a killed save left unnamed."""
    for path in checkpoints(folder)[:-keep_last]:
        shutil.rmtree(path)
    for path in folder.glob(".step_*.tmp"):
        shutil.rmtree(path)
