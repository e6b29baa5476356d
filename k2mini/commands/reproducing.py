"""The command `reproduce`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from k2mini.commands.common import LIST
from k2mini.config import QUANTIZE_NAMES

if TYPE_CHECKING:
    from k2mini.nn.llama import Llama

GEOBENCH = [Path(f"hf://datasets/daven3/geobench/geobench_{name}.json") for name in ("npee", "apstudy")]
PARTS = {"base": "huggyllama/llama-7b", "delta": "daven3/k2_fp_delta", "adapter": "daven3/k2_it_adapter"}


def reproduce_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `reproduce`; the defaults are K2's names on the hub, and how K2's code asks."""
    parser.add_argument("what", choices=("k2",), help="k2: LLaMA-7B, with K2's delta, and with its adapter")
    for part, what in zip(
        PARTS, ("the base", "what further pretraining added to it", "what instruction tuning added"), strict=True
    ):
        parser.add_argument(f"--{part}", metavar="DIR", help=f"{what} (default: {PARTS[part]})")
    parser.add_argument(
        "--full", metavar="DIR", help="K2 in one, such as daven3/k2-v1, in the place of delta and adapter"
    )
    parser.add_argument(
        "--benchmark", **LIST, type=Path, metavar="FILE", help="GeoBench's two files (default: those on the hub)"
    )
    parser.add_argument("--shots-file", metavar="FILE", help="K2's evaluation/multiple_choice_samples_wa.txt")
    parser.add_argument("--scoring", choices=("k2", "letter"), default="k2", help="as of eval (default: k2)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions of each task")
    parser.add_argument("--quantize", choices=QUANTIZE_NAMES, help="as of eval (default: no)")
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="keep results there, and go on with them"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON and nothing else")
    parser.set_defaults(run=run_reproduce)


def run_reproduce(options: argparse.Namespace) -> None:
    """Print K2's published figures beside those of its parts here."""
    from k2mini.build import open_model
    from k2mini.data.documents import data_path
    from k2mini.data.prompts import get_template
    from k2mini.evaluation.benchmarks import read_benchmark
    from k2mini.evaluation.instances import EvalConfig, PromptBuilder
    from k2mini.evaluation.reproduce import COLUMNS, SETTINGS, part_hashes, reproduce, reproduction_table
    from k2mini.files import output, sha256
    from k2mini.weights.model_directory import ModelDirectory

    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit must be at least 1, not {options.limit}")
    parts = {part: getattr(options, part) or default for part, default in PARTS.items()}
    if options.full is not None:
        if options.delta or options.adapter:
            raise ValueError("--full is K2 in one, in the place of --delta and --adapter; leave those out, or it")
        parts = {"base": parts["base"], "full": options.full}
    config = EvalConfig(options.scoring, get_template("k2_wa"), fewshot_file=options.shots_file)
    files = options.benchmark or GEOBENCH
    questions = [question for path in files for question in read_benchmark(path)]
    questions = [q for q in questions if options.limit is None or q.index < options.limit]
    if missing := {*COLUMNS.values()} - {question.task for question in questions}:
        raise ValueError(f"--benchmark has no questions of {', '.join(sorted(missing))}; name both of GeoBench's files")
    loaded = {"dtype": options.dtype, "quantize": options.quantize}
    settings = {"benchmarks": {str(path): sha256(data_path(path)) for path in files}, **loaded}

    def load(directory: ModelDirectory, adapter: str | None) -> Llama:
        return open_model(directory, options.device, options.threads, adapter=adapter, **loaded)[0]

    tokenizer, hashes = ModelDirectory(parts["base"]).require_tokenizer(), part_hashes(parts)
    PromptBuilder(questions, config, tokenizer, 0)  # which says before the long run whether K2's scoring can be
    with output(options.out, mark=(SETTINGS, "report.json"), inputs=[*parts.values(), *files]):
        report = reproduce(parts, hashes, questions, config, options.out, load=load, settings=settings)
        print(json.dumps(report, ensure_ascii=False) if options.json else reproduction_table(report))
