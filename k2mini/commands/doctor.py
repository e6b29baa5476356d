"""The command `doctor`."""

from __future__ import annotations

import argparse
import json
import platform
import re
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from k2mini.errors import EXTRAS, sentence

Result = tuple[str, str, str, str | None]  # name; passed, failed or skipped; what was found; what to do
REINSTALL = "in the folder of k2mini's clone, pip install -c constraints.txt -e . installs what was tested"


def doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `doctor`."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON and nothing else")
    parser.set_defaults(run=run_doctor)


def run_doctor(options: argparse.Namespace) -> None:
    """Print what each check finds, as it comes; exit with status 1 where one has failed."""
    results, start = [], time.perf_counter()
    for name, status, detail, remedy in _results(options.device, options.debug):
        results.append({"name": name, "status": status, "detail": detail, "remedy": remedy})
        seconds, start = time.perf_counter() - start, time.perf_counter()
        if not options.json:
            more = f"\n{'':<9}what to do: {remedy}" if remedy else ""
            print(f"{status:<7}  {name:<10} {seconds:>5.1f} s  {detail}{more}", flush=True)
    if options.json:
        print(json.dumps({"device": options.device, "checks": results}, ensure_ascii=False))
    if any(result["status"] == "failed" for result in results):
        raise SystemExit(1)


def _results(wanted: str, debug: bool) -> Iterator[Result]:
    """Of one check after another. What needs a device or a compiler that did not pass is skipped."""
    passed = set()

    def do(name: str, remedy: str, work: Callable[..., str], *arguments: Any) -> Result:
        try:
            found = work(*arguments)
        except Exception as error:
            if debug:
                raise
            said = sentence(error) or f"{type(error).__name__}: {error}".splitlines()[0][:300]
            return name, "failed", said, remedy
        passed.add(name)
        return name, "passed", found, None

    yield do("versions", REINSTALL, versions)
    try:
        from k2mini.build import pick_device
        from k2mini.doctor import CHECKS, DEVICE, GPU_ONLY, examine, find_device
    except (ImportError, OSError) as error:  # a package is missing or too old, or lacks a library
        yield "imports", "failed", str(error), REINSTALL
        return
    yield do("device", DEVICE, find_device, wanted)
    device: Any = pick_device(wanted) if "device" in passed else None
    for name, (_, remedy) in CHECKS.items():
        needed = "compiler" if name == "compile" else "device"
        if needed not in passed:
            yield name, "skipped", f"{needed} did not pass", None
        elif name in GPU_ONLY and device.type == "cpu":
            yield name, "skipped", GPU_ONLY[name], None
        else:
            yield do(name, remedy, examine, name, device)


def versions() -> str:
    """What is installed. Raises ValueError where a package is missing, or older than k2mini's metadata allows."""
    found, wrong = [f"Python {platform.python_version()}"], []
    wanted = rf"(?m)^([\w-]+)>=([\d.]+)(?:.*extra == \W({'|'.join(EXTRAS)})\W)?$"  # gguf>=0.17; extra == "gguf"
    for name, least, extra in re.findall(wanted, "\n".join(requires("k2mini") or [])):
        try:
            has = version(name)
        except PackageNotFoundError:
            has = "not installed"
        found.append(f"{name} {has}")
        ours, needed = ([int(number) for number in re.findall(r"\d+", text)[:3]] for text in (has, least))
        if ours < needed and (ours or not extra):
            wrong.append(f"{name} {has}, at least {least} is needed")
    if wrong:
        raise ValueError("; ".join(wrong))
    return ", ".join(found)
