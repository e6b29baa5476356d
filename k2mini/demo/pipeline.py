"""`k2mini demo`: everything that K2 did to LLaMA-7B, in miniature, with the product's own commands."""

from __future__ import annotations

import json
import logging
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from k2mini.build import load_model
from k2mini.config import (
    CheckpointSection,
    CorpusSection,
    FinetuneConfig,
    InstructionSection,
    LoraSection,
    ModelSection,
    PretrainConfig,
    RunSection,
    TrainSection,
)
from k2mini.data.documents import read_documents
from k2mini.data.prompts import get_template
from k2mini.demo.phrases import ANSWER
from k2mini.demo.report import write_report
from k2mini.demo.world import world_files
from k2mini.evaluation.benchmarks import load_geobench
from k2mini.evaluation.evaluate import run_benchmark
from k2mini.evaluation.instances import EvalConfig
from k2mini.evaluation.perplexity import perplexity
from k2mini.evaluation.report import wilson_interval
from k2mini.files import make_writable, new_directory, read_json, write_text
from k2mini.inference.generate import Decoding, generate
from k2mini.training.run import finetune, pretrain
from k2mini.weights.adapter import merge_adapter
from k2mini.weights.delta import apply_delta, make_delta
from k2mini.weights.model_directory import CheckpointReader
from k2mini.weights.stream import hash_tensors

log = logging.getLogger(__name__)

BASE = Path(__file__).parent / "base"
TEMPLATE = "alpaca_short"
EVAL_CONFIGS = {
    "text": EvalConfig("text", TEMPLATE, ANSWER, normalize="none", score_end=True),
    "letter": EvalConfig("letter", TEMPLATE, ANSWER),
}
NUM_ANSWERS = 3


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    sizes: dict[str, int]  # of the world's files
    pretrain_steps: int
    stage1_steps: int
    stage2_steps: int


# 512 samples are 16 steps of 32; a corpus of 12 copies is about 3 epochs.
FULL = Scale({"copies": 12, "general": 1024, "expert": 3072, "questions": 100}, 400, 32, 96)
QUICK = Scale({"copies": 2, "general": 64, "expert": 96, "questions": 5}, 12, 3, 4)


@dataclass(frozen=True)
class Stage:
    """A model to be judged: a directory, and an adapter for it."""

    name: str
    model: Path
    adapter: Path | None = None


def run_demo(out: Path, *, seed: int = 0, quick: bool = False, control: bool = False) -> dict[str, Any]:
    """Run all that is not finished yet, and return the report (DESIGN: report.json of `demo`).

    Raises ValueError where `out` holds a demo of another seed or size.
    """
    start = time.perf_counter()
    make_writable(out)
    scale, spent = (QUICK if quick else FULL), _settings(out, seed, quick)
    data, base = out / "data", out / "base"
    steps = _Steps(8 + 3 * control)

    steps.begin("the miniature world: facts, corpus, instructions, questions", 1)
    if not data.exists():
        write_world(data, seed, scale)
    if not base.exists():
        with new_directory(base) as beside:
            for file in BASE.iterdir():
                shutil.copyfile(file, beside / file.name)
    stages = [Stage("base", base)]
    _judge(out, stages[-1])

    steps.begin("further pretraining: all parameters, on the corpus", 45)
    tuned = pretrain(_write(out, "pretrain", _pretrain_config(out, seed, scale)))
    stages.append(Stage("pretrain", tuned))
    _judge(out, stages[-1])

    steps.begin("delta: made against the base, applied again, compared bit for bit", 1)
    _delta(base, tuned, out)

    steps.begin("instruction tuning, stage one: general instructions, LoRA", 10)
    first = finetune(_write(out, "stage1", _finetune_config(out, "stage1", tuned, "general", seed, scale.stage1_steps)))
    stages.append(Stage("stage1", tuned, first))
    _judge(out, stages[-1])

    steps.begin("instruction tuning, stage two: expert instructions, from stage one's adapter", 20)
    config = _finetune_config(out, "stage2", tuned, "expert", seed, scale.stage2_steps, init=first)
    second = finetune(_write(out, "stage2", config))
    stages.append(Stage("stage2", tuned, second))
    _judge(out, stages[-1])

    steps.begin("merge: the adapter goes into the weights", 1)
    if not (out / "merged").exists():
        merge_adapter(tuned, second, out / "merged")

    if control:
        steps.begin("control, stage one: the same, without further pretraining", 10)
        name = "control_stage1"
        first = finetune(_write(out, name, _finetune_config(out, name, base, "general", seed, scale.stage1_steps)))
        steps.begin("control, stage two", 15)
        config = _finetune_config(out, "control", base, "expert", seed, scale.stage2_steps, init=first)
        second = finetune(_write(out, "control", config))
        steps.begin("control: judged", 5)
        stages.append(Stage("control", base, second))
        _judge(out, stages[-1])

    steps.begin("answers of every stage", 2)
    answers = _answers(out, stages)
    steps.begin("report", 1)
    seconds = round(spent + time.perf_counter() - start, 1)
    write_text(out / "demo.json", json.dumps({"seed": seed, "quick": quick, "seconds": seconds}) + "\n")
    return write_report(out, seconds, [_summary(out, stage) for stage in stages], answers)


