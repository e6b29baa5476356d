"""The command `doctor`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from k2mini.errors import EXTRAS, sentence

REINSTALL = "in the folder of k2mini's clone, pip install -c constraints.txt -e . installs what was tested"


def doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `doctor`."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON and nothing else")
    parser.set_defaults(run=run_doctor)


def run_doctor(options: argparse.Namespace) -> None:
    """Print what each check finds, as it comes; exit with status 1 where one has failed."""
    if "LOCAL_RANK" in os.environ:
        raise ValueError("doctor looks at one process; start it without torchrun")
    results = []
    for result in _results(options.device, options.debug):
        results.append(result)
        if not options.json:
            print("{status:<7}  {name:<11}{seconds:>4.1f} s  {detail}".format(**result), flush=True)
            print(f"{'':<9}what to do: {result['remedy']}\n" * bool(result["remedy"]), end="", flush=True)
    if options.json:
        print(json.dumps({"device": options.device, "checks": results}, ensure_ascii=False))
    if any(result["status"] == "failed" for result in results):
        raise SystemExit(1)


def _results(wanted: str, debug: bool) -> Iterator[dict[str, Any]]:
    """Of the checks, one after another. What needs a device or a compiler that has failed is skipped."""

    def result(name: str, status: str, detail: str, remedy: str | None = None, seconds: float = 0.0) -> dict[str, Any]:
        passed[name] = status == "passed"
        return {"name": name, "status": status, "detail": detail, "remedy": remedy, "seconds": round(seconds, 1)}

    def do(name: str, remedy: str, work: Callable[..., str], *arguments: Any) -> dict[str, Any]:
        start = time.perf_counter()
        try:
            return result(name, "passed", work(*arguments), seconds=time.perf_counter() - start)
        except Exception as error:
            if debug:
                traceback.print_exc()
            said = sentence(error) or f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            return result(name, "failed", said, remedy, time.perf_counter() - start)

    passed: dict[str, bool] = {}
    yield do("versions", REINSTALL, versions)
    try:
        from k2mini.doctor import CHECKS, DEVICE, GPU_ONLY, find_device, pick_device
    except (ImportError, OSError) as error:  # a package is missing or too old, or lacks a library
        yield result("imports", "failed", str(error), REINSTALL)
        return
    yield do("device", DEVICE, find_device, wanted)
    device = pick_device(wanted) if passed["device"] else None
    for name, (work, remedy) in CHECKS.items():
        needed = "compiler" if name == "compile" else "device"
        if not passed[needed]:
            yield result(name, "skipped", f"{needed} has not passed")
        elif name in GPU_ONLY and device is not None and device.type == "cpu":
            yield result(name, "skipped", GPU_ONLY[name])
        else:
            yield do(name, remedy, work, device)


def versions() -> str:
    """What is installed. Raises ValueError where a package is missing, or older than k2mini's metadata allows."""
    found, wrong = [f"Python {platform.python_version()}"], []
    for line in requires("k2mini") or []:  # such as 'gguf>=0.17; extra == "gguf"'
        parts = re.match(r"([\w-]+)>=([\d.]+)(?:.*extra == \W(\w+))?", line)
        if parts is None or parts[3] not in (None, *EXTRAS):
            continue
        try:
            has = version(parts[1])
        except PackageNotFoundError:
            has = ""
        found.append(f"{parts[1]} {has or 'not installed'}")
        if (has or not parts[3]) and _numbers(has) < _numbers(parts[2]):
            wrong.append(f"{found[-1]}, at least {parts[2]} is needed")
    if wrong:
        raise ValueError("; ".join(wrong))
    return ", ".join(found)


def _numbers(text: str) -> list[int]:
    """'2.13.0+cpu' -> [2, 13, 0]."""
    return [int(part) for part in re.findall(r"\d+", text.split("+")[0])]
