"""`eval` and `generate --input` on ranks: what one process finds, to the last byte, whoever was killed meanwhile."""

import argparse
import json
import os
import signal
from contextlib import nullcontext, suppress

import pytest

from k2mini.commands.ranks import joined
from k2mini.distributed import ALONE
from tests.faults.server import Request

ROCKS = ["granite", "basalt", "quartz", "rock", "mineral", "crust"]
PAIRS = [(a, b) for a in ROCKS for b in ROCKS if a != b]
EVAL = "--benchmark rocks.jsonl npee.json --tasks rocks npee/noun --perplexity text.txt --window 200 --batch-size 4"
EVAL += " --scoring text --max-new-tokens 6"
WORKER = "tests.distributed.worker:dying"


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_directory, forks):
    """Questions of many lengths, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("spread")
    (folder / "model").symlink_to(tiny_directory)
    asked = [f"What is {a}, after {b}?" + " rock" * (7 * n % 23) for n, (a, b) in enumerate(PAIRS)]
    lines = [
        {"question": text, "choices": [*pair, "volcano"], "answer": 1} for text, pair in zip(asked, PAIRS, strict=True)
    ]
    (folder / "rocks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "asked.txt").write_text("\n".join([*asked[:9], asked[0]]))
    (folder / "text.txt").write_text("granite is made of quartz. " * 200)
    noun = {"question": [*asked[:6], asked[0]], "answer": ["a rock"] * 7}
    empty = {"question": [], "answer": []}
    (folder / "npee.json").write_text(json.dumps({"choice": empty, "tf": empty, "noun": noun}))
    end = forks.one(folder, f"eval --model model {EVAL} --out whole")
    assert end.status == 0, end.err
    return folder, end


def start(forks, size, folder, line, rank=-1, number=0, ending=signal.SIGKILL):
    """How each rank ended; one ends itself after so many results."""
    words = [str(rank), str(number), str(int(ending)), *line.split()]
    children = forks.start_ranks(size, Request([words], str(folder), limit=120, call=WORKER))
    if children[0].wait().status:  # torchrun ends the others; they would wait for it to do so
        for child in children[1:]:
            if child.poll() is None:
                os.kill(child.pid, signal.SIGKILL)
    return [child.wait() for child in children]


def same(folder, out, whole="whole"):
    found, expected = ({path.name: path.read_bytes() for path in (folder / name).iterdir()} for name in (out, whole))
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == expected[name], name


@pytest.mark.parametrize(("size", "more"), [(3, ""), (2, " --shard")])
def test_eval_on_ranks_is_that_of_one_process(world, forks, size, more):
    """Choices, open answers and perplexity; printed by the first rank alone."""
    folder, whole = world
    first, *others = start(forks, size, folder, f"eval --model model {EVAL} --out spread{size}{more}")
    assert first.status == 0, first.err
    assert first.out == whole.out
    for end in others:
        assert (end.status, end.out, end.err) == (0, "", "")
    same(folder, f"spread{size}")


@pytest.mark.parametrize(("rank", "number", "then"), [(1, 3, 1), (0, 9, 3), (1, 16, 2)])
def test_eval_goes_on_after_a_kill_of_either_rank(world, forks, rank, number, then):
    """Within the questions and, as there are fifteen for each rank, within what follows; on any number of ranks."""
    folder, _ = world
    line = f"eval --model model {EVAL} --out killed{rank}{number}"
    ends = start(forks, 2, folder, line, rank, number)
    assert ends[rank].status == -signal.SIGKILL
    kept = [path for path in (folder / f"killed{rank}{number}").glob("results*") if path.read_text()]
    assert sum(path.read_text().count("\n") for path in kept) > 3
    if rank:  # the other one says so, in a sentence
        assert ends[0].is_sentence, ends[0].err
        assert (
            ends[0].last
            == f"k2mini: another rank has ended; what is done is kept in killed{rank}{number}, start again to go on"
        )
    for end in start(forks, then, folder, line):
        assert end.status == 0, end.err
    same(folder, f"killed{rank}{number}")


@pytest.mark.parametrize(
    ("said", "lost"),
    [
        ("NCCL error in: NCCLUtils.hpp:268, Failed to CUDA calloc 6291456 bytes: out of memory", False),
        ("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_a_lost_rank_is_told_from_what_else_goes_wrong(monkeypatch, caplog, said, lost):
    """And what was heard of it is said before."""
    monkeypatch.setattr("k2mini.distributed.ranks", lambda *_: nullcontext(ALONE))
    monkeypatch.setenv("LOCAL_RANK", "2")  # which leaves SIGTERM as it is
    options = argparse.Namespace(threads=None, out=None, shard=False, device="cpu")
    with pytest.raises(ValueError if lost else RuntimeError) as raised, joined(options):
        raise RuntimeError(said)
    assert str(raised.value) == ("another rank has ended; start again" if lost else said)
    assert ("Connection closed" in caplog.text) == lost


def test_the_second_rank_says_it_where_the_first_was_killed(world, forks):
    """Whether torchrun's SIGTERM comes first or what gloo says."""
    folder, _ = world
    words = ["0", "3", str(int(signal.SIGKILL)), *f"eval --model model {EVAL} --out lost".split()]
    first, second = forks.start_ranks(2, Request([words], str(folder), limit=120, call=WORKER))
    assert first.wait().status == -signal.SIGKILL
    with suppress(ProcessLookupError):
        os.kill(second.pid, signal.SIGTERM)
    assert second.wait().last.endswith("; what is done is kept in lost, start again to go on")
    assert "Traceback" not in second.wait().err


