"""What LoRA on documents gives, and what not: the demo's recipe, its documents learned in several ways, over seeds.

Each seed is a whole `k2mini demo --lora`; then come the variants, in its folder, with its data, base and two stages of
instruction tuning, so that nothing differs but how the documents were learned. What is finished is not run again.

    python tools/demo_lora.py --seeds 0 1 2
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from k2mini.config import FinetuneConfig, LoraSection, PretrainConfig
from k2mini.config_file import load_config
from k2mini.demo.pipeline import run_demo
from k2mini.demo.stages import Stage, judge, summary
from k2mini.training.run import finetune, pretrain
from k2mini.weights.merge import merge_adapters

ALL: dict[str, Any] = {"dropout": 0.0, "target_modules": "all"}
WHOLE: dict[str, Any] = {**ALL, "train_embeddings": True, "train_head": True}
# Name -> adapters, learning rate, steps (the demo's: 400). The demo's own: rank 64, 5e-3.
VARIANTS = {
    "r8": (LoraSection(8, 16.0, **ALL), 1e-2, 400),
    "r8_embeddings": (LoraSection(8, 16.0, **WHOLE), 5e-3, 400),
    "r8_1200_steps": (LoraSection(8, 16.0, **ALL), 1e-2, 1200),
}
FIELDS = ("perplexity", "perplexity_heldout_phrasings", "accuracy", "seen", "unseen")


def learned(out: Path, name: str) -> list[dict]:
    """The documents by a variant's adapters, merged, and both stages over that: three judged stages' entries."""
    section, lr, steps = VARIANTS[name]
    config = load_config(PretrainConfig, out / "configs/lora_documents.yaml")
    train = replace(config.train, lr=lr, max_steps=steps)
    own = replace(config.run, dir=str(out / name / "documents"))
    adapter = pretrain(replace(config, run=own, lora=section, train=train))
    if not (model := out / name / "model").exists():
        merge_adapters(out / "base", [adapter], model)
    stages, first = [Stage(f"{name}_documents", model)], None
    for step in ("stage1", "stage2"):
        tuning = load_config(FinetuneConfig, out / f"configs/lora_{step}.yaml")
        assert tuning.lora is not None
        start = replace(tuning.lora, init_adapter=None if first is None else str(first))
        own = replace(tuning.run, dir=str(out / name / step))
        first = finetune(replace(tuning, run=own, model=replace(tuning.model, path=str(model)), lora=start))
        stages.append(Stage(f"{name}_{step}", model, first))
    for stage in stages:
        judge(out, stage)
    return [summary(out, stage) for stage in stages]


def line(name: str, row: dict) -> str:
    """A stage's figures."""
    shown = [f"{row[key]:>8.1f}" if key.startswith("perplexity") else f"{100 * row[key]:>6.1f} %" for key in FIELDS]
    return f"{name:<24} {' '.join(shown)}"


def main() -> None:
    """Run what is missing, print each seed's rows as they come, then the means over seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo_lora"), metavar="DIR")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=[*VARIANTS], help="beside the demo's own")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[dict]] = {}

    def note(rows: list[dict], seed: int) -> None:
        for row in rows:
            found.setdefault(row["stage"], []).append(row)
            print(line(f"{seed} {row['stage']}", row), flush=True)

    print("seed, stage              documents phrasings accuracy   seen   unseen   (perplexity twice, accuracy)")
    for seed in options.seeds:
        note(run_demo(options.out / str(seed), seed=seed, lora=True)["stages"], seed)
    for name in options.variants:
        for seed in options.seeds:
            note(learned(options.out / str(seed), name), seed)
    print(f"\nmeans over seeds {options.seeds}")
    for stage, rows in found.items():
        spread = [row["accuracy"] for row in rows]
        mean = {key: sum(row[key] for row in rows) / len(rows) for key in FIELDS}
        print(f"{line(stage, mean)}   accuracy from {100 * min(spread):.1f} to {100 * max(spread):.1f} %")


if __name__ == "__main__":
    main()
