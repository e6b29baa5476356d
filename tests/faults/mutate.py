"""A seeded fuzzer: one file of the tiny world is damaged or changed, and a command that reads it is run.

`python -m tests.faults.mutate SEED …` runs cases again, one by one, and shows all that they said.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults import world
from tests.faults.server import End, Forks, Request

WORDS = re.compile(r"[ =/]")  # a command line's, of which those that name something are copied
GOOD = {"refused", "same", "differs"}  # 'differs': from the unchanged file's result, where the new content is valid
# Values in JSON's own spelling; those that no parser of JSON writes are what a careless one lets through.
VALUES = [
    "null", "true", "-1", "0", "1.5", "NaN", "-Infinity", "1e999", "1" + "0" * 30, "9" * 5000, '""', '"granite"', "[]",
    "{}", "[1, [2]]", '"\\ud800"', '"a\u2028b"', '"\\u0000"', '"../x_model"', '"/etc/passwd"', '"' + "x" * 5000 + '"',
    "[" * 3000 + "]" * 3000, "[" * 200_000, '{"a":' * 3000 + "1" + "}" * 3000, "3", "1e-320", "2147483648",
    "-9223372036854775809", "18446744073709551616",
]  # fmt: skip
YAMLS = [
    ".nan", ".inf", "-.inf", "&a [*a]", "*nobody", "!!python/object/apply:os.system ['touch ran']", "!!int x", "0x10",
    "2026-01-01", "~", "!!binary aaaa", "\t1", "{", "'", "1_0", "!!set {1}", "&b {<<: *b}", "[[[[]]]]", "|\n    text",
]  # fmt: skip
LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))


def _bytes(draw: random.Random, content: bytes) -> tuple[str, bytes]:
    """A change of bytes, whatever the file is."""
    size = len(content)
    kind = draw.choice(["flip", "flip", "truncate", "extend", "delete", "repeat", "empty", "ones", "zeros", "front"])
    place = draw.randrange(max(1, size))
    length = draw.choice([1, 2, 8, 64, 512, 4096])
    changed = bytearray(content)
    if kind == "flip":
        for _ in range(draw.choice([1, 1, 3, 20])):
            changed[draw.randrange(size)] ^= 1 << draw.randrange(8)
    elif kind == "truncate":
        del changed[draw.choice([place, size - 1, 8, 7, 16]) :]
    elif kind == "extend":
        changed += draw.choice([b"\0" * length, b"}", b"\n", content[:length], draw.randbytes(length)])
    elif kind == "delete":
        del changed[place : place + length]
    elif kind == "repeat":
        changed[place:place] = content[place : place + length]
    elif kind == "empty":
        changed.clear()
    elif kind in ("ones", "zeros"):
        end = min(size, place + length)
        changed[place:end] = (b"\xff" if kind == "ones" else b"\0") * (end - place)
    else:  # the head, where lengths and magic numbers stand
        changed[draw.randrange(min(16, size))] = draw.randrange(256)
    return f"{kind} at {place}, {length}", bytes(changed)


def _places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from _places(child, (*path, key))


def _json(draw: random.Random, content: bytes, by_line: bool) -> tuple[str, bytes]:
    """Another value, a missing, unknown or repeated key somewhere in JSON; or the text written another way."""
    lines = content.decode().split("\n") if by_line else [content.decode()]
    number = draw.randrange(max(1, len(lines) - by_line))
    kind = draw.choice(["value"] * 6 + ["remove", "twice", "unknown", "text"])
    if kind == "text":
        how: dict[str, Callable[[bytes], bytes]] = {
            "BOM": lambda c: b"\xef\xbb\xbf" + c, "CRLF": lambda c: c.replace(b"\n", b"\r\n"),
            "UTF-16": lambda c: c.decode().encode("utf-16"), "latin-1": lambda c: c.replace(b"ra", b"r\xe4"),
            "comma": lambda c: c.rstrip()[:-1] + b"," + c.rstrip()[-1:], "list": lambda c: b"[" + c + b"]",
            "lines": lambda c: c.replace(b"\n", b"\n\n"), "blanks": lambda c: b" \n" + c,
        }  # fmt: skip
        name = draw.choice([*how])
        return f"text: {name}", how[name](content)
    whole = json.loads(lines[number])
    path = draw.choice([*_places(whole)])
    raw = draw.choice(VALUES)
    if not path:  # all of it is another value, and no key stands twice
        kind, lines[number] = "value", raw
    else:
        inside = whole
        for key in path[:-1]:
            inside = inside[key]
        if kind == "remove":
            del inside[path[-1]]
        elif kind == "unknown" and isinstance(inside, dict):
            inside["granite"] = "@@"
        elif kind == "twice" and isinstance(inside, dict):
            inside["@@"] = "@@"
        else:
            kind = "type" if _kind(raw) not in (_kind(json.dumps(inside[path[-1]])), "n") else "value"
            inside[path[-1]] = "@@"
        text = json.dumps(whole, indent=None if by_line else 1).replace('"@@": "@@"', f'"{path[-1]}": {raw}')
        lines[number] = text.replace('"@@"', raw)
    return f"{kind} {'.'.join(map(str, path))} {raw[:30]}", "\n".join(lines).encode()


def _kind(raw: str) -> str:
    """Of a value in JSON: text, list, object, true or false, null ('n') or number ('0')."""
    return "t" if raw[0] in "tf" else raw[0] if raw[0] in '"[{n' else "0"


def _yaml(draw: random.Random, content: bytes) -> tuple[str, bytes]:
    lines = content.decode().splitlines(keepends=True)
    number = draw.randrange(len(lines))
    key, colon, _ = lines[number].partition(":")
    kind = draw.choice(["value"] * 5 + ["twice", "remove", "tab", "unknown", "laughs", "deep", "BOM", "CRLF"])
    raw = draw.choice(YAMLS + VALUES)
    new = {
        "value": f"{key}{colon} {raw}\n", "twice": lines[number] * 2, "remove": "", "tab": "\t" + lines[number],
        "unknown": lines[number] + f"granite: {raw}\n", "laughs": LAUGHS + lines[number],
        "deep": f"{key}: {'[' * 5000}{']' * 5000}\n", "BOM": lines[number], "CRLF": lines[number],
    }  # fmt: skip
    lines[number] = new[kind]
    text = "".join(lines)
    text = "\ufeff" + text if kind == "BOM" else text.replace("\n", "\r\n") if kind == "CRLF" else text
    return f"{kind} {key.strip()} {raw[:30]}", text.encode()


def mutate(path: Path, others: Sequence[Path], draw: random.Random) -> str:
    """Change one file, or what stands in its place. Returns what was done."""
    content = path.read_bytes()
    if draw.random() < 0.06:
        return _replace(path, draw)
    if draw.random() < 0.05:
        other = draw.choice([other for other in others if other.is_file() and other != path])
        path.write_bytes(other.read_bytes())
        return f"the content of {other.name}"
    new, what = content, ""
    while new == content:
        try:
            if path.suffix in (".json", ".jsonl") and draw.random() < 0.75:
                what, new = _json(draw, content, path.suffix == ".jsonl")
            elif path.suffix == ".yaml" and draw.random() < 0.75:
                what, new = _yaml(draw, content)
            else:
                what, new = _bytes(draw, content)
        except (IndexError, TypeError):  # nothing to change there
            continue
    path.write_bytes(new)
    return what


def _replace(path: Path, draw: random.Random) -> str:
    kind = draw.choice(["folder", "fifo", "loop", "missing", "dangling", *(["unreadable"] if os.geteuid() else [])])
    if kind == "unreadable":
        path.chmod(0)
        return kind
    path.unlink()
    if kind == "fifo" and (path.name.startswith("x_asked.") or path.suffix == ".yaml"):
        kind = "missing"  # questions and configurations may come from a pipe, which is waited for
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind != "missing":
        path.symlink_to(path.name if kind == "loop" else "nowhere")
    return kind


@dataclass
class Case:
    """One seed: which file is changed how, and the command that reads it."""

    seed: int
    target: str
    what: str
    line: str
    strict: bool
    folder: Path

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.target}: {self.what}: k2mini {self.line}"


def line(name: str, target: str) -> str:
    """The command of a name, over a target."""
    return world.COMMANDS[name.strip("!")].format(m=target.split("/")[0])


def prepare_case(seed: int, template: Path, folder: Path) -> Case:
    """Copy what the case needs into `folder`, and change the file."""
    draw = random.Random(seed)
    target = draw.choice([*world.TARGETS])
    name = draw.choice(world.TARGETS[target].split())
    world.copy(template, folder, WORDS.split(line(name, target)))
    others = sorted(path for path in folder.rglob("*") if path.suffix == Path(target).suffix)
    what = mutate(folder / target, [*others, template / "x_docs.txt"], draw)
    return Case(seed, target, what, line(name, target), name.endswith("!"), folder)


def outcome(end: End, folder: Path) -> tuple[str, dict[str, bytes]]:
    """What a command printed and wrote."""
    files = world.tree(folder, "out", "out.gguf", "out.png", "x_run", "x_tune")
    files |= {name: _rounded(content) for name, content in world.tree(folder, "x_eval").items()}
    return _rounded(end.out.encode()).decode(), files


def _rounded(content: bytes) -> bytes:
    """Without what follows from which questions share a batch: the last digits, and a line's own hash of them."""
    return re.sub(rb'(\.\d{5})\d+|"[0-9a-f]{64}"', rb"\1", content)