class _Steps:
    """What the user reads while it runs."""

    def __init__(self, total: int) -> None:
        self.total, self.number = total, 0

    def begin(self, what: str, seconds: int) -> None:
        self.number += 1
        log.info("[%d/%d] %s (about %d s on two cores)", self.number, self.total, what, seconds)


def write_world(folder: Path, seed: int, scale: Scale) -> None:
    """Write the world's files; the folder appears whole."""
    with new_directory(folder) as beside:
        for name, content in world_files(seed, scale.sizes).items():
            (beside / name).write_text(_dump(name, content), encoding="utf-8")


def _settings(out: Path, seed: int, quick: bool) -> float:
    """Note the settings, or check that `out` holds a demo of the same. Returns the seconds spent so far."""
    path = out / "demo.json"
    if not path.exists():
        write_text(path, json.dumps({"seed": seed, "quick": quick, "seconds": 0.0}) + "\n")
        return 0.0
    settings = read_json(path)
    for name, value in (("seed", seed), ("quick", quick)):
        if settings[name] != value:
            raise ValueError(f"{out} holds a demo with {name} {settings[name]}, not {value}; name another --out")
    return float(settings["seconds"])


def _dump(name: str, content: Any) -> str:
    if name.endswith(".jsonl"):
        return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in content)
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _pretrain_config(out: Path, seed: int, scale: Scale) -> PretrainConfig:
    return PretrainConfig(
        run=RunSection(str(out / "pretrain"), seed),
        model=ModelSection(str(out / "base")),
        data=CorpusSection(str(out / "data/corpus.jsonl"), str(out / "data/heldout_documents.jsonl"), seq_len=128),
        train=TrainSection(
            lr=2e-3,
            global_batch_size=8,
            micro_batch_size=8,
            max_steps=scale.pretrain_steps,
            warmup_steps=min(20, scale.pretrain_steps // 4),
            weight_decay=0.01,
            val_every=100,
        ),
        checkpoint=CheckpointSection(every=50),
    )


def _finetune_config(
    out: Path, name: str, model: Path, data: str, seed: int, steps: int, init: Path | None = None
) -> FinetuneConfig:
    return FinetuneConfig(
        run=RunSection(str(out / name), seed),
        model=ModelSection(str(model)),
        data=InstructionSection(str(out / f"data/{data}.json"), template=TEMPLATE, max_seq_len=128),
        lora=LoraSection(init_adapter=None if init is None else str(init)),
        train=TrainSection(
            lr=2e-3, global_batch_size=32, micro_batch_size=32, max_steps=steps, warmup_steps=min(4, steps // 2)
        ),
        checkpoint=CheckpointSection(every=20),
    )


def _write(out: Path, name: str, config: Any) -> Any:
    """Keep a configuration where the report's commands look for it; returns it."""
    folder = out / "configs"
    make_writable(folder)
    write_text(folder / f"{name}.yaml", json.dumps(asdict(config), indent=2) + "\n")
    return config


def _delta(base: Path, tuned: Path, out: Path) -> None:
    if not (out / "delta").exists():
        make_delta(base, tuned, out / "delta")
    if not (out / "restored").exists():
        apply_delta(base, out / "delta", out / "restored")
    if hash_tensors(CheckpointReader(tuned)) != hash_tensors(CheckpointReader(out / "restored")):
        raise AssertionError("the delta does not give back the tuned weights")
    log.info("%s and %s are equal bit for bit", tuned, out / "restored")


def _judge(out: Path, stage: Stage) -> None:
    """Multiple choice and perplexity of one stage, kept in `out/eval/NAME`."""
    folder, summary = out / "eval" / stage.name, out / "eval" / stage.name / "summary.json"
    if summary.exists():
        return
    model, tokenizer = load_model(stage.model, stage.adapter)
    assert tokenizer is not None
    result: dict[str, Any] = {}
    for kind, config in EVAL_CONFIGS.items():
        for part in ("seen", "unseen"):
            files = [out / "data" / f"questions_{layout}_{part}.json" for layout in ("npee", "ap")]
            questions = [question for file in files for question in load_geobench(file)]
            report = run_benchmark(
                model,
                tokenizer,
                questions,
                config,
                name=stage.name,
                out=folder / f"{kind}_{part}",
                label=f"{stage.name}: {kind}, {part}",
            )
            n = sum(task["n"] for task in report["tasks"])
            correct = round(sum(task["accuracy"] * task["n"] for task in report["tasks"]))
            result[f"{kind}_{part}"] = {"n": n, "correct": correct}
    for name in ("documents", "phrasings"):
        held_out = read_documents(out / "data" / f"heldout_{name}.jsonl", tokenizer, eos=True)
        result[f"perplexity_{name}"] = perplexity(model, held_out)
    write_text(summary, json.dumps(result, indent=2) + "\n")


def _summary(out: Path, stage: Stage) -> dict[str, Any]:
    raw = read_json(out / "eval" / stage.name / "summary.json")
    n = raw["text_seen"]["n"] + raw["text_unseen"]["n"]
    correct = raw["text_seen"]["correct"] + raw["text_unseen"]["correct"]
    low, high = wilson_interval(correct, n)
    return {
        "stage": stage.name,
        "perplexity": raw["perplexity_documents"],
        "perplexity_heldout_phrasings": raw["perplexity_phrasings"],
        "accuracy": correct / n,
        "low": low,
        "high": high,
        "chance": 0.25,
        "n": n,
        "seen": raw["text_seen"]["correct"] / raw["text_seen"]["n"],
        "unseen": raw["text_unseen"]["correct"] / raw["text_unseen"]["n"],
        "letter": (raw["letter_seen"]["correct"] + raw["letter_unseen"]["correct"]) / n,
    }


@torch.inference_mode()
def _answers(out: Path, stages: list[Stage]) -> list[dict[str, Any]]:
    """A few questions on entities that stage two never met as questions, with each stage's answer."""
    questions = load_geobench(out / "data" / "questions_ap_unseen.json")[:NUM_ANSWERS]
    entries: list[dict[str, Any]] = [
        {
            "question": question.stem,
            "right": question.texts[question.labels.index(question.answer)],
            "answers": {},
        }
        for question in questions
    ]
    template = get_template(TEMPLATE)
    for stage in stages:
        model, tokenizer = load_model(stage.model, stage.adapter)
        assert tokenizer is not None
        prompts = [tokenizer.encode(template.prompt(question.stem), bos=True, eos=False) for question in questions]
        completions = generate(model, prompts, Decoding(16), stop_ids=[tokenizer.eos_id])
        for entry, completion in zip(entries, completions, strict=True):
            entry["answers"][stage.name] = tokenizer.decode(completion.tokens).strip()
    return entries
