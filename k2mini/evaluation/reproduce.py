"""`k2mini reproduce k2`: the models that K2 was made of on GeoBench, beside the figures that were published."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from k2mini.build import empty_model
from k2mini.data.documents import data_path
from k2mini.dtypes import NAMES
from k2mini.evaluation.benchmarks import Question
from k2mini.evaluation.evaluate import check_kept, run_benchmark, write_report
from k2mini.evaluation.instances import EvalConfig
from k2mini.files import read_json, sha256, write_text
from k2mini.nn.llama import Llama
from k2mini.nn.lora import attach
from k2mini.weights.adapter import adapter_digest, checked_adapter, load_adapter, read_adapter, read_adapter_config
from k2mini.weights.delta import apply_delta
from k2mini.weights.model_directory import ModelDirectory, model_directory
from k2mini.weights.verify import verify

log = logging.getLogger(__name__)

SETTINGS = "reproduce.json"  # what a directory is known by
COLUMNS = {"NPEE": "npee/choice", "APTest": "ap"}
QUOTED_FROM = "arXiv 2401.00434v2 (GeoGalactica, by K2's authors), table 5; that of K2's paper could not be read"
# Accuracies in percent, a column each, as printed there: ChatGPT's 20.0 is Random's, too. Models of K2's run_eval.py
# for which no figure could be read have None.
QUOTED: dict[str, tuple[float, float] | None] = {
    "Random": (27.1, 20.0),
    "LLaMA-7B": (21.6, 27.6),
    "LLaMA-7B + delta": None,
    "K2-7B": (39.9, 29.3),
    "Gal-6.7B": (25.7, 29.9),
    "ChatGPT": (48.8, 20.0),
    **dict.fromkeys(("GPT-2 XL", "MPT-7B", "Vicuna-7B", "Alpaca-7B")),
}


def part_hashes(parts: Mapping[str, str]) -> dict[str, str]:
    """Of each part `ModelDirectory.fingerprint`, of the adapter the SHA-256 of its files.

    Raises ValueError where one is missing or damaged.
    """
    found = {name: ModelDirectory(part).fingerprint() for name, part in parts.items() if name != "adapter"}
    if "adapter" in parts:
        read_adapter(place := model_directory(parts["adapter"]), read_adapter_config(place))
        found["adapter"] = adapter_digest(place)
    return found


def reproduce(
    parts: Mapping[str, str],
    hashes: Mapping[str, str],
    questions: Sequence[Question],
    config: EvalConfig,
    out: Path,
    *,
    load: Callable[[ModelDirectory, str | None], Llama],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Evaluate base, base + delta and that with the adapter, or the full model; write report.json.

    `out` has a folder of `eval` for each, and base + delta as a model, `further_pretrained`; a killed run goes on.
    What does not fit is found before the first evaluation. With another adapter than one that did not, `out` goes on.

    Args:
        parts, hashes: `base`, and `full` or `delta` and `adapter`, each a directory or an id on the hub; and what
            `part_hashes` says of them.
        load: a directory and an adapter -> the model.
        settings: what else the report is to say, and the same run has.

    Returns: report.json. Raises ValueError where `out` holds a reproduction of something else, and as `apply_delta` and
    `run_benchmark` do.
    """
    known = {"hashes": {part: value for part, value in hashes.items() if part != "adapter"}, **settings}
    known |= config.settings()
    if config.fewshot_file is not None:
        known["shots_sha256"] = sha256(data_path(config.fewshot_file))
    before = read_json(out / SETTINGS) if (out / SETTINGS).is_file() and any(out.glob("*/")) else known
    if before != known:
        odd = [key for key in known if not isinstance(before, dict) or before.get(key) != known[key]]
        raise ValueError(f"{out} holds a reproduction with other {', '.join(odd)} ({SETTINGS}); name another --out")
    write_text(out / SETTINGS, json.dumps(known, indent=2) + "\n")
    for note in (notes := _differences(config, questions)):
        log.info(note)
    full = parts.get("full") or str(_further_pretrained(parts, out))
    stages: dict[str, tuple[str, str, str | None]] = {"LLaMA-7B": ("base", parts["base"], None)}
    stages |= {"LLaMA-7B + delta": ("delta", full, None)} if "delta" in parts else {}
    stages["K2-7B"] = ("k2", full, parts.get("adapter"))
    made_by, used = {}, dict[str, str]()
    for folder, model, added in stages.values():
        _check(directory := ModelDirectory(model), added)
        made_by[folder] = {"model": directory.fingerprint(), "adapter": hashes["adapter"] if added else None}
        check_kept(out / folder, questions, config, directory.require_tokenizer(), made_by[folder])

    def run(folder: str, model: str, added: str | None) -> dict[str, Any]:
        name, loaded = model + (f" + {added}" if added else ""), load(directory := ModelDirectory(model), added)
        used.update(device=str(loaded.device), dtype=NAMES[loaded.dtype])
        kept: Any = {"name": name, "out": out / folder, "label": folder, "made_by": made_by[folder]}
        report, results = run_benchmark(loaded, directory.require_tokenizer(), questions, config, **kept)
        write_report(out / folder, report, results)
        return {row["task"]: row for row in report["tasks"]}

    found = {row: run(*stage) for row, stage in stages.items()}
    found["Random"] = {task: {"accuracy": row["chance"]} for task, row in found["LLaMA-7B"].items()}
    report: dict[str, Any] = {"rows": _rows(found), "quoted_from": QUOTED_FROM, "notes": notes}
    report["settings"] = known | {"parts": dict(parts), "hashes": dict(hashes)}
    report |= {"used": used, "versions": {name: version(name) for name in ("k2mini", "torch")}}
    write_text(out / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return report


def _further_pretrained(parts: Mapping[str, str], out: Path) -> Path:
    """Base + delta, made or, where an earlier start made it, as it was made."""
    further = out / "further_pretrained"
    if not further.exists():  # it comes whole or not at all
        log.info("%s + %s: into %s", parts["base"], parts["delta"], further)
        apply_delta(model_directory(parts["base"]), model_directory(parts["delta"]), further)
        return further
    try:
        verify(further)
    except ValueError as error:
        raise ValueError(f"{error}; remove {further}, and it is made anew") from None
    return further


def _check(directory: ModelDirectory, adapter: str | None) -> None:
    """Raise ValueError where tensors of a model, or of an adapter for it, are missing or of another shape."""
    model = empty_model(directory)
    if adapter is not None:
        attach(model, section := checked_adapter(path := model_directory(adapter), directory))
        load_adapter(model, path, section)


def _rows(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """A row a model; of each column `ours`, with its 95 % interval, and `quoted`, or None."""
    rows = []
    for model, quoted in QUOTED.items():
        row: dict[str, Any] = {"model": model}
        for place, (column, task) in enumerate(COLUMNS.items()):
            held = found.get(model, {}).get(task)
            ours = held and {key: held[key] for key in ("accuracy", "low", "high", "n") if key in held}
            row[column] = {"ours": ours, "quoted": quoted and quoted[place] / 100}
        rows.append(row)
    return rows


def _differences(config: EvalConfig, questions: Sequence[Question]) -> list[str]:
    """In what this is known to differ from what K2's code did."""
    asked = [sum(question.task == task for question in questions) for task in COLUMNS.values()]
    notes = [
        f"asked: {asked[0]:,} and {asked[1]:,} questions; K2 counts 183 and 1,395, its files have 182 and 1,395",
        "asked with 'The answer is:'; which of K2's two prompts was published is not said",
    ]
    if config.scoring != "k2":
        notes.append(f"scored by {config.scoring!r}; K2's code reads fixed ids (--scoring k2)")
    if config.fewshot_file is None:
        notes.append("asked without K2's four examples (--shots-file)")
    return notes


def reproduction_table(report: Mapping[str, Any]) -> str:
    """Ours beside what was published, as text."""
    lines = [f"{'model':<16}" + "".join(f"  {f'{column}, ours':>23}  {'published':>10}" for column in COLUMNS)]
    for row in report["rows"]:
        line = f"{row['model']:<16}"
        for ours, quoted in ((row[column]["ours"], row[column]["quoted"]) for column in COLUMNS):
            said = "–" if ours is None else f"{100 * ours['accuracy']:.1f} %"
            if ours is not None and "low" in ours:
                said += f" ({100 * ours['low']:.1f} – {100 * ours['high']:.1f})"
            line += f"  {said:>23}  {'not quoted' if quoted is None else f'{100 * quoted:.1f} %':>10}"
        lines.append(line)
    return "\n".join([*lines, f"published: {report['quoted_from']}", *report["notes"]])
