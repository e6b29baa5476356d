"""What others wrote, or a careless hand changed: a right result, or one sentence that names the file."""

import json
import os
import signal
from pathlib import Path
from random import Random

import pytest
import torch

from k2mini.cli import main
from k2mini.config import LoraSection
from k2mini.nn.lora import adapter_tensors
from k2mini.weights.adapter import save_adapter
from k2mini.weights.convert import convert
from k2mini.weights.delta import apply_delta, make_delta
from k2mini.weights.merge import merge_adapters
from k2mini.weights.model_directory import manifest_text
from k2mini.weights.model_files import save_model
from tests.conftest import tiny_config, tiny_llama
from tests.faults.server import Request
from tests.helpers import adapted


@pytest.fixture
def folder(tmp_path, tiny_tokenizer):
    """A directory of each kind that commands read."""
    config = tiny_config(vocab_size=tiny_tokenizer.vocab_size, num_layers=1, dim=16, num_heads=2, num_kv_heads=2,
                         head_dim=8, intermediate_dim=24)  # fmt: skip
    for name, seed in (("base", 0), ("tuned", 1)):
        save_model(tiny_llama(config, seed).state_dict(), config, tmp_path / name, tokenizer=tiny_tokenizer)
    for kind in ("bits", "add"):
        make_delta(tmp_path / "base", tmp_path / "tuned", tmp_path / kind, kind=kind)
    save_model(tiny_llama(config).state_dict(), config, tmp_path / "shards", tokenizer=tiny_tokenizer, shard_bytes=9000)
    model = adapted(config)
    section = LoraSection(rank=4, alpha=6.0, dropout=0.0)
    save_adapter(adapter_tensors(model), section, tmp_path / "adapter", str(tmp_path / "base"))
    convert(tmp_path / "base", "bin", tmp_path / "bin")
    convert(tmp_path / "base", "meta", tmp_path / "meta")
    return tmp_path


def content(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


WRITERS = {
    "hf": (["convert", "base", "--to", "hf"], ["base"]),
    "bin": (["convert", "base", "--to", "bin"], ["base"]),
    "meta": (["convert", "base", "--to", "meta"], ["base"]),
    "merge": (["merge", "--base", "base", "--adapter", "adapter"], ["base", "adapter"]),
    "make": (["delta", "make", "--base", "base", "--tuned", "tuned"], ["base", "tuned"]),
    "apply": (["delta", "apply", "--base", "base", "--delta", "bits"], ["base", "bits"]),
}


@pytest.mark.parametrize("command", WRITERS)
def test_no_input_is_written(folder, run, command, monkeypatch):
    """Not itself, not below it, not around it, not through a link: said before anything is read."""
    monkeypatch.chdir(folder)
    words, inputs = WRITERS[command]
    for number, name in enumerate(inputs):
        moved = Path(name).rename(f"around{number}")
        Path(name).mkdir()
        moved.rename(f"{name}/it")
        words = [f"{name}/it" if word == name else word for word in words]
        Path(f"link{number}").symlink_to(f"{name}/it")
    monkeypatch.setattr("k2mini.weights.model_directory.safe_open", lambda *_, **__: pytest.fail("it was read"))
    before = content(folder)
    for number, name in enumerate(inputs):
        for out in (name, f"{name}/it", f"{name}/it/below", f"link{number}", f"{name}/it/../it"):
            status, printed, said = run(*words, "--out", out, "--force")
            assert (status, printed) == (2, ""), said
            assert "input" in said or "symbolic link" in said
    assert content(folder) == before


def test_no_file_of_a_model_is_overwritten(folder, run):
    """As `--to gguf` would, whose output is a file: by name, by a hard link, or where a link in the model leads."""
    pytest.importorskip("gguf")
    (folder / "store").mkdir()
    weights = folder / "base" / "model.safetensors"
    weights.rename(folder / "store" / "blob")
    weights.symlink_to("../store/blob")
    os.link(folder / "base" / "config.json", folder / "hard")
    (folder / "meta" / "tokenizer.model").rename(folder / "tokenizer.model")
    before = content(folder)
    for model, out in (
        ("base", "base/config.json"), ("base", "base/model.safetensors"), ("base", "store/blob"), ("base", "hard"),
        ("base", "base/new.gguf"), ("meta", "tokenizer.model"),
    ):  # fmt: skip
        status, _, said = run("convert", folder / model, "--to", "gguf", "--out", folder / out, "--force")
        assert (status, "input" in said) == (2, True), said
    for kind in ("hf", "bin"):
        status, _, said = run("convert", folder / "base", "--to", kind, "--out", folder / "store", "--force")
        assert (status, "an input, is inside" in said) == (2, True), said
    assert content(folder) == before


def killed(words):
    """Convert, and be killed at the fifth tensor."""
    import gguf

    write, count = gguf.GGUFWriter.write_tensor_data, [0]

    def die(*arguments):
        count[0] += 1
        if count[0] == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(*arguments)

    gguf.GGUFWriter.write_tensor_data = die
    main(["convert", *words])


def test_a_killed_gguf_leaves_nothing_after_the_next_start(folder, run, forks):
    pytest.importorskip("gguf")
    (folder / "out").mkdir()
    out = folder / "out" / "model.gguf"
    words = [str(folder / "base"), "--to", "gguf", "--out", str(out)]
    end = forks.start(Request([words], str(folder), call="tests.weights.test_untrusted:killed")).wait()
    assert end.status == -signal.SIGKILL, end.err
    assert list(out.parent.iterdir())
    status, _, said = run("convert", folder / "base", "--to", "gguf", "--out", out)
    assert (status, "which a killed process left" in said) == (0, True), said
    assert [path.name for path in out.parent.iterdir()] == ["model.gguf"]


def edit(path, change, *, rehash=True):
    raw = json.loads(path.read_text())
    change(raw)
    raw.pop("sha256", None)
    path.write_text(manifest_text(raw) if rehash else json.dumps(raw))


@pytest.mark.parametrize("rehash", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        {"format": "k2mini manifest 0"},
        {"format": None},
        {"delta": "sum"},
        {"delta": ["add"]},
        {"delta": None},
        {"base": None},
        {"base": 5},
        {"kind": "model"},
        {"kind": "deltas"},
        {"tensors": None},
        {"files": []},
        {"files": {"../x": {"bytes": 1, "sha256": "0"}}},
        {"tensors": {"a": 5}},
    ],
    ids=str,
)
def test_a_sum_is_not_put_on_a_base_that_it_does_not_name(folder, change, rehash):
    """Whatever its manifest says: today's fields, changed, or no manifest of k2mini's at all."""
    edit(folder / "add" / "manifest.json", lambda raw: raw.update(change), rehash=rehash)
    with pytest.raises(ValueError, match=str(folder / "add")):
        apply_delta(folder / "tuned", folder / "add", folder / "out")
    for text in ("[]", "{}", '"x"'):
        (folder / "add" / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=r"manifest.json does not say the base"):
            apply_delta(folder / "tuned", folder / "add", folder / "out")
    (folder / "add" / "manifest.json").unlink()
    apply_delta(folder / "base", folder / "add", folder / "out")  # as FastChat's and K2's


