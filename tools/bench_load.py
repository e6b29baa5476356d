"""How long a LLaMA-7B checkpoint takes to open, and how much memory it takes: python tools/bench_load.py

    python tools/bench_load.py --first-token DIR [--pairs 5]     from shell to `k2mini generate`'s first token

With `--first-token` a model's command line is started in turns with a Python that imports torch and reads the weights'
files through a small buffer, and prints a letter. Both are measured until something comes out.

Else writes a sparse fp16 checkpoint of LLaMA-7B's shape (13.5 GB in name, next to nothing on disk), opens it on the CPU
as it is stored, and prints seconds and resident memory. Sparse zeros read like any file that is in the page cache.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from k2mini.build import load_model
from k2mini.model_config import PRESETS, hf_config, tensor_shapes
from k2mini.weights.stream import plan_shards


def write_sparse(directory: Path, preset: str) -> int:
    """A checkpoint of zeros in fp16, in two shards with an index. Returns its size in bytes."""
    config = PRESETS[preset]
    shapes = tensor_shapes(config)
    sizes = {name: 2 * math.prod(shape) for name, shape in shapes.items()}
    (directory / "config.json").write_text(json.dumps(hf_config(config, "float16", 1, 2)))
    weight_map = {}
    shards = plan_shards(sizes, 10**10)
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        header, offset = {}, 0
        for name in names:
            end = offset + sizes[name]
            header[name] = {"dtype": "F16", "shape": shapes[name], "data_offsets": [offset, end]}
            weight_map[name], offset = file, end
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)  # the format aligns its data so
        with (directory / file).open("wb") as out:
            out.write(len(encoded).to_bytes(8, "little") + encoded)
            out.truncate(8 + len(encoded) + offset)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(sizes.values())


def resident() -> dict[str, float]:
    """Resident memory in MiB: anonymous (ours alone) and file-backed (pages that the system can drop)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(fields[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile")}


# What no program that answers can do without: torch, and the weights' bytes.
LEAST = """
import sys, torch
buffer = bytearray(1 << 20)
for name in sys.argv[1:]:
    with open(name, "rb", buffering=0) as file:
        while file.readinto(buffer): pass
print(".")
"""


def until_first_byte(arguments: list[str]) -> float:
    """Seconds from the start of a Python with these arguments to its first byte of output."""
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        first, seconds = process.stdout.read(1), time.perf_counter() - start
        process.stdout.read()
    if not first or process.returncode:
        sys.exit(f"{' '.join(arguments)[:200]} failed")
    return seconds


def first_token(model: Path, number: int) -> None:
    """Print the seconds of both, and the ratio pair by pair."""
    prompt = ["--prompt", "What is granite?", "--max-new-tokens", "1", "--device", "cpu"]
    ours = ["-m", "k2mini", "generate", "--model", str(model), *prompt]
    least = ["-c", LEAST, *map(str, model.glob("*.safetensors"))]
    until_first_byte(ours), until_first_byte(least)  # files into the page cache
    seconds = [(until_first_byte(ours), until_first_byte(least)) for _ in range(number)]
    for name, values in zip(("k2mini generate", "torch and reading"), zip(*seconds, strict=True), strict=True):
        print(f"{name:<18} {statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f}, {number} runs)")
    ratios = [a / b for a, b in seconds]
    print(f"{'ratio':<18} {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def main() -> None:
    """Write the checkpoint, open it twice, and print seconds and memory; or measure the first token."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="llama-7b", choices=PRESETS)
    parser.add_argument("--first-token", type=Path, metavar="DIR", help="start `k2mini generate` with this model")
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    if options.first_token is not None:
        first_token(options.first_token, options.pairs)
        return
    preset = options.preset
    with tempfile.TemporaryDirectory() as folder:
        size = write_sparse(Path(folder), preset)
        before = resident()
        print(f"{preset}: {PRESETS[preset].num_parameters():,} parameters, {size / 1e9:.1f} GB in fp16")
        # safetensors touches the first page of every tensor, with read-ahead: what is not cached comes from the disk.
        for opening in ("first opening", "second opening"):
            start = time.perf_counter()
            model, _ = load_model(folder, dtype="float16")
            print(f"{opening}: {time.perf_counter() - start:.2f} s")
            after = resident()
            del model
        for name in before:
            print(f"{name}: {before[name]:.0f} -> {after[name]:.0f} MiB")


if __name__ == "__main__":
    main()
