"""Files made to harm: no code in them runs, nothing outside is read or written, and they are refused quickly."""

import gzip
import io
import json
import os
import pickle
import shutil
import struct
import zipfile

import pytest
import torch

from tests.faults.world import GENERATE, copy, listing, said


class Evil:
    """A pickle of it makes the file `ran` in the folder in which it is loaded."""

    def __reduce__(self):
        return (exec, ("open('ran', 'w').close()",))


def _zip(**entries):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in entries.items():
            file.writestr(name.replace("__", "/"), data)
    return content.getvalue()


def _saved(value):
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def _header(raw):
    return struct.pack("<Q", len(raw)) + raw


def _index(name):
    return json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": name}}).encode()


def _manifest(folder, name):
    raw = json.loads((folder / "x_model/manifest.json").read_text())
    raw["files"][name] = next(iter(raw["files"].values()))
    return json.dumps(raw).encode()


def _changed(path, key, value):
    return json.dumps({**json.loads(path.read_text()), key: value}).encode()


def _compressed(folder):
    """A file of torch.save, its entries compressed, which a memory map would read as they stand."""
    with zipfile.ZipFile(folder / "x_bin/pytorch_model-00001-of-00002.bin") as file:
        entries = {name.replace("/", "__"): file.read(name) for name in file.namelist()}
    return _zip(**entries, archive__padding=os.urandom(10**6))


EVIL = pickle.dumps(Evil())
BIN, PTH, STEP = (
    "x_bin/pytorch_model-00001-of-00002.bin",
    "x_meta/consolidated.00.pth",
    "x_run/checkpoints/step_0000001",
)
LORA = "x_adapter/adapter_config.json"
ASK, CONVERT = f"generate --model {{}} {GENERATE}", "convert {} --to hf --out out"
HUGE = {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 2**60]}}
BOMB = gzip.compress(b'{"text": "' + b"\0" * 2**28 + b'"}\n', 9)
PREPARE = "prepare {} --tokenizer x_model --out out"
# What -> the file, its content, the command, what it says (one of), where it is refused.
FILES = {
    "pickle in .bin": (BIN, lambda _: _saved({"a": Evil()}), ASK.format("x_bin")),
    "bare pickle as .bin": (BIN, lambda _: EVIL, CONVERT.format("x_bin")),
    "pickle in .pth": (PTH, lambda _: _saved({"a": Evil()}), CONVERT.format("x_meta")),
    "zip without a pickle": (BIN, lambda _: _zip(archive__data="x"), ASK.format("x_bin")),
    "zip with a path": (BIN, lambda _: _zip(archive__data="x", **{"..__..__ran": "x"}), ASK.format("x_bin")),
    "compressed entries": (BIN, _compressed, ASK.format("x_bin")),
    "adapter's .bin": ("x_adapter/adapter_model.bin", lambda _: _saved({"a": Evil()}), "info x_adapter"),
    "checkpoint's metadata": (f"{STEP}/.metadata", lambda _: EVIL, "export x_run/checkpoints/step_0000001 --out out"),
    "checkpoint's entries": (f"{STEP}/__0_0.distcp", lambda _: EVIL * 9000, f"export {STEP} --out out"),
    "metadata on resuming": (f"{STEP}/.metadata", lambda _: EVIL, "pretrain x_pre.yaml run.dir=x_run"),
    "index to above": ("x_index/model.safetensors.index.json", lambda _: _index("../x_model/model.safetensors"),
                       ASK.format("x_index")),
    "index to the root": ("x_index/model.safetensors.index.json", lambda _: _index("/etc/passwd"),
                          ASK.format("x_index")),
    "manifest to above": ("x_model/manifest.json", lambda f: _manifest(f, "../x_user.jsonl"), "verify x_model"),
    "manifest to the root": ("x_model/manifest.json", lambda f: _manifest(f, "/etc/passwd"), "verify x_model"),
    "header of 8 EB": ("x_model/model.safetensors", lambda _: struct.pack("<Q", 2**63) + b"{}", ASK.format("x_model")),
    "header of brackets": ("x_model/model.safetensors", lambda _: _header(b"[" * 10**6), ASK.format("x_model")),
    "tensor of 2**80": ("x_model/model.safetensors", lambda _: _header(json.dumps(HUGE).encode()), "info x_model"),
    "tokenizer of nothing": ("x_model/tokenizer.model", lambda _: b"\x0a\xff\xff\xff\xff\x0f", ASK.format("x_model")),
    "tokenizer of text": ("x_model/tokenizer.model", lambda _: b"granite" * 10**5, PREPARE.format("x_docs.txt")),
    "tag in YAML": ("x_pre.yaml", lambda _: b"run: !!python/object/apply:builtins.open [ran, w]\n",
                    "pretrain x_pre.yaml"),
    "gzip of 256 MB": ("x_docs.jsonl.gz", lambda _: BOMB, PREPARE.format("x_docs.jsonl.gz")),
    "rank of 10**12": (LORA, lambda f: _changed(f / LORA, "r", 10**12),
                       f"generate --model x_model --adapter x_adapter {GENERATE}"),
    "10**9 layers": ("x_model/config.json", lambda f: _changed(f / "x_model/config.json", "num_hidden_layers", 10**9),
                     ASK.format("x_model")),
    "vocabulary of 10**15": ("x_model/config.json", lambda f: _changed(f / "x_model/config.json", "vocab_size", 10**15),
                             ASK.format("x_model")),
}  # fmt: skip


@pytest.fixture
def attacked(template, tmp_path):
    copy(template, tmp_path / "w", [path.name for path in template.iterdir()])
    return tmp_path / "w"


@pytest.mark.parametrize("what", FILES)
def test_no_payload_runs(forks, attacked, what):
    """Status 2 with one sentence, in seconds, with nothing written."""
    name, content, line = FILES[what]
    if "adapter_model.bin" in name:
        (attacked / "x_adapter/adapter_model.safetensors").unlink()
    (attacked / name).write_bytes(content(attacked))
    before = listing(attacked)
    end = forks.one(attacked, line)
    assert end.is_sentence, said(end)
    assert not (attacked / "ran").exists(), "code ran"
    assert {n for n in listing(attacked) - before if ".parts" not in n} <= {"out", "out/config.yaml"}, (
        "it wrote something"
    )
    assert len(end.last) < 1500


@pytest.mark.parametrize("line", ["verify {}", "convert {} --to hf --out out", f"generate --model {{}} {GENERATE}"])
def test_a_link_out_of_a_model(forks, attacked, line):
    """Links are followed when they are read (the hub's cache is made of them); a copy of one has its content."""
    secret = attacked / "secret"
    secret.write_text("secret")
    (attacked / "x_model/LICENSE").symlink_to(secret)
    end = forks.one(attacked, line.format("x_model"))
    assert end.status == 0, said(end)
    assert "secret" not in end.out
    assert not [path for path in listing(attacked) if path.startswith("out") and "LICENSE" in path]
    shutil.rmtree(attacked)
