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

from k2mini.cpu import describe

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "numpy", "safetensors", "transformers", "peft", "bitsandbytes", "lm_eval", "llama_cpp_python")


def header(command: list[str]) -> dict[str, str]:
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    found = {each.metadata["Name"].replace("-", "_"): each.version for each in distributions()}
    versions = [f"{name} {found[name]}" for name in PACKAGES if name in found]
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit or "unknown",
        "processor": describe(),
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
