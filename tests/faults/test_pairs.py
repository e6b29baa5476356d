"""Two processes that write the same output at once: one wins or both refuse, and what stands there is right."""

import random

import pytest

from tests.faults.mutate import WORDS
from tests.faults.server import Request
from tests.faults.world import SHORT, copy, listing, said, tree

LINES = [
    "prepare x_docs.jsonl x_docs.txt --tokenizer x_model --out out",
    f"pretrain x_pre.yaml run.dir=out {SHORT}",
    f"finetune x_fine.yaml run.dir=out {SHORT}",
    "convert x_model --to hf --out out",
    "convert x_model --to gguf --out out --force",
    "delta make --base x_model --tuned x_tuned --out out --force",
    "eval --model x_model --benchmark x_user.jsonl --out out",
    "generate --model x_model --input x_asked.txt --max-new-tokens 2 --out out",
]
AGAIN = ("pretrain", "finetune", "eval")  # a second start finds the result complete, and says so
REFUSALS = ("is being written by", "exists already", "holds a run")


@pytest.mark.parametrize("number", [8, pytest.param(40, marks=pytest.mark.slow)])
def test_two_at_once(forks, template, tmp_path, number):
    """0 silent corruptions: who loses ends with status 2 and a sentence."""
    draw, wrong, whole = random.Random(0), [], {}
    for case in range(number):
        line = LINES[case % len(LINES)]
        if line not in whole:
            copy(template, tmp_path / f"whole{case}", WORDS.split(line))
            end = forks.one(tmp_path / f"whole{case}", line)
            assert end.status == 0, said(end)
            whole[line] = tree(tmp_path / f"whole{case}", "out"), listing(tmp_path / f"whole{case}"), end.seconds
        right, names, seconds = whole[line]
        folder, offset = tmp_path / str(case), draw.random() * seconds if case >= len(LINES) else 0.0
        copy(template, folder, WORDS.split(line))
        pair = [Request([line.split()], str(folder), after=after) for after in (0.1, 0.1 + offset)]
        ends = [end for _, end in forks.run(pair)]
        refused = [end for end in ends if end.status]
        both_may = line.split()[0] in AGAIN or "--force" in line
        try:
            assert all(end.is_sentence for end in refused), "one fails without a sentence"
            assert all(any(text in end.last for text in REFUSALS) for end in refused), "one fails for another reason"
            assert refused or both_may, "both say that they wrote it"
            assert len(refused) < 2 or not (folder / "out").exists(), "both refuse, and something is there"
            assert len(refused) == 2 or tree(folder, "out") == right, "the output is not an undisturbed run's"
            assert len(refused) == 2 or listing(folder) == names, f"left over: {listing(folder) ^ names}"
        except AssertionError as error:
            wrong.append(f"k2mini {line}\n    second {offset:.3f} s later: {error.args[0]}\n    {[*map(said, ends)]}")
    assert not wrong, f"{len(wrong)} of {number} pairs\n" + "\n".join(wrong)
