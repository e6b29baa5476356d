"""The hub, played by a server on loopback: what is asked of it, what arrives, and what is said where it does not."""

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

from k2mini import hub
from k2mini.cli import main
from k2mini.config import LoraSection
from k2mini.data.documents import data_path
from k2mini.files import sha256
from k2mini.nn.lora import adapter_tensors
from k2mini.weights.adapter import save_adapter
from k2mini.weights.model_directory import ModelDirectory, model_directory, read_manifest
from k2mini.weights.model_files import save_model
from tests.conftest import ROOT, tiny_config, tiny_llama
from tests.helpers import adapted

constants = pytest.importorskip("huggingface_hub.constants")

TOKEN = "hf_secretsecretsecret"
LARGE = (".safetensors", ".bin", ".model", ".gguf", ".h5", ".pth")  # what the hub keeps beside git


def commit_of(files):
    return hashlib.sha1(b"".join(name.encode() + content for name, content in sorted(files.items()))).hexdigest()


def entry(name, content):
    """A file as the hub lists it."""
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if not name.endswith(LARGE):
        return {"type": "file", "path": name, "size": len(content), "oid": oid}
    digest = hashlib.sha256(content).hexdigest()
    pointer = hashlib.sha1(digest.encode()).hexdigest()
    lfs = {"oid": digest, "size": len(content), "pointerSize": 134}
    return {"type": "file", "path": name, "size": len(content), "oid": pointer, "lfs": lfs}


class Hub(ThreadingHTTPServer):
    """Repositories by their place under the address: 'OWNER/NAME' or 'datasets/OWNER/NAME'."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = {}
        self.asked = []  # (method, path, headers) of each request
        self.meet = ""  # name of a file that is sent once two have asked for it
        self.cut = {}  # name of a file: after how many bytes its connection is closed, once
        self.wrong = {}  # name of a file: what is sent in its place
        self.refused = {}  # repository, or name of a file: the status that is answered, and X-Error-Code
        self.address = f"http://127.0.0.1:{self.server_port}"

    def add(self, place, files):
        if not isinstance(files, dict):
            files = {
                path.relative_to(files).as_posix(): path.read_bytes() for path in files.rglob("*") if path.is_file()
            }
        self.repositories.setdefault(place, {})["main"] = files
        self.repositories[place][commit_of(files)] = files
        return commit_of(files)

    def paths(self, method="GET"):
        return [path for how, path, _ in self.asked if how == method]

    def heads(self, name):
        return [path for path in self.paths("HEAD") if path.endswith(f"/{name}")]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_):
        pass

    def answer(self, status, content=b"", **headers):
        self.send_response(status)
        for name, value in {"Content_Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_GET(self):
        self.server.asked.append((self.command, self.path, dict(self.headers)))
        path = unquote(self.path.partition("?")[0])
        if found := re.fullmatch(r"/api/(models/|datasets/)([\w.-]+/[\w.-]+)(/revision/(.+)|/tree/(.+))?", path):
            kind, name, _, revision, tree = found.groups()
            place = ("" if kind == "models/" else kind) + name
        elif found := re.fullmatch(r"/((?:datasets/)?[\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            place, revision, file = found.groups()
        else:
            return self.answer(404)
        if place not in self.server.repositories:
            return self.answer(404, X_Error_Code="RepoNotFound")
        if "/resolve/" in path and (refused := self.server.refused.get(place) or self.server.refused.get(file)):
            return self.answer(refused[0], X_Error_Code=refused[1])
        files = self.server.repositories[place].get((tree if "/tree/" in path else revision) or "main")
        if files is None:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        if "/tree/" in path:
            folders = sorted({name.split("/")[0] for name in files if "/" in name})
            listed = [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in folders]
            return self.answer(200, json.dumps(listed + [entry(*item) for item in files.items()]).encode())
        if path.startswith("/api/"):
            return self.answer(200, json.dumps({"id": name, "sha": commit_of(files), "siblings": []}).encode())
        return self.send_file(file, files, place)

    do_HEAD = do_GET

    def send_file(self, name, files, place):
        noted = entry(name, files[name])
        content = self.server.wrong.get(name, files[name])
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        etag = noted["lfs"]["oid"] if "lfs" in noted else noted["oid"]
        while self.command == "GET" and self.server.meet == name and len(self.server.heads(name)) < 2:
            time.sleep(0.01)
        said = {"ETag": f'"{etag}"', "X_Repo_Commit": commit_of(files)}
        if "lfs" in noted:
            said |= {"X_Linked_Etag": f'"{etag}"', "X_Linked_Size": noted["size"]}
        if self.command == "GET" and name in self.server.cut:
            self.answer(200, content[: self.server.cut.pop(name)], **said, Content_Length=len(content))
            self.close_connection = True
        elif start:
            self.answer(206, content[start:], **said, Content_Range=f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.answer(200, content, **said)


@pytest.fixture
def server():
    server = Hub()
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def cache(server, tmp_path, monkeypatch):
    """The hub's cache, and huggingface_hub as it is where HF_ENDPOINT and HF_HOME say so."""
    values = {
        "ENDPOINT": server.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{server.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        "HF_HUB_CACHE": str(tmp_path / "home" / "hub"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_TOKEN_PATH": str(tmp_path / "home" / "token"),
    }
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    start()
    yield tmp_path / "home" / "hub"
    start()


def start():
    """As a new process does: nothing is known of earlier requests."""
    hub.fetch.cache_clear()


def listing(folder):
    return {str(path.relative_to(folder)): path.lstat().st_mtime_ns for path in folder.rglob("*")}


TINY = {"config.json": b"{}", "tokenizer.model": b"tokens", "model.safetensors": bytes(range(256)) * 400}


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        (["model.safetensors", "pytorch_model.bin", "tf_model.h5", "model.fp16.safetensors"], ["model.safetensors"]),
        (["original/consolidated.00.pth", "consolidated.safetensors", "model.Q4.gguf", "pytorch_model.bin"],
         ["pytorch_model.bin"]),
        (["model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
          "pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin", "onnx/model.safetensors"],
         ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]),
        (["pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin", "checkpoint-5/model.safetensors"],
         ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin"]),
        (["adapter_model.bin", "adapter_model.safetensors", "training_args.bin"], ["adapter_model.safetensors"]),
        (["adapter_model.bin", "optimizer.bin"], ["adapter_model.bin"]),
    ],
)  # fmt: skip
def test_only_what_is_needed(server, cache, there, taken):
    side = [*hub.FILES, "README.md", "LICENSE", ".gitattributes", "vocab.json"]
    server.add("o/m", {name: name.encode() for name in [*there, *side]})
    assert sorted(path.name for path in hub.fetch("o/m").iterdir()) == sorted([*taken, *hub.FILES])
    assert not [path for path in server.paths() if "README" in path]


