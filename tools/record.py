"""Run a benchmark and keep what it prints: python tools/record.py NAME -- COMMAND …

The output goes to tools/results/NAME.txt, under a header with date, commit, processor and versions. Where the command
fails, nothing is written. Paths are shortened to their last part.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "numpy", "safetensors", "transformers", "peft", "bitsandbytes", "lm_eval", "llama_cpp_python")
FLAGS = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "bf16", "avx512_vnni": "VNNI", "amx_tile": "AMX"}


def header(command: list[str]) -> dict[str, str]:
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = dict(re.findall(r"^(model name|model|flags)\s*: (.*)$", info, re.MULTILINE))
    has = ", ".join(label for flag, label in FLAGS.items() if flag in cpu.get("flags", "").split())
    found = {each.metadata["Name"].replace("-", "_"): each.version for each in distributions()}
    versions = [f"{name} {found[name]}" for name in PACKAGES if name in found]
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit or "unknown",
        "processor": f"{cpu.get('model name', platform.machine())}, model {cpu.get('model', '?')} ({has})",
        "threads": f"{os.cpu_count()} cores, OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'not set')}",
        "versions": ", ".join([f"Python {platform.python_version()}", *versions]),
        "command": shlex.join(command),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="of the file in tools/results/, without .txt")
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="after --")
    options = parser.parse_args()
    text = "".join(f"{key:<10} {value}\n" for key, value in header(options.command).items()) + "\n"
    with subprocess.Popen(options.command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            text += line
    if process.returncode:
        sys.exit(f"{options.command[0]} ended with {process.returncode}; nothing was recorded")
    shown = re.sub(r"(?<![\w.…:/])/(?:[\w.+-]+/)+", "", text)
    (ROOT / "tools" / "results" / f"{options.name}.txt").write_text(shown, encoding="utf-8")


if __name__ == "__main__":
    main()