def test_the_first_rank_says_what_is_kept_when_torchrun_ends_it(world, forks):
    folder, _ = world
    first, other = start(forks, 2, folder, f"eval --model model {EVAL} --out ended", 0, 3, signal.SIGTERM)
    assert first.status == 128 + signal.SIGTERM
    assert first.last == "k2mini: stopped by SIGTERM; what is done is kept in ended, start again to go on"
    assert "Traceback" not in first.err + other.err
    first, _ = start(forks, 2, folder, "eval --model model --benchmark rocks.jsonl", 0, 3, signal.SIGTERM)
    assert first.last == "k2mini: stopped by SIGTERM; nothing is kept without --out, start again to go on"


@pytest.mark.parametrize(
    ("kind", "ends", "more"),
    [("--temperature 0.9 --seed 5", "jsonl", ""), ("--num-beams 2", "json", ""), ("--stop a", "jsonl", " --shard")],
)
def test_generate_on_ranks_and_after_kills_is_that_of_one_process(world, forks, kind, ends, more):
    folder, _ = world
    name = kind.split()[0].strip("-")
    common = f"generate --model model --input asked.txt --max-new-tokens 7 --batch-size 2 {kind}{more} --out {name}"
    whole = forks.one(folder, f"{common}.whole.{ends}".replace(more or "?", ""))
    assert whole.status == 0, whole.err
    killed = start(forks, 2, folder, f"{common}.{ends}", 1, 2)
    assert killed[1].status == -signal.SIGKILL
    assert killed[0].is_sentence, killed[0].err
    assert "another rank has ended" in killed[0].last
    assert len(list(folder.glob(f"{name}.{ends}*.rank[01]"))) == 2
    killed = start(forks, 3, folder, f"{common}.{ends}", 0, 0)
    assert killed[0].status == -signal.SIGKILL
    then = 2 if more else 1
    first, *_ = start(forks, then, folder, f"{common}.{ends}")
    assert first.status == 0, first.err
    assert (folder / f"{name}.{ends}").read_bytes() == (folder / f"{name}.whole.{ends}").read_bytes()
    assert not list(folder.glob(f"{name}.{ends}.*"))
    first, other = start(forks, 2, folder, f"{common.replace(f' --out {name}', '')} --json")
    assert other.out == ""
    entries = json.loads(first.out)
    assert [entry["answer"] for entry in entries] == [entry["answer"] for entry in _entries(folder / f"{name}.{ends}")]


