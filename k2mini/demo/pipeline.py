"""`k2mini demo`: what K2 did to LLaMA-7B, done to a tiny model with the same code that the commands run."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from k2mini.config import (
    CheckpointSection,
    CorpusSection,
    FinetuneConfig,
    InstructionSection,
    LoraSection,
    ModelSection,
    PretrainConfig,
    RunConfig,
    RunSection,
    TrainSection,
    check_fields,
)
from k2mini.demo.phrases import TEMPLATE
from k2mini.demo.report import write_report
from k2mini.demo.sources import FULL, QUICK, Scale, copy_base, write_world
from k2mini.demo.stages import Stage, answers, judge, summary
from k2mini.files import output, read_json, write_text
from k2mini.training.run import finetune, pretrain
from k2mini.weights.delta import apply_delta, make_delta
from k2mini.weights.merge import merge_adapters
from k2mini.weights.model_directory import CheckpointReader, read_manifest
from k2mini.weights.stream import hash_tensors

log = logging.getLogger(__name__)


def run_demo(
    out: Path, *, seed: int = 0, quick: bool = False, control: bool = False, lora: bool = False
) -> dict[str, Any]:
    """Run every stage that is not finished yet, judge it, and write the report. Returns the content of report.json.

    Args:
        out: gets everything: data, models, runs, report.
        quick: a few steps of everything, which teach nothing.
        control: instruction tuning without further pretraining as well, for comparison.
        lora: the documents learned by LoRA alone as well, and instruction tuning after it.

    Raises ValueError where `out` holds a demo of another seed or size.
    """
    with output(out, mark=("demo.json", "data", "base", "report.json")):
        return _run(out, seed, quick=quick, control=control, lora=lora)


def _run(out: Path, seed: int, *, quick: bool, control: bool, lora: bool) -> dict[str, Any]:
    start = time.perf_counter()
    scale, spent = (QUICK if quick else FULL), _settings(out, seed, quick)
    if (out / "report.json").exists():
        log.info("what is finished in %s is not run again; to run it anew, remove it or name another --out", out)
    base, steps = out / "base", _Steps(8 + 3 * control + 3 * lora, quick)

    steps.begin("the miniature world: facts, corpus, instructions, questions", 1)
    _write_inputs(out, seed, scale)
    stages = [Stage("base", base)]
    judge(out, stages[-1])

    steps.begin("further pretraining: all parameters, on the corpus", 45)
    tuned = _train(out, "pretrain", _pretrain_config(out, seed, scale))
    stages.append(Stage("pretrain", tuned))
    judge(out, stages[-1])

    steps.begin("delta: made against the base, applied again, compared bit for bit", 1)
    _delta(base, tuned, out)

    steps.begin("instruction tuning, stage one: general instructions, LoRA", 10)
    first = _tune(out, "stage1", tuned, "general", seed, scale.stage1_steps)
    stages.append(Stage("stage1", tuned, first))
    judge(out, stages[-1])

    steps.begin("instruction tuning, stage two: expert instructions, from stage one's adapter", 20)
    second = _tune(out, "stage2", tuned, "expert", seed, scale.stage2_steps, init=first)
    stages.append(Stage("stage2", tuned, second))
    judge(out, stages[-1])

    steps.begin("merge: the adapter goes into the weights", 1)
    if not (out / "merged").exists():
        merge_adapters(tuned, [second], out / "merged")
    if lora:
        stages += _lora(out, seed, scale, steps)
    if control:
        stages.append(_control(out, seed, scale, steps))

    steps.begin("answers of every stage", 2)
    answered = answers(out, stages)
    steps.begin("report", 1)
    seconds = round(spent + time.perf_counter() - start, 1)
    write_text(out / "demo.json", json.dumps({"seed": seed, "quick": quick, "seconds": seconds}) + "\n")
    return write_report(out, seconds, [summary(out, stage) for stage in stages], answered)


def _control(out: Path, seed: int, scale: Scale, steps: _Steps) -> Stage:
    """Both stages of instruction tuning over the base itself, and their judgement."""
    base = out / "base"
    steps.begin("control, stage one: the same, without further pretraining", 10)
    first = _tune(out, "control_stage1", base, "general", seed, scale.stage1_steps)
    steps.begin("control, stage two", 15)
    second = _tune(out, "control", base, "expert", seed, scale.stage2_steps, init=first)
    steps.begin("control: judged", 5)
    stage = Stage("control", base, second)
    judge(out, stage)
    return stage


def _lora(out: Path, seed: int, scale: Scale, steps: _Steps) -> list[Stage]:
    """The documents learned by LoRA alone and merged, then both stages as over full pretraining; all are judged.

    Rank and learning rate are the best of the trials with adapters alone (tools/results/demo_lora.txt): facts need many
    more numbers than a way to answer, and adapters a higher learning rate than all parameters.
    """
    steps.begin("LoRA on documents: all matrices of the blocks, the corpus as above; then merged", 60)
    whole, section = _pretrain_config(out, seed, scale), LoraSection(64, 128.0, 0.0, target_modules="all")
    own = replace(whole.run, dir=str(out / "lora_documents"))
    config = replace(whole, run=own, lora=section, train=replace(whole.train, lr=5e-3, weight_decay=0.0))
    adapter, model = _train(out, "lora_documents", config), out / "lora_model"
    if not model.exists():
        merge_adapters(out / "base", [adapter], model)
    stages = [Stage("lora_documents", model)]
    steps.begin("LoRA on documents, stage one", 10)
    first = _tune(out, "lora_stage1", model, "general", seed, scale.stage1_steps)
    stages.append(Stage("lora_stage1", model, first))
    steps.begin("LoRA on documents, stage two", 20)
    second = _tune(out, "lora_stage2", model, "expert", seed, scale.stage2_steps, init=first)
    stages.append(Stage("lora_stage2", model, second))
    for stage in stages:
        judge(out, stage)
    return stages


class _Steps:
    """The steps as the user reads them: a number, what is done and, in a full demo, about how long it takes."""

    def __init__(self, total: int, quick: bool) -> None:
        self.total, self.quick, self.number = total, quick, 0

    def begin(self, what: str, seconds: int) -> None:
        """Announce the next step."""
        self.number += 1
        time_needed = "" if self.quick else f" (about {seconds} s on two cores)"
        log.info("[%d/%d] %s%s", self.number, self.total, what, time_needed)


def _write_inputs(out: Path, seed: int, scale: Scale) -> None:
    """Write the world's files to `out/data` and copy the packaged base to `out/base`, where they are missing."""
    if not (out / "data").exists():
        write_world(out / "data", seed, scale)
    if not (out / "base").exists():
        copy_base(out / "base")