def verdict(case: Case, end: End, expected: tuple[str, dict[str, bytes]]) -> str:
    """One of GOOD, or what is wrong."""
    if end.status is None:
        return "hang"
    if end.status < 0:
        return "crash"
    if (case.folder / "ran").exists():
        return "code ran"
    if end.status == 2:
        if not end.is_sentence:
            return "traceback"
        names = {Path(case.target).name, case.target.split("/")[0], "npee/noun" if "npee" in case.target else case.line}
        if case.target.endswith(".jinja"):
            names |= {"the template"}  # after the log has said which
        if case.target == "x_ap.json":
            names |= {"ap question"}
        if case.target.endswith((".safetensors", ".bin", ".pth")):
            names |= {"not finite", "holds NaN or infinity", "its loss is nan"}  # with the tensor's name, or the step's
        if not any(name in end.last for name in names) and not case.target.endswith(".yaml"):
            return "unnamed"
        half = (case.folder / "out").exists() and "run.dir=out" not in case.line
        return "half written" if half else "too long" if len(end.last) > 1500 else "refused"
    if end.status:
        return "traceback"
    out, files = outcome(end, case.folder)
    files.pop(case.target, None)
    if out == expected[0] and files == {key: value for key, value in expected[1].items() if key != case.target}:
        return "same"
    texts = out + "".join(content.decode(errors="replace") for name, content in files.items() if "json" in name)
    if re.search(r"[ \[](NaN|-?Infinity)\b", texts) and "x_chat" not in case.target:  # copied as it stands
        return "not finite"
    nans = re.match("ones.*, (?!1$|2$)", case.what) and case.target.endswith((".safetensors", ".bin", ".pth"))
    asks = case.line.split()[0] in ("generate", "eval", "score", "merge")
    ambiguous = case.what.startswith("twice") and "skip" not in case.line  # a key that stands twice
    # What programs wrote has one type a field; what stands where a file should be is not the same as no file.
    odd = (
        "/" in case.target
        and "tokenizer_class" not in case.what
        and re.match("type|folder|fifo|loop|dangling", case.what)
    )
    return "silent" if case.strict or ambiguous or odd or (nans and asks) else "differs"


