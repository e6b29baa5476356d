"""Every command that writes, killed at its n-th file event: old outputs stay whole, a restart ends as it should."""

import random
import re
import shutil
from itertools import cycle, islice

import pytest

from tests.faults.mutate import WORDS
from tests.faults.server import Request
from tests.faults.world import SHORT, copy, listing, said, tree

RUN = f"{SHORT} train.max_steps=3 run.dir=out"
WRITERS = {  # command lines
    "prepare": ["prepare x_docs.jsonl x_docs.txt --tokenizer x_model --val-percent 30 --out out"],
    "pretrain": [f"pretrain x_pre.yaml data.path=x_docs.jsonl {RUN}"],
    "finetune": [f"finetune x_fine.yaml data.val_size=1 {RUN}"],
    "export": ["export x_run/checkpoints/step_0000001 --force --out out"],
    "merge": ["merge --base x_model --adapter x_adapter --force --out out"],
    "delta": ["delta make --base x_model --tuned x_tuned --force --out out",
              "delta apply --base x_model --delta out --force --out out2"],
    "convert": ["convert x_model --to hf --force --out out", "convert x_model --to gguf --force --out out.gguf"],
    "generate": ["generate --model x_model --input x_docs.txt --max-new-tokens 3 --batch-size 1 --out out.jsonl"],
    "eval": ["eval --model x_model --benchmark x_user.jsonl x_npee.json --tasks x_user npee/tf npee/noun npee/qa "
             "--max-new-tokens 2 --out out"],
}  # fmt: skip


def fresh(template, folder, lines, old=None):
    """A folder with what the commands read and, of the outputs, the old ones."""
    shutil.rmtree(folder, ignore_errors=True)
    copy(template, folder, WORDS.split(" ".join(lines)))
    for path in old.iterdir() if old is not None else ():
        (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)


@pytest.mark.parametrize("number", [6, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", WRITERS)
def test_killed_at_a_file_event(forks, template, tmp_path, name, number):
    """Half of the kills of what has --force find an old output: it is there as it was, or the new one is."""
    lines, outputs = WRITERS[name], [re.split("[ =]", line)[-1] for line in WRITERS[name]]
    whole, old = tmp_path / "whole", tmp_path / "old"
    fresh(template, whole, lines)
    undisturbed = forks.one(whole, *lines)
    assert undisturbed.status == 0, said(undisturbed)
    right, names, events = tree(whole, *outputs), listing(whole), undisturbed.events
    olds = [None]
    if "--force" in lines[0]:
        old.mkdir()
        for path in (whole / output for output in outputs):
            (shutil.copytree if path.is_dir() else shutil.copy)(path, old / path.name)
            place = old / path.name / "config.json" if path.is_dir() else old / path.name
            place.write_bytes(place.read_bytes() + b" \n")
        olds.append(old)
    every = [(n, old) for old in olds for n in range(1, events + 1)]
    draw = random.Random(0)
    cases = draw.sample(every, number) if number < len(every) else [*islice(cycle(every), number)]

    def kills():
        for place, (n, old) in enumerate(cases):
            fresh(template, tmp_path / str(place), lines, old)
            yield Request([line.split() for line in lines], str(tmp_path / str(place)), kill=n)

    killed, wrong = dict(forks.run(kills())), {}
    for place, (_, old) in enumerate(cases):
        problem = "" if killed[place].status == -9 else f"it was not killed: {said(killed[place])}"
        for output in outputs if old is not None else ():
            there = output if (tmp_path / str(place) / output).exists() else f".{output}.old"
            if _inside(tmp_path / str(place) / there) not in (_inside(old / output), _inside(whole / output)):
                problem = f"{there} is neither the old one nor the new one"
        wrong[place] = [problem] if problem else []
    again = [Request([line.split() for line in lines], str(tmp_path / str(place))) for place in range(number)]
    for place, end in forks.run(again):
        folder = tmp_path / str(place)
        found, left = tree(folder, *outputs), sorted(listing(folder) ^ names)
        odd = sorted(file for file in found.keys() | right.keys() if found.get(file) != right.get(file))
        if not (end.status == 0 or (end.status == 2 and "exists already" in end.last)):
            wrong[place].append(f"the restart: {said(end)}")
        if odd:
            wrong[place].append(f"after the restart other than an undisturbed run's: {', '.join(odd)}")
        if left:
            wrong[place].append(f"left over or missing: {', '.join(left)}")
    found = [f"killed at event {n} of {events}{', over an old output' if old else ''}: {'; '.join(problems)}"
             for (n, old), problems in zip(cases, wrong.values(), strict=True) if problems]  # fmt: skip
    assert not found, f"{name}: {len(found)} of {number}\n" + "\n".join(found)


def _inside(path):
    """What is in a file or folder, whatever its name."""
    files = {name.partition("/")[2]: content for name, content in tree(path.parent, path.name).items()}
    return path.read_bytes() if path.is_file() else files
