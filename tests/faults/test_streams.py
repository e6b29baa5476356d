"""Standard streams that are closed, full or narrow: a command ends as it should, and what it writes is right."""

from pathlib import Path

import pytest

from tests.faults.mutate import WORDS
from tests.faults.server import Request
from tests.faults.world import copy, said, tree

GENERATE = "generate --model x_model --max-new-tokens 2"
LINES = [
    "info x_model",
    "verify x_model",
    f"{GENERATE} --prompt granite",
    f"{GENERATE} --prompt - --json",
    f"{GENERATE} --input x_asked.json --out out",
    "eval --model x_model --benchmark x_user.jsonl --out out",
    "compare x_other x_eval",
    "prepare x_docs.jsonl --tokenizer x_model --out out",
    "convert x_model --to hf --out out",
    "pretrain x_pre.yaml run.dir=out",
    "preview x_pre.yaml",
    "plan x_pre.yaml --world-size 1 --gpu-memory 1GiB",
    "audit lens --model x_model --prompt granite",
    "chat --model x_model --max-new-tokens 2",
    "nonsense",
    "generate --model nowhere --prompt granite",
]
WAYS = {
    "no stdin": {"closed": ["stdin"]},
    "no stdout": {"closed": ["stdout"]},
    "no stderr": {"closed": ["stderr"]},
    "no streams": {"closed": ["stdin", "stdout", "stderr"]},
    "ASCII": {"encoding": "ascii"},
    "latin-1": {"encoding": "latin-1"},
    "full": {"stdout": "/dev/full"},
}


@pytest.fixture(scope="module")
def usually():
    """How lines end with usual streams, and what they write: {(line, standard input): (end, files)}."""
    return {}


@pytest.mark.parametrize("way", WAYS)
def test_streams(forks, template, tmp_path, usually, way):
    """Status and files are those of a run with usual streams; where output can't go anywhere, the status says so."""
    wrong, started = [], []
    stdin = "What is Aragon–quartz? ä\n" if WAYS[way].get("encoding") is None else "quartz\n"
    for number, line in enumerate(LINES):
        for kind, changes in (("usual", {}), ("odd", WAYS[way])):
            if kind == "odd" or (line, stdin) not in usually:
                copy(template, tmp_path / f"{number}/{kind}", WORDS.split(line))
                request = Request([line.split()], str(tmp_path / f"{number}/{kind}"), stdin=stdin, **changes)
                started.append((line, kind, request))
    ended = {}
    for place, end in forks.run([request for *_, request in started]):
        line, kind, request = started[place]
        (usually if kind == "usual" else ended)[line, stdin] = end, tree(Path(request.folder), "out")
    for line in LINES:
        (usual, right), (odd, found) = usually[line, stdin], ended[line, stdin]
        prints = "stdout" in WAYS[way] and usual.out
        allowed = {usual.status} if not prints else {2, 1, 141} if usual.status == 0 else {usual.status}
        if "stdin" in WAYS[way].get("closed", ()) and ("--prompt -" in line or line.startswith("chat")):
            allowed |= {0, 2}  # nothing can be asked
        if (
            odd.status not in allowed
            or "Traceback" in odd.err
            or (odd.status == 2 and odd.err and "k2mini" not in odd.err)
        ):
            wrong.append(f"k2mini {line}: usually {said(usual)}\n    here {said(odd)}")
        elif found != right and odd.status in (0, usual.status):
            wrong.append(f"k2mini {line}: it wrote something else")
    assert not wrong, f"{len(wrong)} of {len(LINES)}\n" + "\n".join(wrong)
