"""Training against transformers and peft: python tools/bench_train.py pretrain|finetune (needs `[test]`).

pretrain   tokens a second, and the share of this machine's own rate of matrix products that a step reaches
finetune   LoRA on 512 examples of log-normal lengths: packed rows against peft's padded ones

The model has 58 M parameters (dim 512, 8 layers, vocabulary 32,000), random. k2mini is measured with blocks as they are
and compiled, as `train.compile` does; only its steps keep the memory that they free, as `k2mini pretrain` does.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from k2mini.build import make_trainable
from k2mini.config import LoraSection, ModelSection, ParallelSection, TrainSection
from k2mini.cpu import describe
from k2mini.data.batches import Blocks
from k2mini.data.corpus import Documents
from k2mini.data.packing import Example, PackedExamples
from k2mini.distributed import device_mesh, fill, ranks
from k2mini.model_config import ModelConfig
from k2mini.nn.init import init_weights
from k2mini.nn.llama import Llama
from k2mini.nn.lora import init_adapters
from k2mini.training.run import keep_freed_memory
from k2mini.training.step import build_optimizer, train_step

CONFIG = ModelConfig(
    dim=512,
    num_layers=8,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
    intermediate_dim=1376,
    vocab_size=32000,
    max_seq_len=2048,
)
ROWS, LENGTH = 2, 512


def turns(ours: dict[str, Callable[[], float]], theirs: Callable[[], float], number: int) -> dict[str, float]:
    """Print the median rates of all, measured in turn, and the median ratio of each of ours to theirs in its round.

    Returns: the medians of ours.
    """
    first = {}
    for name, run in ours.items():
        start = time.perf_counter()
        with keep_freed_memory():
            run()
        first[name] = time.perf_counter() - start
    theirs()
    rounds = []
    for _ in range(number):
        with keep_freed_memory():
            rates = {name: run() for name, run in ours.items()}
        rounds.append(rates | {"reference": theirs()})
    medians = {}
    for name in rounds[0]:
        values, ratios = [each[name] for each in rounds], [each[name] / each["reference"] for each in rounds]
        medians[name] = statistics.median(values)
        line = f"{name:<16} {medians[name]:>8,.0f} tokens/s   ({min(values):,.0f} to {max(values):,.0f}, {number} runs)"
        if name in ours:
            line += f"   ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            line += f"   first run {first[name]:.0f} s"
        print(line)
    return {name: medians[name] for name in ours}


def matrix_rate(size: int = 512) -> float:
    """The FLOP/s of one float32 product of square matrices, the best of five."""
    a, best = torch.ones(size, size), math.inf
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def trained(values: dict[str, torch.Tensor], dtype: Any, stack: ExitStack, *, compiled: bool) -> Llama:
    """The model as it trains: in 16 bits sharded, if over one rank, with weights in float32."""
    model, parallel, mesh = Llama(CONFIG).to("meta"), ParallelSection(), None
    section, device = TrainSection(lr=1e-5, max_steps=1, compile=compiled), torch.device("cpu")
    if dtype != "float32":
        mesh = device_mesh(stack.enter_context(ranks(device, parallel, alone_too=True)), parallel)
    make_trainable(model, ModelSection("", dtype=dtype), section, parallel, None, device, mesh)
    model.to_empty(device=device)
    for name, value in values.items():
        fill(model.get_parameter(name), value)
    return model


def pretrain(number: int, steps: int, dtype: str) -> None:
    """Full training of the same model on the same batches; the reference is transformers' Trainer.

    dtype: of products. The weights are in float32; in bfloat16, the Trainer has autocast, and is measured without, too.
    """
    from transformers import Trainer, TrainingArguments

    from k2mini.weights.model_files import save_model

    torch.manual_seed(0)
    rows = torch.randint(3, CONFIG.vocab_size, (64 * ROWS, LENGTH + 1))
    model = Llama(CONFIG)
    init_weights(model, 0)
    with tempfile.TemporaryDirectory() as folder:
        save_model(model.state_dict(), CONFIG, Path(folder) / "model")
        from transformers import LlamaForCausalLM

        reference = LlamaForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.float32)
    section = TrainSection(lr=1e-5, global_batch_size=ROWS, micro_batch_size=ROWS, max_steps=steps)
    samples = Blocks(Documents(rows[:, :-1].tolist()), LENGTH, document_mask=False, seed=None)

    def steps_of(model: Llama, optimizer: torch.optim.Optimizer) -> float:
        start = time.perf_counter()
        for step in range(steps):
            train_step(model, optimizer, [samples.batch(step * ROWS, ROWS)], section, step, steps)
        return steps * ROWS * LENGTH / (time.perf_counter() - start)

    data = [{"input_ids": row, "labels": row} for row in rows[:, :LENGTH]]
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = dict.fromkeys(("use_cpu", "disable_tqdm"), True)
        settings |= {"output_dir": folder, "per_device_train_batch_size": ROWS, "max_steps": steps}
        settings |= {"learning_rate": 1e-5, "report_to": [], "save_strategy": "no", "logging_steps": 1000}

        ours: dict[str, Callable[[], float]] = {}
        values = model.state_dict()
        for name in ("k2mini", "k2mini, compiled")[: 2 if dtype == "float32" else 1]:  # one process group
            mine = trained(values, dtype, stack, compiled=name != "k2mini").train()
            ours[name] = partial(steps_of, mine, build_optimizer(mine, section))

        def theirs(autocast: bool) -> float:
            arguments = TrainingArguments(**settings, bf16=autocast)
            trainer = Trainer(model=reference, args=arguments, train_dataset=data)
            start = time.perf_counter()
            trainer.train()
            return steps * ROWS * LENGTH / (time.perf_counter() - start)

        for autocast in (False, True)[: 1 if dtype == "float32" else 2]:
            print(f"{dtype}, the Trainer in {'bfloat16' if autocast else 'float32'}")
            rates = turns(ours, partial(theirs, autocast), number)
    peak = matrix_rate()
    for name, rate in rates.items() if dtype == "float32" else ():
        used = (CONFIG.num_parameters() - CONFIG.vocab_size * CONFIG.dim) * 6 * rate
        print(f"{name}: products alone need {used / 1e9:.0f} GFLOP/s, {100 * used / peak:.0f} % of {peak / 1e9:.0f}")


def finetune(number: int) -> None:
    """LoRA (rank 8, q, k, v) on the same examples, 128 a step; the reference is peft and the Trainer with K2's padding.

    Lengths are drawn once from a log-normal (median 80, sigma 0.7, cut at 512); prompts are supervised, as by K2.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    from k2mini.weights.model_files import save_model

    texts = drawn_texts(512)
    section, folder = LoraSection(), Path(tempfile.mkdtemp())
    models: dict[str, tuple[Llama, torch.optim.Optimizer]] = {}
    for name in ("k2mini", "k2mini, compiled"):
        model, training = Llama(CONFIG), TrainSection(lr=3e-4, max_steps=1, compile=name != "k2mini")
        init_weights(model, 0)
        if not models:
            save_model(model.state_dict(), CONFIG, folder / "model")
        make_trainable(model, ModelSection(""), training, ParallelSection(), section, torch.device("cpu"), None)
        init_adapters(model, 0)
        models[name] = model.train(), build_optimizer(model, training)
    settings = LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.05, target_modules=section.target_modules, task_type="CAUSAL_LM"
    )
    reference = get_peft_model(LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32), settings)
    compare_losses(models["k2mini"][0].eval(), reference.eval(), texts[:16])
    models["k2mini"][0].train()
    samples = PackedExamples([Example(text, 1) for text in texts], 512, seed=None)
    theirs = padded_steps(reference, folder / "run")
    calls = iter(range(10**6))  # they take turns, and all of a round take the same examples

    def ours_next(model: Llama, optimizer: torch.optim.Optimizer) -> float:
        start = time.perf_counter()
        batches = samples.rank_batches(128 * (next(calls) // 3 % 4), 128, 4, 0, 1)
        train_step(model, optimizer, batches, training, 0, 1)
        return sum(batch.num_supervised() for batch in batches) / (time.perf_counter() - start)

    def theirs_next() -> float:
        position = 128 * (next(calls) // 3 % 4)
        return theirs(texts[position : position + 128])

    turns({name: partial(ours_next, *pair) for name, pair in models.items()}, theirs_next, number)


def drawn_texts(number: int) -> list[list[int]]:
    """Random token ids between BOS and EOS, of log-normal lengths."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.empty(number).log_normal_(math.log(80), 0.7, generator=generator)
    lengths = drawn.round().clamp(8, 512).to(torch.int64).tolist()
    return [[1, *torch.randint(3, CONFIG.vocab_size, (n - 2,), generator=generator).tolist(), 2] for n in lengths]


def padded_steps(reference: Any, folder: Path) -> Callable[[list[list[int]]], float]:
    """A function that takes one step of transformers' Trainer on texts and returns its supervised tokens a second."""
    from transformers import DataCollatorForSeq2Seq, LlamaTokenizer, Trainer, TrainingArguments

    from k2mini.demo.sources import BASE

    collator = DataCollatorForSeq2Seq(LlamaTokenizer.from_pretrained(BASE), pad_to_multiple_of=8, padding=True)
    collator.tokenizer.pad_token_id = 0
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=32,
        max_steps=1,
        learning_rate=3e-4,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )

    def step(texts: list[list[int]]) -> float:
        data = [{"input_ids": row, "attention_mask": [1] * len(row), "labels": row} for row in texts]
        trainer = Trainer(model=reference, args=arguments, train_dataset=data, data_collator=collator)
        start = time.perf_counter()
        trainer.train()
        return sum(len(row) - 1 for row in texts) / (time.perf_counter() - start)

    return step


def compare_losses(model: Llama, reference: Any, texts: list[list[int]]) -> None:
    """Print how far the two models' losses differ on each example, and ours on packed and single examples."""
    worst = 0.0
    with torch.no_grad():
        for text in texts:
            tokens = torch.tensor([text])
            mean = model.loss(tokens[:, :-1], None, tokens[:, 1:]).item() / (len(text) - 1)
            worst = max(worst, abs(mean - reference(tokens, labels=tokens).loss.item()))
        batches = PackedExamples([Example(t, 1) for t in texts], 512, seed=None).rank_batches(0, len(texts), 2, 0, 1)
        packed = sum(model.loss(b.tokens, b.positions, b.labels).item() for b in batches)
        alone = sum(model.loss(t[:, :-1], None, t[:, 1:]).item() for t in (torch.tensor([text]) for text in texts))
    print(f"losses differ by at most {worst:.1e} an example; packed and alone by {abs(packed - alone) / alone:.1e}")


def main() -> None:
    """Run the benchmark that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("pretrain", "finetune"))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of pretrain")
    options = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; {describe()}")
    if options.what == "pretrain":
        pretrain(options.pairs, options.steps, options.dtype)
    else:
        finetune(options.pairs)


if __name__ == "__main__":
    main()
