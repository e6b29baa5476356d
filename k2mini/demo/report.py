"""The demo's report: report.json, report.md, all stages' metrics.jsonl and, with the extra `plot`, the loss curve."""

from __future__ import annotations

import json
import logging
import shlex
from pathlib import Path
from typing import Any

from k2mini.demo.phrases import ANSWER, TEMPLATE
from k2mini.files import write_text
from k2mini.training.loop import read_metrics
from k2mini.training.plot import plot_losses

log = logging.getLogger(__name__)

TRAINED = ("pretrain", "stage1", "stage2")


def stage_table(stages: list[dict[str, Any]]) -> str:
    """Perplexity and accuracies of the stages, as a table of text."""
    width = max(9, *(len(row["stage"]) for row in stages))
    lines = [
        f"{'stage':<{width}} {'perplexity':>10} {'held-out phrasings':>19} {'accuracy':>9} {'95 % interval':>16} "
        f"{'seen':>7} {'unseen':>7} {'by letter':>10}"
    ]
    for row in stages:
        interval = f"{100 * row['low']:.1f} – {100 * row['high']:.1f} %"
        lines.append(
            f"{row['stage']:<{width}} {row['perplexity']:>10.1f} {row['perplexity_heldout_phrasings']:>19.1f} "
            f"{100 * row['accuracy']:>7.1f} % {interval:>16} {100 * row['seen']:>5.1f} % {100 * row['unseen']:>5.1f} % "
            f"{100 * row['letter']:>8.1f} %"
        )
    n = stages[0]["n"]
    lines.append(f"{n} four-way questions in phrasings kept from training; chance is 25 %.")
    lines.append(
        "seen, unseen: accuracy on entities that stage two met as questions, and on those met only in the corpus"
    )
    return "\n".join(lines)


def answer_table(answers: list[dict[str, Any]]) -> str:
    """A few questions, each with the answer of every stage, as text."""
    lines = []
    for entry in answers:
        lines.append(f"{entry['question']}  (right: {entry['right']})")
        width = max(9, *map(len, entry["answers"]))
        lines += [f"    {stage:<{width}} {answer}" for stage, answer in entry["answers"].items()]
    return "\n".join(lines)


def commands(out: Path, *, control: bool, lora: bool) -> str:
    """The commands that run each stage by hand on the demo's files, one a line; they write into `out/by_hand`."""

    def at(path: str) -> str:
        return shlex.quote(str(out / path))

    def run(name: str) -> str:
        return f"{at(f'configs/{name}.yaml')} {shlex.quote(f'run.dir={out}/by_hand/{name}')}"

    tuned = f"--model {at('pretrain/model')} --adapter {at('stage2/adapter')}"
    by_lora = [
        f"k2mini pretrain {run('lora_documents')}",
        f"k2mini merge --base {at('base')} --adapter {at('lora_documents/adapter')} --out {at('by_hand/lora_model')}",
        *(f"k2mini finetune {run(name)}" for name in ("lora_stage1", "lora_stage2")),
    ]
    lines = [
        f"k2mini pretrain {run('pretrain')}",
        f"k2mini delta make --base {at('base')} --tuned {at('pretrain/model')} --out {at('by_hand/delta')}",
        f"k2mini delta apply --base {at('base')} --delta {at('delta')} --out {at('by_hand/restored')}",
        f"k2mini finetune {run('stage1')}",
        f"k2mini finetune {run('stage2')}",
        *(f"k2mini finetune {run(name)}" for name in ("control_stage1", "control") if control),
        *(by_lora if lora else []),
        f"k2mini merge {tuned.replace('--model', '--base')} --out {at('by_hand/merged')}",
        f"k2mini generate --model {at('merged')} --template {TEMPLATE} --prompt 'What is the hardness of quartz?'",
        f"k2mini eval {tuned} --template {TEMPLATE} --answer-prefix '{ANSWER}' --scoring text --normalize none "
        f"--score-end --benchmark {at('data/questions_npee_unseen.json')} {at('data/questions_ap_unseen.json')}",
    ]
    return "\n".join(lines)


def write_report(
    out: Path, seconds: float, stages: list[dict[str, Any]], answers: list[dict[str, Any]]
) -> dict[str, Any]:
    """Write the report's files into `out`. Returns the content of report.json."""
    report = {"seconds": seconds, "stages": stages, "answers": answers}
    write_text(out / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    shown = commands(
        out, **{name: any(row["stage"].startswith(name) for row in stages) for name in ("control", "lora")}
    )
    text = (
        f"# k2mini demo\n\n{seconds:.0f} s in all.\n\n```\n{stage_table(stages)}\n```\n\n## Answers\n\n"
        f"```\n{answer_table(answers)}\n```\n\n## Every stage by hand\n\n```\n{shown}\n```\n"
    )
    write_text(out / "report.md", text)
    runs = {name: out / name / "metrics.jsonl" for name in TRAINED}
    entries = [{"stage": name, **entry} for name, path in runs.items() for entry in read_metrics(path)]
    write_text(out / "metrics.jsonl", "".join(json.dumps(entry) + "\n" for entry in entries))
    try:
        plot_losses(runs, out / "loss.png", chain=True)
    except ValueError as error:
        log.info("no loss.png, the stages' loss curves: %s", error)
    return report