def _entries(path):
    text = path.read_text()
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def test_answers_of_another_model_beside_the_file_are_refused(world, forks):
    folder, _ = world
    line = "generate --model model --input asked.txt --max-new-tokens 3 --out beside.jsonl"
    (folder / "beside.jsonl.rank1").write_text('7\t{"prompt": "What is quartz?"}\n')
    end = forks.one(folder, line)
    assert end.is_sentence
    assert "beside.jsonl.rank1, line 1 is not this model's answer" in end.last
    assert forks.one(folder, f"{line} --force").status == 0
    assert not (folder / "beside.jsonl.rank1").exists()
    whole = (folder / "beside.jsonl").read_bytes()
    lines = [b"%d\t" % place + answer for place, answer in enumerate(whole.splitlines(keepends=True))]
    (folder / "beside.jsonl").unlink()
    for rank in (0, 1):  # both were killed when all was there, and one within a line
        (folder / f"beside.jsonl.rank{rank}").write_bytes(b"".join(lines[rank::2]) + lines[rank][:40] * rank)
    assert forks.one(folder, line).status == 0
    assert (folder / "beside.jsonl").read_bytes() == whole
    assert not list(folder.glob("beside.jsonl.rank*"))


def test_ranks_that_were_told_different_things(world, forks):
    """Both say in what they differ, and nothing is scored."""
    folder, _ = world
    line = f"eval --model model {EVAL} --out differing --limit 1{{rank}}"
    end, _ = start(forks, 2, folder, line)
    assert end.is_sentence, end.err
    assert end.last.startswith("k2mini: --limit is 10 on rank 0, 11 on rank 1; start all ranks with the same")
    assert not (folder / "differing").exists()


def test_what_ranks_are_not_for(world, forks):
    folder, _ = world
    generate = "generate --model model --max-new-tokens 2"
    for line, rank, said in (
        (f"{generate} --input asked.txt --shard", {}, "torchrun starts them, and there is one"),
        (f"eval --model model {EVAL} --shard", {}, "torchrun starts them, and there is one"),
        (f"{generate} --prompt rock", {"LOCAL_RANK": "0"}, "--input FILE gives ranks something to do"),
    ):
        end = forks.one(folder, line, environment=rank)
        assert (end.is_sentence, end.out) == (True, ""), end.err
        assert said in end.last
    end, _ = start(forks, 2, folder, f"{generate} --input asked.txt --shard --quantize int8 --quantize-head")
    assert end.is_sentence
    assert "--shard spreads the weights over ranks; it does not go with --quantize-head" in end.last


@pytest.mark.parametrize("lora", ["", " lora.rank=2"])
def test_a_benchmark_while_training_uses_the_ranks(world, forks, lora):
    """Of a model that they share, in passes of different numbers, and of adapters: one process's accuracies."""
    folder, _ = world
    values = {
        "run": {"dir": "x", "seed": 3}, "model": {"path": "model", "dtype": "float64"},
        "data": {"path": "text.txt", "seq_len": 32}, "train": {"lr": 1e-2, "global_batch_size": 4, "max_steps": 2},
        "eval": {"benchmark": ["rocks.jsonl"], "every": 1, "scoring": "text"},
    }  # fmt: skip
    (folder / "run.yaml").write_text(json.dumps(values))
    found = []
    for size in (1, 2):
        line = f"pretrain run.yaml run.dir=run{size}{len(lora)} train.micro_batch_size={4 // size}{lora}"
        for end in start(forks, size, folder, line):
            assert end.status == 0, end.err
        rows = (folder / f"run{size}{len(lora)}/metrics.jsonl").read_text().splitlines()
        found.append([json.loads(row)["accuracy/rocks"] for row in rows if "accuracy" in row])
    assert found[0] == found[1]
    assert len(found[0]) == 2