def _settings(out: Path, seed: int, quick: bool) -> float:
    """Note seed and size in `out/demo.json`, or check that they are those noted. Returns the seconds spent so far."""
    path = out / "demo.json"
    if not path.exists():
        write_text(path, json.dumps({"seed": seed, "quick": quick, "seconds": 0.0}) + "\n")
        return 0.0
    settings = read_json(path)
    check_fields(settings, {"seed": float, "quick": bool, "seconds": float}, str(path))
    remedy = f"remove {out} to run it anew, or name another folder with --out"
    if settings["seed"] != seed:
        raise ValueError(f"{out} holds a demo with seed {settings['seed']}, not {seed}; {remedy}")
    if settings["quick"] != quick:
        held, asked = ("quick", "full") if settings["quick"] else ("full", "quick")
        raise ValueError(f"{out} holds a {held} demo, not a {asked} one; {remedy}")
    return float(settings["seconds"])


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


def _tune(out: Path, name: str, model: Path, data: str, seed: int, steps: int, init: Path | None = None) -> Path:
    """A stage of instruction tuning. Returns its adapter."""
    config = FinetuneConfig(
        run=RunSection(str(out / name), seed),
        model=ModelSection(str(model)),
        data=InstructionSection(str(out / f"data/{data}.json"), template=TEMPLATE, max_seq_len=128),
        lora=LoraSection(init_adapter=None if init is None else str(init)),
        train=TrainSection(
            lr=2e-3, global_batch_size=32, micro_batch_size=32, max_steps=steps, warmup_steps=min(4, steps // 2)
        ),
        checkpoint=CheckpointSection(every=20),
    )
    return _train(out, name, config)


def _train(out: Path, name: str, config: RunConfig) -> Path:
    """Train a stage unless it is complete, and keep its configuration where report.md's commands name it."""
    (out / "configs").mkdir(exist_ok=True)
    write_text(out / "configs" / f"{name}.yaml", json.dumps(asdict(config), indent=2) + "\n")
    result = out / name / ("model" if config.lora is None else "adapter")
    if read_manifest(result) is not None:
        return result
    return pretrain(config) if isinstance(config, PretrainConfig) else finetune(config)


def _delta(base: Path, tuned: Path, out: Path) -> None:
    """Make the delta, apply it to the base, and check that the tuned weights come back bit for bit."""
    if not (out / "delta").exists():
        make_delta(base, tuned, out / "delta")
    if not (out / "restored").exists():
        apply_delta(base, out / "delta", out / "restored")
    if hash_tensors(CheckpointReader(tuned)) != hash_tensors(CheckpointReader(out / "restored")):
        raise AssertionError("the delta does not give back the tuned weights")
    log.info("%s and %s are equal bit for bit", tuned, out / "restored")