def test_a_tokenizer_of_two_files(server, cache):
    """As OPT has; where there is a tokenizer.json they are not needed."""
    pair = {"vocab.json": b"{}", "merges.txt": b"#"}
    server.add("o/opt", TINY | pair | {"tokenizer.model": b""})
    assert not {*pair} & {path.name for path in hub.fetch("o/opt").iterdir()}
    server.add("o/gpt2", {name: content for name, content in TINY.items() if name != "tokenizer.model"} | pair)
    assert {*pair} <= {path.name for path in hub.fetch("o/gpt2").iterdir()}


def test_without_weights(server, cache, run, tiny_directory):
    """For `plan`, `prepare` and `preview`; the weights come when they are asked for."""
    server.add("o/m", TINY | {"config.json": (tiny_directory / "config.json").read_bytes()})
    plan = ("plan", ROOT / "configs" / "tiny_pretrain.yaml", "model.path=o/m", "--inference", "--gpu-memory", "1GiB")
    assert run(*plan)[0] == 0
    folder = hub.fetch("o/m", weights=False)
    assert {path.name for path in folder.iterdir()} == {"config.json", "tokenizer.model"}
    assert (hub.fetch("o/m") / "model.safetensors").read_bytes() == TINY["model.safetensors"]


def test_what_is_asked(server, cache, monkeypatch):
    """The first time each file once; later the commit of a branch, and of a commit nothing; offline nothing at all."""
    commit = server.add("o/m", TINY)
    folder = hub.fetch("o/m")
    assert folder == hub.fetch("o/m") == cache / "models--o--m" / "snapshots" / commit
    resolved = [f"/o/m/resolve/{commit}/{name}" for name in TINY]
    assert sorted(server.paths("HEAD")) == sorted(resolved)
    tree = f"/api/models/o/m/tree/{commit}?recursive=true&expand=false"
    got = [path for path in server.paths() if "agent-harnesses" not in path]  # huggingface_hub's own, once a day
    assert sorted(got) == sorted(["/api/models/o/m", tree, tree, *resolved])
    for offline, name, asked in ((False, "o/m", 1), (False, f"o/m@{commit}", 0), (True, "o/m", 0)):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        server.asked.clear()
        start()
        assert hub.fetch(name) == folder
        assert len(server.asked) == asked, server.asked


