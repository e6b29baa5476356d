"""NPEE's choice questions with K2's own four examples, beside K2's loop over transformers and lm-eval's backend.

    python tools/bench_eval.py --model DIR --geobench FOLDER [--pairs 3] [--questions 60]
    python tools/bench_eval.py --model DIR --geobench FOLDER --ranks 2 [--pairs 3] [--questions 182]

K2's loop (github:davendw49/k2, evaluation/run_eval.py) runs every question with its whole prefix through the model, one
at a time. lm-evaluation-harness (where lm-eval is installed) scores each option by log-likelihood in its HF backend,
in batches, longest first. All get the same prompts and threads; answers are compared question by question.

With --ranks nothing is compared with others: that many processes of one thread share the questions, and in turns one
of them answers all, while the others wait. Results are compared to the last bit.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from k2mini.build import load_model
from k2mini.config import ParallelSection
from k2mini.data.prompts import get_template
from k2mini.data.tokenizer import Tokenizer
from k2mini.distributed import ranks
from k2mini.evaluation.benchmarks import Question, load_geobench
from k2mini.evaluation.evaluate import evaluate
from k2mini.evaluation.instances import EvalConfig, PromptBuilder
from k2mini.nn.llama import Llama

Answers = list[str | None]


def k2_loop(reference: Any, requests: list[Any]) -> Answers:
    """K2's loop: a forward a question, the softmax at its end read at the letters."""
    answers: Answers = []
    for instance in requests:
        with torch.inference_mode():
            logits = reference(torch.tensor([instance.request.prefix])).logits[0, -1]
        probabilities = logits.float().softmax(-1)
        found = [probabilities[ids[0]].item() for ids in instance.ids]
        answers.append(instance.answers[found.index(max(found))])
    return answers


def harness(backend: Any, tokenizer: Tokenizer, requests: list[Any]) -> Answers:
    """lm-eval's log-likelihoods of every option, on token ids, so that its tokenizer does not matter."""
    flat = [(("", ""), list(instance.request.prefix), ids) for instance in requests for ids in instance.ids]
    scores = [score for score, _ in backend._loglikelihood_tokens(flat, disable_tqdm=True)]
    answers: Answers = []
    place = 0
    for instance in requests:
        mine = scores[place : place + len(instance.ids)]
        place += len(instance.ids)
        answers.append(instance.answers[mine.index(max(mine))])
    return answers


def transformers_model(folder: Path) -> Any:
    """The reference, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def compare(
    label: str,
    model: Llama,
    tokenizer: Tokenizer,
    questions: list[Question],
    config: EvalConfig,
    peer: Callable[[list[Any]], Answers],
    number: int,
) -> None:
    """Measure ours and the peer in turns, and print the ratio of their rates."""
    builder = PromptBuilder(questions, config, tokenizer, model.config.max_seq_len)
    requests = [builder.build(question) for question in questions]
    ratios, same = [], True
    for _ in range(number):
        start = time.perf_counter()
        ours = [result.prediction for result in evaluate(model, tokenizer, questions, config)]
        middle = time.perf_counter()
        theirs = peer(requests)
        ratios.append((time.perf_counter() - middle) / (middle - start))
        rate = len(questions) / (middle - start)
        same = same and ours == theirs
    print(
        f"{label:58} {rate:6.1f} questions a second, {statistics.median(ratios):5.1f} times the peer's rate "
        f"({min(ratios):.1f} to {max(ratios):.1f}); answers {'the same' if same else 'DIFFER'}",
        flush=True,
    )


def over_ranks(options: argparse.Namespace) -> None:
    """One of the ranks, which torchrun started."""
    torch.set_num_threads(1)
    with ranks(torch.device("cpu"), ParallelSection()) as world:
        model, tokenizer = load_model(options.model)
        assert tokenizer is not None
        questions = npee_choice(options)
        file = options.geobench / "multiple_choice_samples.txt"
        config = EvalConfig("letter", get_template("k2"), fewshot_file=str(file))
        alone, together, same = [], [], True
        for _ in range(options.pairs + 1):  # the first pair warms up
            world.barrier()
            start = time.perf_counter()
            one = evaluate(model, tokenizer, questions, config) if world.is_main else []
            alone.append(time.perf_counter() - start)
            world.barrier()
            start = time.perf_counter()
            many = evaluate(model, tokenizer, questions, config, world=world)
            together.append(time.perf_counter() - start)
            same = same and (one == many or not world.is_main)
    if world.is_main:
        ratios = [a / b for a, b in zip(alone[1:], together[1:], strict=True)]
        seconds = f"{statistics.median(alone[1:]):.1f} s alone, {statistics.median(together[1:]):.1f} s together"
        print(
            f"{len(questions)} questions, {world.size} processes of one thread: {statistics.median(ratios):.2f} times"
        )
        print(f"the rate of one ({min(ratios):.2f} to {max(ratios):.2f}; {seconds});", end=" ")
        print(f"results {'the same' if same else 'DIFFER'}")


def npee_choice(options: argparse.Namespace) -> list[Question]:
    """NPEE's first choice questions."""
    choice = [q for q in load_geobench(options.geobench / "geobench_npee.json") if q.task == "npee/choice"]
    return choice[: options.questions]


def main() -> None:
    """Measure both forms of K2's examples against every peer that is installed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--geobench", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=1)
    options = parser.parse_args()
    if "LOCAL_RANK" in os.environ:
        over_ranks(options)
        return
    if options.ranks > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}"]
        subprocess.run([sys.executable, *launch, *sys.argv], check=True)
        return
    torch.set_num_threads(options.threads)
    model, tokenizer = load_model(options.model)
    assert tokenizer is not None
    reference = transformers_model(options.model)
    questions = npee_choice(options)
    try:
        from lm_eval.models.huggingface import HFLM
        from transformers import AutoTokenizer

        theirs = AutoTokenizer.from_pretrained(options.model)  # it is not used: all get the same ids
        backend = HFLM(pretrained=reference, tokenizer=theirs, batch_size=16, max_length=model.config.max_seq_len)
    except ImportError:
        backend = None
        print("lm-eval is not installed, so its backend was not measured")
    for form, what in (("", "without"), ("_wa", "with")):
        file = options.geobench / f"multiple_choice_samples{form}.txt"
        config = EvalConfig("letter", get_template(f"k2{form}"), fewshot_file=str(file))
        label = f"four examples, {what} 'The answer is'"
        compare(
            f"{label}: K2's loop", model, tokenizer, questions, config, lambda r: k2_loop(reference, r), options.pairs
        )
        if backend is not None:
            compare(
                f"{label}: lm-eval",
                model,
                tokenizer,
                questions,
                config,
                lambda r: harness(backend, tokenizer, r),
                options.pairs,
            )


if __name__ == "__main__":
    main()