def campaign(seeds: Sequence[int], forks: Forks, template: Path, scratch: Path, limit: float = 20.0):
    """Yield (case, verdict, end) of every seed, in the order in which they end."""
    cases: dict[int, Case] = {}
    lines = sorted({line(name, target) for target, names in world.TARGETS.items() for name in names.split()})
    wanted = {}

    def rights() -> Iterator[Request]:
        for place, one in enumerate(lines):
            world.copy(template, scratch / f"right{place}", WORDS.split(one))
            yield Request([one.split()], str(scratch / f"right{place}"))

    for place, end in forks.run(rights()):
        assert end.status == 0, (lines[place], end)
        wanted[lines[place]] = outcome(end, scratch / f"right{place}")
        shutil.rmtree(scratch / f"right{place}")

    def requests() -> Iterator[Request]:
        for place, seed in enumerate(seeds):
            cases[place] = case = prepare_case(seed, template, scratch / str(seed))
            yield Request([case.line.split()], str(case.folder), limit=limit)

    for place, end in forks.run(requests()):
        case = cases.pop(place)
        yield case, verdict(case, end, wanted[case.line]), end
        shutil.rmtree(case.folder)


def main(seeds: Sequence[int]) -> None:
    """Run the cases of some seeds and print them."""
    scratch = Path(tempfile.mkdtemp(prefix="mutate"))
    with Forks() as forks:
        template = world.build(scratch / "world", forks)
        for case, found, end in campaign(seeds, forks, template, scratch):
            print(f"{case}\n{found}: {world.said(end)}\n{end.out[-500:]}{end.err[-3000:]}")
    shutil.rmtree(scratch)


if __name__ == "__main__":
    main([int(seed) for seed in sys.argv[1:]])