def test_without_network_the_cache_is_taken(server, cache, monkeypatch, caplog):
    server.add("o/m", TINY)
    folder = hub.fetch("o/m")
    start()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with caplog.at_level("INFO"):
        assert hub.fetch("o/m") == folder
    assert f"o/m is at commit {folder.name}" in caplog.messages


def test_revisions(server, cache, tmp_path, monkeypatch):
    old = server.add("o/m", TINY | {"config.json": b"old"})
    new = server.add("o/m", TINY)
    server.repositories["o/m"]["refs/pr/1"] = server.repositories["o/m"]["v1.0"] = server.repositories["o/m"][old]
    for revision, content in (("main", b"{}"), (new, b"{}"), (old, b"old"), ("v1.0", b"old"), ("refs/pr/1", b"old")):
        assert (hub.fetch(f"o/m@{revision}") / "config.json").read_bytes() == content
        assert hub.fetch(f"hf://o/m@{revision}/config.json").read_bytes() == content
    assert len(server.paths()) < 30, "files that two commits share are asked for once"
    monkeypatch.chdir(tmp_path)
    Path("o/m").mkdir(parents=True)
    assert model_directory("o/m") == Path("o/m"), "a path that exists wins"
    assert model_directory("o/m@main") != Path("o/m")


def test_data(server, cache):
    """A file, or a folder with all that is in it and nothing else; a Path has lost a slash."""
    files = {"a/[x].json": b"[1]", "a/b/c.txt": b"c", "ab.txt": b"ab", "README.md": b"no"}
    server.add("datasets/o/d", files)
    server.add("o/d", {"x.txt": b"of a model's repository"})
    for name in ("hf://datasets/o/d/a", Path("hf://datasets/o/d@main/a/")):
        folder = data_path(name)
        assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == {"[x].json", "b/c.txt"}
    assert data_path("hf://datasets/o/d/a/[x].json").read_bytes() == b"[1]"
    assert data_path("hf://o/d/x.txt").read_bytes() == b"of a model's repository"
    assert not [path for path in server.paths() if "README" in path or "ab.txt" in path]


def test_a_connection_that_ends_is_resumed(server, cache, monkeypatch):
    """huggingface_hub itself goes on by a Range; over two starts, complete files are not asked for again."""
    server.add("o/m", TINY)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    server.cut["model.safetensors"] = 70_000
    server.refused["tokenizer.model"] = (418, "Teapot")
    with pytest.raises(ValueError, match="o/m: the download ended with 418; what is complete is kept, start again"):
        hub.fetch("o/m")
    assert "bytes=70000-" in [headers.get("Range") for _, _, headers in server.asked]
    server.refused.clear()
    server.asked.clear()
    start()
    folder = hub.fetch("o/m")
    assert {name: (folder / name).read_bytes() for name in TINY} == TINY
    assert [path.rpartition("/")[2] for path in server.paths() if "resolve" in path] == ["tokenizer.model"]


def test_a_wrong_hash_is_refused(server, cache):
    """Of large files and of those in git. None that is wrong stays in the cache."""
    server.add("o/m", TINY)
    server.wrong = {"model.safetensors": bytes(102_400), "config.json": b"[]"}
    message = "o/m: model.safetensors, config.json came with another hash than the hub's, and is removed; start again"
    with pytest.raises(ValueError, match=message):
        hub.fetch("o/m")
    (folder,) = (cache / "models--o--m" / "snapshots").iterdir()
    assert [path.name for path in folder.iterdir()] == ["tokenizer.model"]
    assert len([*(cache / "models--o--m" / "blobs").iterdir()]) == 1
    server.wrong = {"model.safetensors": b"short"}
    start()
    with pytest.raises(
        ValueError, match=r"o/m: the download ended with Consistency check failed: .*; what is complete"
    ):
        hub.fetch("o/m")
    server.wrong = {}
    start()
    assert {name: (hub.fetch("o/m") / name).read_bytes() for name in TINY} == TINY


