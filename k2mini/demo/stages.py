"""The demo's models judged: accuracy and perplexity of every stage, and its answers to a few questions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from k2mini.build import load_model
from k2mini.config import check_fields
from k2mini.data.documents import read_documents
from k2mini.data.prompts import get_template
from k2mini.demo.phrases import ANSWER, TEMPLATE
from k2mini.evaluation.benchmarks import load_geobench
from k2mini.evaluation.evaluate import run_benchmark, write_report
from k2mini.evaluation.instances import EvalConfig
from k2mini.evaluation.perplexity import perplexity
from k2mini.evaluation.report import wilson_interval
from k2mini.files import read_json, write_text
from k2mini.inference.decoding import Decoding
from k2mini.inference.generate import generate

EVAL_CONFIGS = {
    "text": EvalConfig("text", get_template(TEMPLATE), ANSWER, normalize="none", score_end=True),
    "letter": EvalConfig("letter", get_template(TEMPLATE), ANSWER),
}
NUM_ANSWERS = 3


@dataclass(frozen=True)
class Stage:
    """A model of the demo: its name in the report, its directory, and the adapter that it is loaded with."""

    name: str
    model: Path
    adapter: Path | None = None


def judge(out: Path, stage: Stage) -> None:
    """Answer the multiple-choice questions and measure perplexity; kept in `out/eval/NAME`, and not done twice."""
    folder = out / "eval" / stage.name
    if (folder / "summary.json").exists():
        return
    model, tokenizer = load_model(stage.model, stage.adapter)
    assert tokenizer is not None
    result: dict[str, Any] = {}
    for kind, config in EVAL_CONFIGS.items():
        for part in ("seen", "unseen"):
            files = [out / "data" / f"questions_{layout}_{part}.json" for layout in ("npee", "ap")]
            questions = [question for file in files for question in load_geobench(file)]
            report, results = run_benchmark(
                model,
                tokenizer,
                questions,
                config,
                name=stage.name,
                out=folder / f"{kind}_{part}",
                label=f"{stage.name}: {kind}, {part}",
            )
            write_report(folder / f"{kind}_{part}", report, results)
            n = sum(task["n"] for task in report["tasks"])
            correct = round(sum(task["accuracy"] * task["n"] for task in report["tasks"]))
            result[f"{kind}_{part}"] = {"n": n, "correct": correct}
    for name in ("documents", "phrasings"):
        held_out = read_documents(out / "data" / f"heldout_{name}.jsonl", tokenizer, eos=True)
        result[f"perplexity_{name}"] = perplexity(model, held_out)
    write_text(folder / "summary.json", json.dumps(result, indent=2) + "\n")


def summary(out: Path, stage: Stage) -> dict[str, Any]:
    """A judged stage's entry in report.json."""
    path = out / "eval" / stage.name / "summary.json"
    raw = read_json(path)
    kinds: dict[str, type] = {"perplexity_documents": float, "perplexity_phrasings": float}
    parts = [f"{kind}_{part}" for kind in EVAL_CONFIGS for part in ("seen", "unseen")]
    check_fields(raw, kinds | dict.fromkeys(parts, dict), f"{path}; remove it to have the stage judged again")
    for part in parts:
        check_fields(raw[part], {"n": int, "correct": int}, f"{path}, {part}")
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
def answers(out: Path, stages: list[Stage]) -> list[dict[str, Any]]:
    """What each stage answers to a few questions on entities that stage two was never asked about."""
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
        completions = generate(model, prompts, Decoding(16), stop_ids=tokenizer.stop_ids)
        for entry, completion in zip(entries, completions, strict=True):
            entry["answers"][stage.name] = tokenizer.decode(completion.tokens).strip()
    return entries
