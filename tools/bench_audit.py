"""`k2mini audit diff` of two models of 7B: how long it takes, and the memory that can't be evicted.

    python tools/bench_audit.py [--shape llama-7b] [--folder DIR]

Two random models of the shape are written (27 GB of disk for a 7B, a quarter of an hour) and removed at the end.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from bench_weights import RandomModel, run

from k2mini.config import PRESETS
from k2mini.weights.model_files import save_model


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(PRESETS), default="llama-7b")
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    options = parser.parse_args()
    config = PRESETS[options.shape]
    folder = Path(tempfile.mkdtemp(prefix="bench_audit", dir=options.folder))
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
        print(
            f"{config.num_parameters():,} parameters: {seconds:.0f} s, peak {kept / 1e9:.2f} GB that can't be evicted"
        )
        print(f"({whole / 1e9:.2f} GB with mapped files)")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