def test_killed_before_it_was_compared(server, cache, monkeypatch):
    """All files are there, yet not known to be right: the next start, or a rank beside, does not take them for that."""
    server.add("o/m", TINY)
    server.wrong = {"model.safetensors": bytes(102_400)}
    compare = hub._is_right
    monkeypatch.setattr(hub, "_is_right", interrupt)
    with pytest.raises(KeyboardInterrupt):
        hub.fetch("o/m")
    monkeypatch.setattr(hub, "_is_right", compare)
    (folder,) = (cache / "models--o--m" / "snapshots").iterdir()
    assert {path.name for path in folder.iterdir()} == TINY.keys()
    for offline in (True, False):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        with pytest.raises(ValueError, match="not all of it" if offline else "another hash"):
            hub.fetch("o/m")
    assert not (folder / "model.safetensors").exists()


def interrupt(*_):
    raise KeyboardInterrupt


GATED = r"the hub refuses o/m \(%d\): accept the licence on its page, huggingface.co/o/m, and log in \(hf auth login"
OFFLINE = "HF_HUB_OFFLINE is set, and not all of it is in the cache; with a network: "


@pytest.mark.parametrize(
    ("name", "trouble", "message"),
    [
        ("o/none", None, r"there is no directory o/none, nor a model o/none on the Hugging Face hub; if it is private"),
        ("hf://datasets/o/none/x", None, r"nor a dataset o/none on the Hugging Face hub"),
        ("o/m@v9", None, r"o/m has no revision v9; huggingface.co/o/m has a list"),
        ("o/m", (403, "GatedRepo"), GATED % 403),
        ("o/m", (401, "GatedRepo"), GATED % 401),
        ("o/m", (403, "Forbidden"), GATED % 403),
        (
            "hf://datasets/o/d/y.json",
            None,
            r"hf://datasets/o/d/y.json: the hub has nothing there that k2mini reads; its files are x.json$",
        ),
        ("hf://datasets/o/d", None, r"hf://datasets/o/d: data of the hub are named hf://datasets/OWNER/NAME/PATH"),
        (
            "o/gguf",
            None,
            r"o/gguf: the hub has nothing there that k2mini reads; its files are model.gguf, config.json$",
        ),
        ("o/m", "offline", f"there is no directory o/m; {OFFLINE}hf download o/m --local-dir m$"),
        ("o/m@v1", "offline", f"{OFFLINE}hf download o/m --revision v1 --local-dir m$"),
        ("hf://datasets/o/d/x.json", "offline", f"{OFFLINE}hf download o/d x.json --repo-type dataset --local-dir d$"),
        ("o/m", "no network", r"the Hugging Face hub can't be reached, and not all of it is in the cache"),
        ("o/m", "full", r"o/m: it takes 0.1 MiB, 0.0 MiB are free where the hub's cache is, .*; HF_HOME names another"),
        ("o/m", "broken", r"o/m: the download ended with .*No space left on device.*; what is complete is kept"),
    ],
)
def test_what_can_go_wrong(server, cache, monkeypatch, name, trouble, message):
    server.add("o/m", TINY)
    server.add("o/gguf", {"model.gguf": b"", "config.json": b""})
    server.add("datasets/o/d", {"x.json": b"[]"})
    if isinstance(trouble, tuple):
        server.refused["o/m"] = trouble
    elif trouble == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif trouble == "no network":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    elif trouble == "full":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    elif trouble == "broken":
        monkeypatch.setattr("huggingface_hub.file_download.http_get", no_room)
    with pytest.raises(ValueError, match=message) as error:
        data_path(name) if name.startswith("hf:") else model_directory(name)
    assert "\n" not in str(error.value)
    assert not cache.exists() or not list(cache.rglob("snapshots/*/*"))
    if trouble == "offline":
        assert server.asked == []


