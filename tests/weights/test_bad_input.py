"""What a user can get wrong about weights: one sentence, status 2, nothing written."""

import json
import subprocess
import sys

import pytest
import torch

from k2mini.cli import main
from k2mini.weights.delta import make_delta
from k2mini.weights.model_files import save_model
from tests.conftest import tiny_config, tiny_llama


class Evil:
    """A pickle of it runs code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (exec, (f"open({str(self.path)!r}, 'w')",))


@pytest.fixture
def trio(tmp_path):
    for name, seed in (("base", 0), ("tuned", 1)):
        model = tiny_llama(seed=seed)
        save_model(model.state_dict(), model.config, tmp_path / name, shard_bytes=100_000)
    make_delta(tmp_path / "base", tmp_path / "tuned", tmp_path / "delta")
    return tmp_path


def missing_shard(trio):
    sorted((trio / "base").glob("model-*"))[1].unlink()


def index_beyond(trio):
    path = trio / "base" / "model.safetensors.index.json"
    raw = json.loads(path.read_text())
    raw["weight_map"]["model.norm.weight"] = "model-00099-of-00099.safetensors"
    path.write_text(json.dumps(raw))


def pickled_code(trio):
    for path in (trio / "base").glob("model*"):
        path.unlink()
    torch.save({"model.norm.weight": Evil(trio / "ran")}, trio / "base" / "pytorch_model.bin")


def full_disk(_trio):
    def full(*_):
        raise OSError(28, "No space left on device")

    return ("k2mini.weights.stream.raw", full)


CASES = {
    "swapped": (None, ("--base", "delta", "--delta", "base"), "is a delta, not a base; are the two swapped?"),
    "missing shard": (missing_shard, (), "is missing; the checkpoint is not complete"),
    "index": (index_beyond, (), "model-00099-of-00099.safetensors is missing"),
    "pickle": (pickled_code, (), "holds more than tensors; code in it is never run, so it was not loaded"),
    "full disk": (full_disk, (), "out: No space left on device"),
    "below a file": (
        None,
        ("--out", "tuned/config.json/out"),
        "config.json is a file, so nothing can be written below it",
    ),
    "inside the base": (None, ("--out", "base/out"), "base, which is an input; name a place outside it"),
    "no base": (None, ("--base", "nowhere"), "there is no directory"),
    "existing": (None, ("--out", "tuned"), "exists already; name another place, remove it, or replace it with --force"),
}


@pytest.mark.parametrize(("damage", "options", "said"), CASES.values(), ids=CASES)
def test_one_sentence(trio, monkeypatch, capfd, damage, options, said):
    patch = damage(trio) if damage else None
    if patch:
        monkeypatch.setattr(*patch)
    before = sorted(path.name for path in trio.iterdir())
    arguments = {"--base": "base", "--delta": "delta", "--out": "out"}
    arguments.update(zip(options[::2], options[1::2], strict=True))
    command = [part for option, place in arguments.items() for part in (option, str(trio / place))]
    with pytest.raises(SystemExit) as end:
        main(["delta", "apply", *command])
    out, err = capfd.readouterr()
    assert (end.value.code, out) == (2, "")
    last = err.strip().splitlines()[-1]
    assert last.startswith("k2mini: ")
    assert said in last
    assert sorted(path.name for path in trio.iterdir()) == before, "nothing is left, and no code has run"


def test_commands_convert_verify_and_info(trio, capfd):
    for arguments, status, said in (
        (["verify", trio / "delta"], 0, "files are as they were written"),
        (["info", trio / "delta"], 0, "a delta of format bits"),
        (["info", trio / "base"], 0, "to run it in int8"),
        (["convert", trio / "base", "--to", "bin", "--out", trio / "bin"], 0, "bin"),
        (["convert", trio / "base", "--to", "hf", "--out", trio / "x", "--shard-size", "many"], 2, "--shard-size must"),
        (["verify", trio], 2, "has no manifest.json of k2mini's weights"),
        (["info", trio], 2, "has no weights"),
        (
            ["convert", trio / "delta", "--to", "hf", "--out", trio / "x"],
            2,
            "is a delta, not a model; k2mini delta apply puts it on its base",
        ),
        (["merge", "--base", trio / "delta", "--adapter", trio / "base", "--out", trio / "x"], 2, "is a delta, not a"),
        (["convert", trio / "base", "--to", "hf", "--quantize", "int8", "--out", trio / "int8"], 0, "int8"),
        (
            ["merge", "--base", trio / "int8", "--adapter", trio / "base", "--out", trio / "x"],
            2,
            "int8 is quantised; an",
        ),
        (["convert", trio / "base", "--to", "meta", "--out", trio / "meta"], 0, "meta"),
        (["generate", "--model", trio / "meta", "--prompt", "x"], 2, "it is in Meta's layout, which k2mini convert"),
    ):
        with pytest.raises(SystemExit) as end:
            main([str(part) for part in arguments])
        printed = "".join(capfd.readouterr())
        assert (end.value.code, said in printed) == (status, True), printed


def test_memory_stays_far_below_the_model(tmp_path):
    """600 MB pass through; what can't be evicted grows by less than 150 MB (tools/bench_weights.py does it with 7B)."""
    config = tiny_config(dim=1024, num_heads=16, num_kv_heads=16, head_dim=64, intermediate_dim=4096, vocab_size=32000)
    for name, seed in (("base", 0), ("tuned", 1)):
        model = tiny_llama(config, seed, torch.float16)
        save_model(model.state_dict(), config, tmp_path / name)
        assert (tmp_path / name / "model.safetensors").stat().st_size > 200e6
    code = f"""
import threading, time
from pathlib import Path
from k2mini.weights.delta import apply_delta, make_delta

def kept():
    fields = Path("/proc/self/status").read_text().split()
    return sum(int(fields[fields.index(key) + 1]) for key in ("RssAnon:", "RssShmem:")) / 1024

folder, peak, start = Path({str(tmp_path)!r}), [0], kept()

def watch():
    while True:
        peak[0] = max(peak[0], kept())
        time.sleep(0.002)

threading.Thread(target=watch, daemon=True).start()
make_delta(folder / "base", folder / "tuned", folder / "delta")
apply_delta(folder / "base", folder / "delta", folder / "out")
print(peak[0] - start)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 150
