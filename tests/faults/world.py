"""A tiny world with one of everything that k2mini reads, and the commands that read it.

All commands run in the world's folder with relative paths, so what they print and write is the same in every copy.
Names are such that no sentence has them by accident.
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from tests.conftest import make_tokenizer, tiny_config, tiny_llama
from tests.faults.server import End, Forks
from tests.helpers import CHATML, make_chat_model

LETTERS = "A. basalt\nB. granite"
QUESTIONS = {
    "x_user.jsonl": [{"question": f"Which rock is {n}?", "choices": ["granite", "basalt", "quartz"], "answer": "A"}
                     for n in ("hard", "of the crust")],
    "x_npee.json": {
        "choice": {"question": [f"What erodes?\nChoose from:\n\n{LETTERS}"], "answer": ["B"]},
        "tf": {"question": ["The crust is rock."], "answer": ["True"]},
        **{kind: {"question": ["crust"], "answer": ["a rock"]} for kind in ("noun", "qa", "discussion", "completion")},
    },
    "x_ap.json": [{"id": "a", "question": {"stem": "What is a plate?", "choices": [
        {"text": "rock", "label": "A"}, {"text": "quartz", "label": "B"}]}, "answerKey": "A"}],
    "x_asked.json": ["What is granite?", {"question": "And basalt?"}],
    "x_asked.jsonl": [{"prompt": "What is rock?"}, {"instruction": "Say.", "input": "quartz"}],
    "x_told.json": [{"instruction": f"What is {n}?", "input": "", "output": f"{n} is a rock."}
                    for n in ("granite", "basalt", "quartz", "mantle")],
    "x_talk.jsonl": [{"messages": [{"role": "user", "content": f"What is {n}?"},
                                   {"role": "assistant", "content": f"{n} is a rock."}]}
                     for n in ("granite", "basalt", "quartz", "mantle")],
    "x_docs.jsonl": [{"text": f"Granite number {n} is made of quartz and that erodes slowly. " * 3} for n in range(9)],
}  # fmt: skip
YAML = """\
run:
  dir: {run}
  seed: 3
model:
  path: x_model
data:
  path: {data}
  {length}: 160
train:
  lr: 1.0e-3
  global_batch_size: 2
  micro_batch_size: 2
  max_steps: 2
  warmup_steps: 1
checkpoint:
  every: 1
  keep_best: false