@pytest.mark.parametrize("tuned", [None, [], {}, {"x": 1}, "dtype", "sha256"], ids=str)
def test_the_tuned_hashes_of_a_delta_are_there(folder, tuned):
    def change(raw):
        if isinstance(tuned, str):
            raw["tuned"]["model.norm.weight"][tuned] = [5]
        else:
            raw["tuned"] = tuned

    edit(folder / "bits" / "manifest.json", change)
    with pytest.raises(ValueError, match=r"tuned\.|is damaged there"):
        apply_delta(folder / "base", folder / "bits", folder / "out")
    assert not (folder / "out").exists()


ODD_ADAPTERS = {
    "r": (10**12, 10**30, True, "4", 4.0, None, -1, 0, [4]),
    "lora_alpha": ("6", True, [6], float("nan"), float("inf"), 0, -1, 10**30),
    "lora_dropout": (2, -0.1, "0", True, float("nan"), [0]),
    "use_rslora": ("no", 1, [False]),
    "target_modules": ([1], [["q_proj"]], "all-linear", {}, [None], [], None),
    "peft_type": (5, None, ["LORA"]),
    "bias": (5, "all", None),
    "modules_to_save": (["lm_head"],),
}


@pytest.mark.parametrize("field", ODD_ADAPTERS)
def test_odd_fields_of_an_adapter(folder, run, field):
    path = folder / "adapter" / "adapter_config.json"
    raw = json.loads(path.read_text())
    for value in ODD_ADAPTERS[field]:
        path.write_text(json.dumps({**raw, field: value}))
        for command in (
            ["generate", "--model", folder / "base", "--adapter", folder / "adapter", "--prompt", "a"],
            ["merge", "--base", folder / "base", "--adapter", folder / "adapter", "--out", folder / "out"],
        ):
            status, printed, said = run(*command)
            assert (status, printed, str(folder / "adapter") in said) == (2, "", True), (value, said)


