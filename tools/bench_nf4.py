"""What NF4 costs a real model: python tools/bench_nf4.py --model smollm2 --geobench geobench

Prints the perplexity of NPEE's open questions with their answers under the model in float32, in int8, in NF4, and with
its blocks' matrices replaced by what bitsandbytes (a CPU's functional interface) makes of them. With --arc it trains
LoRA over a float32 and an NF4 base on K2's instruction data arc_sft.json, and prints the losses on held-out records.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from k2mini.build import load_model
from k2mini.cli import main as k2mini
from k2mini.evaluation.perplexity import text_perplexity
from k2mini.nn.llama import Llama
from k2mini.nn.quant import int8_matrices


def under_bitsandbytes(model: Llama) -> Llama:
    """The model with its blocks' matrices quantised to NF4 and back by bitsandbytes."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in int8_matrices({name: tuple(each.shape) for name, each in parameters.items()}):
            codes, state = quantize_4bit(parameters[name], quant_type="nf4", compress_statistics=True)
            parameters[name].copy_(dequantize_4bit(codes, state))
    return model


def perplexities(path: Path, geobench: Path, limit: int | None) -> None:
    """One line each, with the rise over float32."""
    asked = json.loads((geobench / "geobench_npee.json").read_text(encoding="utf-8"))["qa"]
    texts = [f"{question} {answer}" for question, answer in zip(asked["question"], asked["answer"], strict=True)][
        :limit
    ]
    plain = 0.0
    for name in ("float32", "int8", "nf4", "bitsandbytes"):
        model, tokenizer = load_model(path, dtype="float32", quantize=name if name in ("int8", "nf4") else None)
        assert tokenizer is not None
        if name == "bitsandbytes":
            model = under_bitsandbytes(model)
        found = text_perplexity(model, tokenizer, texts)
        plain = plain or found.perplexity
        rise = f"{100 * (found.perplexity / plain - 1):+.2f} %"
        print(f"{name:12}  {len(texts)} texts, {found.tokens:,} tokens: {found.perplexity:.4f}  {rise}", flush=True)


def adapters(path: Path, arc: Path, bases: list[str], steps: int, held_out: int) -> None:
    """Train an adapter over each base, the same way, and print the losses of the records held out."""
    for how in bases:
        with tempfile.TemporaryDirectory() as folder:
            settings = [f"run.dir={folder}/run", f"model.path={path}", f"model.quantize={how}", f"data.path={arc}"]
            settings += [f"data.val_size={held_out}", f"train.max_steps={steps}", f"train.val_every={steps}"]
            (config := Path(folder, "arc.yaml")).write_text(
                "run: {dir: x}\nmodel: {path: x, dtype: float32}\ndata: {path: x, max_seq_len: 256, val_size: 1}\n"
                "train: {lr: 5.0e-4, max_steps: 1, global_batch_size: 8, micro_batch_size: 8, warmup_steps: 4}\n"
                "lora: {rank: 8, alpha: 16, dropout: 0.0}\n"
            )
            try:
                k2mini(["finetune", str(config), *settings])
            except SystemExit as end:
                if end.code:
                    raise
            rows = [json.loads(line) for line in Path(folder, "run/metrics.jsonl").read_text().splitlines()]
        told = [row["val_loss"] for row in rows if "val_loss" in row]
        said = f"LoRA, model.quantize={how}: {steps} steps of 8, {held_out} records held out"
        print(f"{said}, validation losses {', '.join(f'{loss:.4f}' for loss in told)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a model's directory")
    parser.add_argument("--geobench", type=Path, help="GeoBench's folder")
    parser.add_argument("--limit", type=int, help="so many of its texts (default: all)")
    parser.add_argument("--arc", type=Path, help="arc_sft.json")
    parser.add_argument("--bases", nargs="+", default=["null", "nf4"], help="values of model.quantize")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--held-out", type=int, default=100, help="records of the data that validate")
    options = parser.parse_args()
    if options.geobench is not None:
        perplexities(options.model, options.geobench, options.limit)
    if options.arc is not None:
        adapters(options.model, options.arc, options.bases, options.steps, options.held_out)


if __name__ == "__main__":
    main()
