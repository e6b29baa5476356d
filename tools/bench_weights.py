"""A delta of a model of 7B, applied: memory that can't be evicted, and the rate beside a plain program's.

A random LLaMA of the shape asked for is written as base and tuned (float16, two files each), a delta is made, and in
turns `k2mini delta apply` and a plain program add the two: the plain one opens both with safetensors, adds tensor by
tensor and saves file by file, without a check, a hash or a bound on memory. Both end with their output synced to disk.
Everything is made in a folder of its own and removed at the end, whatever happens.

    python tools/bench_weights.py [--shape llama-7b] [--layers N] [--pairs 2] [--folder DIR]

The full size takes 55 GB of disk and some ten minutes.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from k2mini.model_config import PRESETS, ModelConfig, tensor_shapes
from k2mini.weights.model_files import save_model
from k2mini.weights.stream import total_bytes

PLAIN = """
import os, sys
from pathlib import Path
import torch
from safetensors import safe_open
from safetensors.torch import save_file
base, delta, out = map(Path, sys.argv[1:])
out.mkdir()
deltas = [safe_open(path, "pt") for path in sorted(delta.glob("*.safetensors"))]
where = {name: file for file in deltas for name in file.keys()}
for path in sorted(base.glob("*.safetensors")):
    with safe_open(path, "pt") as file:
        save_file({name: (file.get_tensor(name).view(torch.int16) + where[name].get_tensor(name)).view(torch.float16)
                   for name in file.keys()}, out / path.name)
    os.fsync(os.open(out / path.name, os.O_RDONLY))
"""


class RandomModel:
    """A source of random float16 weights: one block of normal numbers, read from another place for each row."""

    def __init__(self, config: ModelConfig, seed: int, scale: float = 0.02) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._shapes, self._seed = tensor_shapes(config), seed
        self._block = (torch.randn(1 << 25, generator=generator) * scale).half()

    def names(self) -> list[str]:
        """All tensors of the shape."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """One tensor's shape, by the configuration."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of all tensors, float16."""
        return torch.float16

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start, …, stop - 1; a function of the seed, the name and `start` within one process."""
        shape = (stop - start, *self._shapes[name][1:])
        size = torch.Size(shape).numel()
        offset = hash((name, start, self._seed)) % (self._block.numel() - size)
        return self._block[offset : offset + size].view(shape)


def run(command: list[str]) -> tuple[float, int, int]:
    """Run a program. Returns its seconds, and the peaks of the memory that can't be evicted and of all of it."""
    start, peak, whole = time.perf_counter(), 0, 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            fields = Path(f"/proc/{process.pid}/status").read_text().split()
        except OSError:
            break
        if "RssAnon:" in fields:
            kept = sum(int(fields[fields.index(key) + 1]) for key in ("RssAnon:", "RssShmem:"))
            peak, whole = max(peak, kept), max(whole, int(fields[fields.index("VmHWM:") + 1]))
        time.sleep(0.02)
    if process.wait():
        raise SystemExit(f"{command[:4]} failed")
    return time.perf_counter() - start, peak * 1024, whole * 1024


def cut(config: ModelConfig, layers: int | None) -> ModelConfig:
    """The same shape with so many layers."""
    return config if layers is None else replace(config, num_layers=layers)


def main() -> None:
    """Make the models and the delta, apply it with k2mini and the plain program in turns, print, and remove all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(PRESETS), default="llama-7b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has, where disk or time are short")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    options = parser.parse_args()
    config = cut(PRESETS[options.shape], options.layers)
    folder = Path(tempfile.mkdtemp(prefix="bench_weights", dir=options.folder))
    base, tuned, delta, out = (folder / name for name in ("base", "tuned", "delta", "out"))
    k2mini = [sys.executable, "-m", "k2mini", "delta"]
    try:
        size = total_bytes(RandomModel(config, 0))
        for path, seed in ((base, 0), (tuned, 1)):
            save_model(RandomModel(config, seed), config, path, shard_bytes=size // 2 + 10**6)
        made = run([*k2mini, "make", "--base", str(base), "--tuned", str(tuned), "--out", str(delta)])
        shutil.rmtree(tuned)
        print(f"{config.num_parameters():,} parameters, {size / 1e9:.2f} GB; made in {made[0]:.0f} s, ", end="")
        print(f"{made[1] / 1e9:.2f} GB of memory that can't be evicted", flush=True)
        ours, plain = [], []
        for _ in range(options.pairs):
            apply = [*k2mini, "apply", "--base", str(base), "--delta", str(delta), "--out", str(out)]
            ours.append(run(apply))
            shutil.rmtree(out)
            plain.append(run([sys.executable, "-c", PLAIN, str(base), str(delta), str(out)]))
            shutil.rmtree(out)
        for label, runs in (("k2mini", ours), ("plain", plain)):
            seconds = statistics.median(entry[0] for entry in runs)
            kept, whole = max(entry[1] for entry in runs), max(entry[2] for entry in runs)
            print(f"{label:8} {seconds:6.1f} s  {3 * size / seconds / 1e6:6.0f} MB/s read and written, ", end="")
            print(f"peak {kept / 1e9:.2f} GB that can't be evicted ({whole / 1e9:.2f} GB with mapped files)")
        ratios = [b[0] / a[0] for a, b in zip(ours, plain, strict=True)]
        print(f"rate, k2mini / plain: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