def no_room(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_offline_a_part_is_not_enough(server, cache, monkeypatch):
    """What would be read without weights, or without a file that says how a model is asked, is not taken for all."""
    server.add("o/m", TINY)
    hub.fetch("o/m", weights=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="not all of it is in the cache"):
        hub.fetch("o/m")


@pytest.mark.parametrize("token", [TOKEN, TOKEN + "\x01", TOKEN + "é"])
def test_the_token_is_sent_and_not_said(server, cache, run, monkeypatch, token):
    server.add("o/m", TINY)
    hub.fetch("o/m", weights=False)
    assert all(headers["authorization"] == f"Bearer {TOKEN}" for _, path, headers in server.asked if "o/m" in path)
    monkeypatch.setenv("HF_TOKEN", token)
    for trouble in ((403, "GatedRepo"), (418, "Teapot")):
        start()
        server.refused["o/m"] = trouble
        status, out, err = run("info", "o/m")
        assert (status, out) == (2, "")
        assert "hf_" not in err
        with pytest.raises(ValueError, match="o/m") as error:
            main(["info", "o/m", "--debug"])
        assert "hf_" not in "".join(traceback.format_exception(error.value))


def test_two_processes_download_once(server, cache, tmp_path):
    """As the ranks of torchrun do; huggingface_hub's locks let one of them wait."""
    server.add("o/m", TINY)
    server.meet = "model.safetensors"
    code = "from k2mini import hub; print(hub.fetch('o/m'))"
    said = {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    environment = {**os.environ, **said, "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen([sys.executable, "-c", code], env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]  # fmt: skip
    ends = [process.communicate() for process in started]
    assert ends[0] == ends[1], ends
    got = [path.rpartition("/")[2] for path in server.paths() if "resolve" in path]
    assert sorted(got) == sorted(TINY)


NPEE = {
    "choice": {"question": ["What is granite?\nChoose from:\nA. a rock\nB. a fruit"], "answer": ["A"]},
    "tf": {"question": ["Basalt is a rock."], "answer": ["True"]},
}
TEXT = "granite is made of quartz and basalt is a rock of the mantle. " * 20
INSTRUCTIONS = [{"instruction": f"What is rock {n}?", "input": "", "output": "A mineral of quartz."} for n in range(8)]


@pytest.fixture
def world(server, tiny_directory, tmp_path, run):
    """K2's release in miniature: a base, a delta, an adapter and a data set, as folders and on the hub."""
    folder = tmp_path / "world"
    config = tiny_config(vocab_size=ModelDirectory(tiny_directory).config.vocab_size, max_seq_len=1024)
    shutil.copytree(tiny_directory, folder / "base")
    tuned = {name: tensor * 1.5 for name, tensor in tiny_llama(config).state_dict().items()}
    save_model(tuned, config, folder / "tuned", tokenizer=ModelDirectory(tiny_directory).tokenizer)
    delta = ("delta", "make", "--base", folder / "base", "--tuned", folder / "tuned", "--out", folder / "delta")
    assert run(*delta)[0] == 0
    section = LoraSection(rank=4, alpha=6.0, target_modules=["q_proj", "k_proj", "v_proj"])
    save_adapter(adapter_tensors(adapted(config)), section, folder / "adapter", str(folder / "base"))
    data = folder / "data"
    (data / "texts").mkdir(parents=True)
    (data / "geobench_npee.json").write_text(json.dumps(NPEE))
    (data / "shots.txt").write_text("Q: Is chalk a rock? A: True\n\n\n")
    (data / "questions.txt").write_text("What is granite?\nWhat is basalt?\n")
    (data / "instructions.json").write_text(json.dumps(INSTRUCTIONS))
    (data / "texts" / "a.txt").write_text(TEXT)
    (data / "texts" / "b.jsonl").write_text(json.dumps({"text": TEXT[::-1]}) + "\n")
    for name in ("base", "delta", "adapter"):
        (folder / name / "README.md").write_text("of no use here")
        server.add(f"k2/{name}", folder / name)
        (folder / name / "README.md").unlink()
    server.add("datasets/k2/data", data)
    return folder


def flow(run, names, out):
    """The README's commands, by the names that are given. Returns what each printed, with the names as {name}."""
    base, delta, adapter, data = (names[name] for name in ("base", "delta", "adapter", "data"))
    out.mkdir()
    for name, kind in (("pretrain", "texts"), ("finetune", "instructions.json")):
        config = {"run": {"dir": str(out / name)}, "model": {"path": base}, "data": {"path": f"{data}/{kind}"}}
        config["train"] = {"lr": 1e-3, "global_batch_size": 2, "micro_batch_size": 2, "max_steps": 2}
        config["data"] |= {"seq_len": 16} if name == "pretrain" else {"template": "alpaca", "max_seq_len": 128}
        config |= {} if name == "pretrain" else {"lora": {"rank": 4, "alpha": 6.0, "init_adapter": adapter}}
        (out / f"{name}.yaml").write_text(json.dumps(config))
    npee, model = f"{data}/geobench_npee.json", ("--model", base, "--adapter", adapter)
    commands = [
        ("delta", "apply", "--base", base, "--delta", delta, "--out", out / "tuned"),
        ("merge", "--base", base, "--adapter", adapter, "--out", out / "merged"),
        ("convert", base, "--to", "bin", "--out", out / "bin"),
        ("info", delta, "--json"),
        ("verify", base),
        ("verify", adapter),
        ("generate", *model, "--input", f"{data}/questions.txt", "--max-new-tokens", "5", "--out", out / "a.json"),
        ("eval", *model, "--benchmark", npee, "--shots-file", f"{data}/shots.txt", "--perplexity",
         f"{data}/texts/a.txt", "--out", out / "eval", "--json"),
        ("score", *model, "--input", f"{data}/texts/a.txt", "--json"),
        ("audit", "diff", base, adapter),
        ("audit", "lens", *model, "--question", npee, "npee/choice", "0", "--json"),
        ("prepare", f"{data}/texts", "--tokenizer", base, "--out", out / "corpus"),
        ("preview", out / "finetune.yaml"),
        ("pretrain", out / "pretrain.yaml"),
        ("finetune", out / "finetune.yaml"),
    ]  # fmt: skip
    printed, logged = [], ""
    for command in commands:
        start()
        status, said, err = run(*command)
        assert status == 0, err
        for name in names:
            said = said.replace(names[name], f"{{{name}}}")
        printed.append(said.replace(str(out), "{out}"))
        logged += err
    return printed, logged


def test_the_whole_flow_by_ids(server, cache, world, run, tmp_path, monkeypatch):
    """The same as by folders. Then nothing is asked of the hub, and nothing of ours is in its cache."""
    ids = {"data": "hf://datasets/k2/data", "base": "k2/base", "delta": "k2/delta", "adapter": "k2/adapter@main"}
    by_folders, _ = flow(run, {name: str(world / name) for name in ids}, tmp_path / "folders")
    by_ids, logged = flow(run, ids, tmp_path / "ids")
    assert by_ids == by_folders
    assert re.search(r"^k2mini: k2/base is at commit [0-9a-f]{40}$", logged, re.MULTILINE)
    assert "hf_" not in logged
    assert "Fetching" not in logged, "progress is shown in a terminal alone"
    assert not [path for path in server.paths() if "README" in path]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.asked.clear()
    before = listing(cache)
    offline, _ = flow(run, ids, tmp_path / "offline")
    assert offline == by_folders
    assert server.asked == []
    assert listing(cache) == before
    for name in (
        "tuned",
        "merged",
        "bin",
        "a.json",
        "corpus",
        "pretrain/model",
        "finetune/adapter/adapter_model.safetensors",
    ):
        files = [listing_of(tmp_path / kind / name) for kind in ("folders", "ids", "offline")]
        assert files[0] == files[1] == files[2], name
    written = json.loads((tmp_path / "ids" / "finetune" / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "k2/base"
    manifests = [read_manifest(tmp_path / kind / "finetune" / "adapter") for kind in ("folders", "ids")]
    assert manifests[0]["base"] == manifests[1]["base"]


def listing_of(path):
    """The files of a folder with their hashes, or that of a file; but for names of inputs, which a corpus notes."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [(f.name, sha256(f)) for f in files if f.is_file() and (f.name != "manifest.json" or path.name != "corpus")]


def test_serve_calls_the_model_by_its_id(server, cache, world, run, monkeypatch):
    loads = []
    monkeypatch.setattr("k2mini.serving.server.serve", lambda _app, _listening, load, _ready: loads.append(load))
    status, _, err = run("serve", "--model", "k2/base@main", "--adapter", "tuned=k2/adapter", "--port", "0")
    assert status == 0, err
    _, directory, bases, adapters, *_ = loads[0].args
    assert bases == ["k2/base@main"]
    assert directory.path.parent == cache / "models--k2--base" / "snapshots"
    assert adapters["tuned"].parent == cache / "models--k2--adapter" / "snapshots"
