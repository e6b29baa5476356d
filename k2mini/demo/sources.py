"""Paths that begin with `demo:` in a configuration name files of the demo, so that configs/tiny_*.yaml need no data."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from k2mini.config import FinetuneConfig, PretrainConfig
from k2mini.demo.pipeline import BASE, FULL, write_world

PREFIX = "demo:"


def with_demo_files(config: PretrainConfig | FinetuneConfig) -> PretrainConfig | FinetuneConfig:
    """Replace `demo:base` by the packaged base model, and `demo:FILE` by that file of the world, made on first use.

    Raises ValueError where the world has no such file.
    """
    folder = Path(config.run.dir) / "demo"

    def resolved(path: str | None) -> str | None:
        if path is None or not path.startswith(PREFIX):
            return path
        name = path.removeprefix(PREFIX)
        if name == "base":
            return str(BASE)
        if os.environ.get("RANK", "0") == "0" and not folder.exists():  # other ranks wait for the first
            write_world(folder, 0, FULL)
            if not (folder / name).exists():
                names = ", ".join(sorted(file.name for file in folder.iterdir()))
                raise ValueError(f"{path}: the demo has base, {names}")
        return str(folder / name)

    model, data = resolved(config.model.path), resolved(config.data.path)
    assert model is not None
    assert data is not None
    return replace(
        config,
        model=replace(config.model, path=model),
        data=replace(config.data, path=data, val_path=resolved(config.data.val_path)),  # type: ignore[arg-type]
    )