@pytest.mark.parametrize(
    "weight_map",
    [None, [], {}, {"a": 5}, {"a": None}, {"a": ["x"]}, {"a": "/etc/passwd"}, {"a": "../base/model.safetensors"},
     {"a": ".."}, {"a": ""}, {"a": "."}, {"a": "x\0y"}, {"a": "config.json"}],
    ids=str,
)  # fmt: skip
def test_odd_indices(folder, run, weight_map):
    (folder / "shards" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    status, _, said = run("info", folder / "shards")
    assert (status, str(folder / "shards") in said) == (2, True), said


@pytest.mark.parametrize(
    "params", [[], 5, {}, {"dim": "16"}, {"dim": True}, {"n_layers": 10**9}, {"n_heads": 0}, {"norm_eps": float("nan")},
               {"n_kv_heads": "2"}, {"rope_theta": [1]}, {"dim": 10**30}, {"n_heads": 3}],
    ids=str,
)  # fmt: skip
def test_odd_params_of_metas(folder, params):
    (folder / "meta" / "manifest.json").unlink()
    raw = json.loads((folder / "meta" / "params.json").read_text())
    changed = {**raw, **params} if params and isinstance(params, dict) else params
    (folder / "meta" / "params.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=str(folder / "meta")):
        convert(folder / "meta", "hf", folder / "out")


def test_an_incomplete_base_is_not_merged(folder):
    path = folder / "base" / "model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path)
    (folder / "adapter" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"lacks model.norm.weight"):
        merge_adapters(folder / "base", [folder / "adapter"], folder / "out")


def test_a_sum_that_is_not_finite_is_refused(folder):
    path = folder / "add" / "model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"][1] = torch.inf
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"add/model.safetensors is .* bytes, not"):
        apply_delta(folder / "base", folder / "add", folder / "out")
    (folder / "add" / "manifest.json").unlink()  # as FastChat's
    with pytest.raises(ValueError, match=r"up_proj.weight: values of the result are not finite"):
        apply_delta(folder / "base", folder / "add", folder / "out")
    assert not (folder / "out").exists()


def test_unreadable_weights_keep_the_systems_words(folder, run, monkeypatch):
    (folder / "shards" / "x.safetensors").mkdir()
    (folder / "shards" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x.safetensors"}}')
    status, _, said = run("info", folder / "shards")
    assert (status, "x.safetensors is no file" in said) == (2, True), said

    def fail(*_, **__):
        raise PermissionError("Permission denied (os error 13)")  # as safetensors does, without the path

    for module, command in (
        ("model_directory", ["info", folder / "base"]),
        ("adapter", ["info", folder / "adapter"]),
    ):
        monkeypatch.setattr(f"k2mini.weights.{module}.safe_open", fail)
        status, _, said = run(*command)
        assert (status, "safetensors: Permission denied (os error 13)" in said) == (2, True), said


VALUES = (None, True, -1, 0, 1.5, 10**30, float("nan"), "x", "", [], {}, [[]], {"a": 1}, "../x", "\u2028")


def _mutated(content, random):
    """A few bytes changed, a part cut out, or one value of its JSON replaced by another."""
    try:
        raw = json.loads(content)
    except ValueError:
        raw = None
    if raw is not None and random.random() < 0.7:
        place = raw
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = random.choice(keys)
            if not isinstance(place[key], (dict, list)) or not place[key] or random.random() < 0.3:
                break
            place = place[key]
        place[key] = random.choice(VALUES)
        return (manifest_text({k: v for k, v in raw.items() if k != "sha256"}) if "sha256" in raw
                else json.dumps(raw)).encode()  # fmt: skip
    content = bytearray(content)
    if random.random() < 0.2:
        start = random.randrange(len(content))
        del content[start : start + random.randrange(1, len(content))]
    else:
        for _ in range(random.randrange(1, 8)):
            end = len(content) if random.random() < 0.3 else min(len(content), 600)
            content[random.randrange(end)] = random.randrange(256)
    return bytes(content)


@pytest.mark.parametrize("seed", range(int(os.environ.get("K2MINI_FUZZ", "4"))))
def test_mutated_files(folder, run, seed):
    """A right result, or exit 2 with one sentence; `run` fails at any other exception."""
    random = Random(seed)
    for _ in range(12):
        kind = random.choice(("base", "shards", "bits", "add", "adapter", "bin", "meta"))
        path = random.choice([p for p in sorted((folder / kind).iterdir()) if p.name != "tokenizer.model"])
        kept = path.read_bytes()
        path.write_bytes(_mutated(kept, random))
        model = ["--model", folder / ("base" if kind == "adapter" else kind), "--prompt", "a", "--max-new-tokens", "2"]
        commands = [["info", folder / kind], ["verify", folder / kind]]
        if kind in ("base", "shards", "bin", "adapter"):
            commands.append(["generate", *model, *(["--adapter", folder / "adapter"] if kind == "adapter" else [])])
        if kind in ("bits", "add"):
            commands.append(["delta", "apply", "--base", folder / "base", "--delta", folder / kind])
        if kind in ("meta", "bin", "shards"):
            commands.append(["convert", folder / kind, "--to", "hf"])
        for command in commands:
            out = ["--out", folder / "out", "--force"] if command[0] in ("delta", "convert") else []
            status, _, said = run(*command, *out)
            lines = [line for line in said.splitlines() if line.startswith("k2mini: ")]
            assert status in (0, 2), (path, command)
            assert status == 0 or (lines and len(lines[-1]) < 1500), (path, command, said)
        path.write_bytes(kept)
