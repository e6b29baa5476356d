"""What the demo starts from: the packaged base model and the miniature world's files.

Paths that begin with `demo:` in a configuration name them, so that configs/tiny_*.yaml need no data.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from k2mini.config_file import Config
from k2mini.demo.world import world_files
from k2mini.files import new_directory

PREFIX = "demo:"
BASE = Path(__file__).parent / "base"


@dataclass(frozen=True)
class Scale:
    """How much data there is, and how long each stage trains."""

    sizes: dict[str, int]  # as `world_files` takes them
    pretrain_steps: int
    stage1_steps: int
    stage2_steps: int


# 512 samples are 16 steps of 32; a corpus of 12 copies is about 3 epochs.
FULL = Scale({"copies": 12, "general": 1024, "expert": 3072, "questions": 100}, 400, 32, 96)
QUICK = Scale({"copies": 2, "general": 64, "expert": 96, "questions": 5}, 12, 3, 4)


def write_world(folder: Path, seed: int, scale: Scale) -> None:
    """Write the miniature world's files into a new folder, which appears only when all are written."""
    with new_directory(folder) as beside:
        for name, content in world_files(seed, scale.sizes).items():
            (beside / name).write_text(_file_text(name, content), encoding="utf-8")


def _file_text(name: str, content: Any) -> str:
    """A file's text: JSON, or one JSON object a line for `.jsonl`."""
    if name.endswith(".jsonl"):
        return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in content)
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def copy_base(folder: Path) -> None:
    """Copy the packaged base model into a new folder, which appears only when all is copied."""
    with new_directory(folder) as beside:
        for file in BASE.iterdir():
            shutil.copyfile(file, beside / file.name)


def with_demo_files(config: Config, *, is_main: bool = True) -> Config:
    """Replace `demo:base` by the packaged base model, and `demo:FILE` by that file of the world, made on first use.

    Args:
        is_main: write the files where they are missing; other ranks leave that to the first.

    Raises ValueError where the world has no such file.
    """
    folder = Path(config.run.dir) / "demo"

    def resolved(path: Any) -> Any:
        if path is None or not path.startswith(PREFIX):
            return path
        name = path.removeprefix(PREFIX)
        if name == "base":
            return str(BASE)
        if is_main and not folder.exists():  # other ranks meet the first in `run.pretrain`
            write_world(folder, 0, FULL)
        if is_main and not (folder / name).exists():
            names = ", ".join(sorted(file.name for file in folder.iterdir()))
            raise ValueError(f"{path}: the demo has base, {names}")
        return str(folder / name)

    section: Any = config.data
    sources = section.sources and [replace(source, path=resolved(source.path)) for source in section.sources]
    return replace(
        config,
        model=replace(config.model, path=resolved(config.model.path)),
        data=replace(section, path=resolved(section.path), sources=sources, val_path=resolved(section.val_path)),
        eval=replace(config.eval, benchmark=[resolved(path) for path in config.eval.benchmark]),
    )
