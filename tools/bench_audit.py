"""What the audit costs: decoding speed under hooks, and time and memory of `k2mini audit diff` on two 7B models.

    python tools/bench_audit.py hooks --model DIR [--pairs 7]
    python tools/bench_audit.py diff [--shape llama-7b] [--layers N] [--folder DIR]

`hooks` compares decoding with a model that never had a hook to decoding with hooks removed, with the residual stream
recorded and with every point recorded. `diff` writes two random models of the shape (27 GB of disk for a 7B), compares
them, measures time and the memory that can't be evicted, and removes them; it takes a quarter of an hour.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

from bench_inference import our_decode, pairs
from bench_weights import RandomModel, cut, run

from k2mini.audit.hooks import trace
from k2mini.build import load_model
from k2mini.model_config import PRESETS
from k2mini.nn.llama import Llama
from k2mini.weights.model_files import save_model


def hooks(folder: Path, number: int) -> None:
    """Tokens a second with and without hooks, measured in turns."""
    never, _ = load_model(folder)
    model, _ = load_model(folder)
    with trace(model, ["*"]):
        our_decode(model)
    print(f"{'tokens a second':52} {'':>8} {'never':>8}  ratio")
    plain = lambda: our_decode(never)  # noqa: E731
    pairs("hooks off", lambda: our_decode(model), plain, number)
    for label, points in (("layers.*.residual_out kept", ["layers.*.residual_out"]), ("every point kept", ["*"])):
        pairs(label, partial(_traced, model, points), plain, number)


def _traced(model: Llama, points: list[str]) -> float:
    with trace(model, points):
        return our_decode(model)


def diff(shape: str, layers: int | None, where: Path | None) -> None:
    """Time and peak memory of comparing two random models of a preset's shape."""
    config = cut(PRESETS[shape], layers)
    folder = Path(tempfile.mkdtemp(prefix="bench_audit", dir=where))
    try:
        for name, seed in (("before", 0), ("after", 1)):
            save_model(RandomModel(config, seed), config, folder / name)
        command = [
            sys.executable,
            "-m",
            "k2mini",
            "audit",
            "diff",
            str(folder / "before"),
            str(folder / "after"),
            "--json",
        ]
        seconds, kept, whole = run(command)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{config.num_parameters():,} parameters: {seconds:.0f} s, peak {kept / 1e9:.2f} GB that can't be evicted")
    print(f"({whole / 1e9:.2f} GB with mapped files)")


def main() -> None:
    """Run the benchmark that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_subparsers(dest="what", required=True)
    decoding = what.add_parser("hooks")
    decoding.add_argument("--model", type=Path, required=True)
    decoding.add_argument("--pairs", type=int, default=7)
    comparing = what.add_parser("diff")
    comparing.add_argument("--shape", choices=sorted(PRESETS), default="llama-7b")
    comparing.add_argument("--layers", type=int, help="fewer layers than the shape has")
    comparing.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    options = parser.parse_args()
    if options.what == "hooks":
        hooks(options.model, options.pairs)
    else:
        diff(options.shape, options.layers, options.folder)


if __name__ == "__main__":
    main()