"""
GENERATE = "--prompt granite --template none --max-new-tokens 2 --json"
SHORT = "train.max_steps=2 train.global_batch_size=2 train.micro_batch_size=2"  # whatever a mutated file says
# Commands, where {m} is the first part of the mutated file's path: the directory or the file that is read.
COMMANDS = {
    "info": "info {m} --json",
    "verify": "verify {m}",
    "generate": f"generate --model {{m}} {GENERATE}",
    "own": "generate --model {m} --prompt granite --max-new-tokens 2 --json",
    "eval": "eval --model {m} --benchmark x_user.jsonl --json",
    "text": "eval --model {m} --perplexity x_docs.txt --json",
    "score": "score --model {m} --input x_docs.txt --context quartz --json",
    "scored": "score --model x_model --input {m} --json",
    "hf": "convert {m} --to hf --out out",
    "gguf": "convert {m} --to gguf --out out.gguf",
    "lens": "audit lens --model {m} --prompt granite --json",
    "diff": "audit diff x_tuned {m} --json",
    "make": "delta make --base x_model --tuned {m} --out out",
    "apply": "delta apply --base x_model --delta {m} --out out",
    "based": "delta apply --base {m} --delta x_delta --out out",
    "merge": "merge --base x_model --adapter {m} --out out",
    "merges": "merge --base x_model --adapter x_second {m} --weights 0.5 -1 --out out",
    "adapted": f"generate --model x_model --adapter {{m}} {GENERATE}",
    "prepare": "prepare {m} --tokenizer x_model --out out",
    "skip": "prepare {m} --tokenizer x_model --out out --on-error skip",
    "tokens": "prepare x_docs.txt --tokenizer {m} --out out",
    "export": "export x_run/checkpoints/step_0000001 --out out",
    "resume": f"pretrain x_pre.yaml run.dir=x_run {SHORT}",
    "adapters": f"finetune x_fine.yaml run.dir=x_tune {SHORT}",
    "pretrain": f"pretrain x_pre.yaml run.dir=out {SHORT}",
    "finetune": f"finetune x_fine.yaml run.dir=out {SHORT}",
    "instruct": f"finetune x_fine.yaml run.dir=out data.path={{m}} {SHORT}",
    "talked": f"finetune x_fine.yaml run.dir=out model.path={{m}} data.path=x_talk.jsonl {SHORT}",
    "init": f"finetune x_fine.yaml run.dir=out lora.init_adapter={{m}} {SHORT}",
    "preview": "preview {m} --number 1",
    "plan": "plan {m} --world-size 1 --gpu-memory 1GiB --json",
    "plot": "plot x_run --out out.png",
    "benchmark": "eval --model x_model --benchmark {m} --json",
    "open": "eval --model x_model --benchmark {m} --tasks npee/noun --max-new-tokens 1 --json",
    "input": "generate --model x_model --input {m} --max-new-tokens 1",
    "goon": "eval --model x_model --benchmark x_user.jsonl --out x_eval --json",
    "compare": "compare x_other x_eval --json",
}
# File -> the commands that read it. With '!', a hash protects it there: any other result is silently wrong.
WEIGHTS = "info verify! generate eval text score hf gguf lens diff make based!"
TARGETS = {
    "x_model/config.json": "info verify! generate eval score hf gguf make lens tokens",
    "x_model/model.safetensors": WEIGHTS,
    "x_model/manifest.json": "info verify generate eval make hf",
    "x_model/tokenizer.model": "info verify! generate eval score gguf tokens! hf",
    "x_chat/tokenizer.json": "own info eval tokens hf gguf talked",
    "x_chat/tokenizer_config.json": "own eval tokens hf gguf talked",
    "x_chat/chat_template.jinja": "own eval hf talked",
    "x_chat/generation_config.json": "own hf talked",
    "x_index/model.safetensors.index.json": "info generate eval hf lens diff",
    "x_bin/pytorch_model-00001-of-00002.bin": "info generate verify! hf gguf make",
    "x_bin/pytorch_model.bin.index.json": "info generate hf",
    "x_meta/params.json": "info hf",
    "x_meta/consolidated.00.pth": "info hf",
    "x_delta/model.safetensors": "apply! info verify!",
    "x_delta/manifest.json": "apply! info verify",
    "x_add/model.safetensors": "apply! verify!",
    "x_add/manifest.json": "apply! verify",
    "x_adapter/adapter_config.json": "adapted merge merges info verify! init",
    "x_adapter/adapter_model.safetensors": "adapted merge merges info verify! init",
    "x_adapter/manifest.json": "adapted merge merges info verify",
    "x_corpus/manifest.json": "pretrain!",
    "x_corpus/train-00000.tokens": "pretrain!",
    "x_corpus/train-00000.starts": "pretrain!",
    "x_run/checkpoints/step_0000001/state.json": "export resume",
    "x_run/checkpoints/step_0000001/.metadata": "export! resume!",
    "x_run/checkpoints/step_0000001/__0_0.distcp": "export! resume!",
    "x_run/metrics.jsonl": "plot resume",
    "x_tune/checkpoints/step_0000001/state.json": "adapters",
    "x_tune/checkpoints/step_0000001/__0_0.distcp": "adapters!",
    "x_pre.yaml": "pretrain preview plan",
    "x_fine.yaml": "finetune preview plan",
    "x_told.json": "instruct",
    "x_talk.jsonl": "instruct",
    "x_docs.jsonl": "prepare skip",
    "x_docs.json": "prepare",
    "x_docs.txt": "prepare skip",
    "x_docs.jsonl.gz": "prepare skip",
    "x_npee.json": "benchmark open",
    "x_ap.json": "benchmark",
    "x_user.jsonl": "benchmark",
    "x_asked.json": "input",
    "x_asked.jsonl": "input",
    "x_asked.txt": "input scored",
    "x_eval/results.jsonl": "goon compare",
    "x_eval/asking.json": "goon",
    "x_eval/report.json": "compare goon!",
}
NEEDED = {
    "x_pre.yaml": ["x_model", "x_corpus"], "x_fine.yaml": ["x_model", "x_told.json", "x_talk.jsonl"],
    "x_delta": ["x_model"], "x_eval": ["x_model"], "x_run": ["x_model"], "x_tune": ["x_model"],
}  # fmt: skip


def build(folder: Path, forks: Forks) -> Path:
    """Write the world into a folder that is made."""
    from k2mini.weights.model_files import save_model

    folder.mkdir(parents=True)
    tokenizer = make_tokenizer(folder / "spm")
    shape = {"dim": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "intermediate_dim": 48}
    config = tiny_config(vocab_size=tokenizer.vocab_size, **shape)
    for name, seed, shard in (("x_model", 0, 10**9), ("x_tuned", 1, 10**9), ("x_index", 0, 80_000)):
        model = tiny_llama(config, seed)
        save_model(model.state_dict(), config, folder / name, tokenizer=tokenizer, shard_bytes=shard)
    shutil.rmtree(folder / "spm")
    make_chat_model(folder / "x_chat", template=None, ends=[0, 2])
    (folder / "x_chat/chat_template.jinja").write_text(CHATML)
    (folder / "x_index/manifest.json").unlink()
    for name, content in QUESTIONS.items():
        lines = "".join(json.dumps(entry) + "\n" for entry in content)
        (folder / name).write_text(lines if name.endswith("l") else json.dumps(content, indent=1))
    (folder / "x_docs.json").write_text(json.dumps(QUESTIONS["x_docs.jsonl"]))
    (folder / "x_docs.txt").write_text("Basalt is made of rock, and the crust erodes slowly.\n" * 3)
    (folder / "x_asked.txt").write_text("What is granite?\nWhat is quartz?\n")
    (folder / "x_docs.jsonl.gz").write_bytes(gzip.compress((folder / "x_docs.jsonl").read_bytes(), mtime=0))
    (folder / "x_pre.yaml").write_text(YAML.format(run="out", data="x_corpus", length="seq_len"))
    (folder / "x_fine.yaml").write_text(YAML.format(run="out", data="x_told.json", length="max_seq_len"))
    end = forks.one(
        folder,
        "prepare x_docs.jsonl --tokenizer x_model --out x_corpus",
        "convert x_model --to bin --out x_bin --shard-size 100KB",
        "convert x_model --to meta --out x_meta",
        "delta make --base x_model --tuned x_tuned --out x_delta",
        "delta make --base x_model --tuned x_tuned --format add --out x_add",
        "pretrain x_pre.yaml run.dir=x_run",
        "finetune x_fine.yaml run.dir=x_tune lora.rank=2",
        "eval --model x_model --benchmark x_user.jsonl --out x_eval",
        "eval --model x_tuned --benchmark x_user.jsonl --out x_other",
        limit=120,
    )
    assert end.status == 0, end
    (folder / "x_tune/adapter").rename(folder / "x_adapter")
    shutil.copytree(folder / "x_adapter", folder / "x_second")
    for left in ("x_run/model", "x_run/checkpoints/step_0000002", "x_tune/checkpoints/step_0000002"):
        shutil.rmtree(folder / left)
    (folder / "x_fine.yaml").write_text((folder / "x_fine.yaml").read_text() + "lora:\n  rank: 2\n")
    return folder


def copy(world: Path, folder: Path, names: Iterable[str]) -> None:
    """Copy what is named, and what that needs, into a new folder."""
    folder.mkdir(parents=True)
    wanted, found = [*names], set()
    while wanted:
        name = wanted.pop()
        if name not in found and (world / name).exists():
            found.add(name)
            wanted += NEEDED.get(name, [])
            (shutil.copytree if (world / name).is_dir() else shutil.copy)(world / name, folder / name)


def tree(folder: Path, *names: str) -> dict[str, bytes]:
    """All files that are named or in folders that are named, without what is of the moment."""
    found = {}
    for name in names:
        path = folder / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and "checkpoints" not in file.parts and file.name != ".lock":
                found[_name(file, folder)] = re.sub(rb', "tokens_per_second": [^,}]*', b"", file.read_bytes())
    return found


def listing(folder: Path) -> set[str]:
    """The names of all that is in a folder, hidden or not."""
    return {_name(path, folder) for path in folder.rglob("*")}


def _name(path: Path, folder: Path) -> str:
    return re.sub(r"-[0-9a-f]{12}\b", "", str(path.relative_to(folder)))  # a run's corpus, after its file's time


def said(end: End) -> str:
    """How a case ended, for the message of a failure."""
    return f"status {end.status} after {end.seconds:.1f} s; last: {end.last[:300]}"
