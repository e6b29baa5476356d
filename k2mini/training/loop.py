"""The one training loop, and what a run reports: metrics.jsonl, samples.jsonl, the progress line, the summary."""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from k2mini.config import CheckpointSection, EvalSection, RunSection, TrainSection, check_fields
from k2mini.data.batches import Prefetcher, Samples
from k2mini.distributed import ALONE, World, reshard
from k2mini.errors import StoppedBySignalError
from k2mini.files import parse_json, progress_bar, read_text, write_text
from k2mini.gpu import peak_flops
from k2mini.nn.llama import Llama
from k2mini.training.boards import Board, open_boards
from k2mini.training.checkpoint import best_loss, prune, resume
from k2mini.training.save import Saver, check_finite
from k2mini.training.step import build_optimizer, local_batches, rank_share, total_steps, train_step
from k2mini.training.validation import validation_loss

log = logging.getLogger(__name__)

FILE, SAMPLES = "metrics.jsonl", "samples.jsonl"
NUMBERS = ("loss", "val_loss", "tokens", "tokens_per_second")  # what is read again, beside the scores of a benchmark
ACCURACY = "accuracy/"  # begins a score's name
NO_BENCHMARK = EvalSection()
Evaluate = Callable[[Llama], dict[str, float]]
Answer = Callable[[Llama], list[tuple[str, str]]]  # (prompt, answer) of each of `eval.prompts`


@dataclass(frozen=True)
class Task:
    """Everything in which further pretraining and instruction tuning differ, beside the parameters that train.

    Attributes:
        samples, val: what is trained on, and what validates, if anything.
        identity: what must be the same for a checkpoint to be resumed (data, schedule, …), as plain JSON.
        label: of the progress line.
        save_best: save a checkpoint whenever validation finds a lower loss than before.
        answer: called at each validation, and where one would be; what it returns goes into samples.jsonl.
    """

    samples: Samples
    val: Samples | None = None
    identity: dict[str, Any] = field(default_factory=dict)
    label: str = "train"
    save_best: bool = False
    answer: Answer | None = None


def train(
    model: Llama,
    task: Task,
    run: RunSection,
    section: TrainSection,
    checkpoint: CheckpointSection,
    evaluation: EvalSection = NO_BENCHMARK,
    evaluate: Evaluate | None = None,
    world: World = ALONE,
) -> Path:
    """Train what `requires_grad`, from the checkpoint that `checkpoint.resume` names, if any. Returns the last one.

    Metrics and checkpoints go into `run.dir`. Random draws follow from (run.seed, step, rank), after a kill as well.

    Args:
        evaluate: called every `evaluation.every` steps and at the end; the scores it returns go into the metrics.

    Raises ValueError where the ranks can't share a global batch evenly, a checkpoint does not fit, or a loss,
    gradient or weight is not finite; StoppedBySignalError after a signal (see `_signals`), once a checkpoint is saved.
    """
    if task.samples.even:
        rank_share(section, world.size)
    optimizer, folder = build_optimizer(model, section), Path(run.dir) / "checkpoints"
    batch_size, steps = section.global_batch_size, total_steps(section, task.samples.num_samples)
    with _signals() as received, ExitStack() as stack:
        step, tokens = resume(folder, checkpoint, model, optimizer, task.identity, world)
        metrics, throughput = Metrics(run, step, world), Throughput(model, world)
        stack.callback(metrics.close)
        saver = stack.push(Saver(folder, checkpoint, world))
        best = world.broadcast(best_loss(folder))
        prefetcher = stack.enter_context(Prefetcher(partial(local_batches, task.samples, section=section, world=world)))
        progress = stack.enter_context(progress_bar(steps, task.label, "steps", step, shown=world.is_main))
        model.train()
        while step < steps:
            start = time.perf_counter()
            torch.manual_seed(_draw_seed(run.seed, step, world.rank))
            batches = prefetcher.get(step * batch_size, (step + 1) * batch_size if step + 1 < steps else None)
            figures = train_step(model, optimizer, batches, section, step, steps, world)
            seen, stop = world.all_reduce(sum(batch.num_tokens() for batch in batches), bool(received or saver.failed))
            step, tokens, rate = step + 1, tokens + int(seen), seen / (time.perf_counter() - start)
            metrics.write(step, **figures, tokens=tokens, tokens_per_second=round(rate, 1))
            progress.set_postfix_str(throughput.line(figures, rate), refresh=False)
            progress.update()
            if _due(step, steps, checkpoint.every) or _due(step, steps, section.val_every) or stop:
                check_finite(model, step, world)
            due = _due(step, steps, section.val_every)
            val_loss = _validate(model, task, section.micro_batch_size, metrics, step, world) if due else None
            if evaluate is not None and evaluation.every and _due(step, steps, evaluation.every):
                metrics.write(step, **_asked(model, evaluate))
            if better := task.save_best and val_loss is not None and val_loss < best:
                best = val_loss
            if _due(step, steps, checkpoint.every) or stop or better:
                state = {"identity": task.identity, "tokens": tokens, "val_loss": val_loss}
                path = saver.save(step, model, optimizer, state, wait=bool(stop) or step == steps)
                if stop and step < steps:
                    raise StoppedBySignalError(received[0] if received else signal.SIGTERM, f"saved {path}")
    prune(folder, checkpoint, world)  # once more, for a process that was killed in it
    model.eval()
    return folder / f"step_{step:07}"


def _due(step: int, steps: int, every: int | None) -> bool:
    """Whether something that is done every so many steps, and after the last one, is to be done now."""
    return step == steps or bool(every and step % every == 0)


def _draw_seed(seed: int, step: int, rank: int) -> int:
    return (seed * 1_000_003 + step + rank * 1_000_000_007) % 2**63


def _validate(model: Llama, task: Task, batch_size: int, metrics: Metrics, step: int, world: World) -> float | None:
    """Note the loss on what validates, if anything, and the answers to what is asked. Returns the loss."""
    val_loss = None
    if task.val is not None:
        val_loss = validation_loss(model, task.val, batch_size, world)
        metrics.write(step, val_loss=val_loss)
    if task.answer is not None:
        metrics.write_samples(step, _asked(model, task.answer))
    return val_loss


def _asked(model: Llama, ask: Callable[[Llama], Any]) -> Any:
    model.eval()
    found = ask(model)
    model.train()
    reshard(model)
    return found


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Catch SIGINT, SIGTERM and SIGHUP: the first is noted in the list that is yielded; a second acts as without.

    Not so under torchrun, which passes on to its ranks what Slurm sends to all processes, and kills what does not end.
    Under nohup SIGHUP stays ignored.
    """
    received: list[int] = []
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    if previous[signal.SIGHUP] == signal.SIG_IGN:
        del previous[signal.SIGHUP]

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        for each, handler in previous.items() if "LOCAL_RANK" not in os.environ else ():
            signal.signal(each, handler)

    for number in previous:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Metrics:
    """metrics.jsonl of a run that goes on after `step`: one object a line, each line whole, no step twice.

    Lines of later steps, and a line that a killed process left unfinished, are dropped: those steps come again. So it
    is with samples.jsonl. `run.tensorboard` and `run.wandb` get the metrics too. Only rank 0 writes.

    Raises ValueError as `open_boards` does.
    """

    def __init__(self, run: RunSection, step: int, world: World = ALONE) -> None:
        self._folder, self._writes, self._boards = Path(run.dir), world.is_main, list[Board]()
        if not self._writes:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in (self._folder / FILE, *filter(Path.exists, [self._folder / SAMPLES])):
            kept = [entry for entry in (read_metrics(path) if path.exists() else []) if entry["step"] <= step]
            write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))
        if run.tensorboard or run.wandb:
            self._boards = open_boards(run, step)

    def write(self, step: int, **values: float) -> None:
        """Append one line."""
        self._append(FILE, [{"step": step, **values}])
        for board in self._boards:
            board.write(step, values)

    def write_samples(self, step: int, answers: Sequence[tuple[str, str]]) -> None:
        """Append what was answered, a line for each prompt."""
        self._append(SAMPLES, [{"step": step, "prompt": prompt, "answer": answer} for prompt, answer in answers])

    def _append(self, name: str, entries: Sequence[dict[str, Any]]) -> None:
        if self._writes:
            with (self._folder / name).open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(entry) + "\n" for entry in entries))

    def close(self) -> None:
        """Let what is on its way to the boards arrive."""
        for board in self._boards:
            board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics file, parsed. Raises ValueError, naming the line, where one is not of metrics."""
    entries = []
    for number, line in enumerate(read_text(path).split("\n")[:-1], start=1):
        where = f"{path}, line {number}"
        entry = parse_json(line, where)
        check_fields(entry, {"step": int}, where)
        check_fields(entry, {key: float for key in entry if key in NUMBERS or key.startswith(ACCURACY)}, where)
        if large := [key for key in ("step", "tokens") if abs(entry.get(key, 0)) > 10**15]:
            raise ValueError(f"{where}: {large[0]} is {entry[large[0]]}, which no run reaches")
        entries.append(entry)
    return entries


def summary(path: Path) -> str:
    """What a metrics file says of its run, as lines of text: length, losses, and what a benchmark found last."""
    entries = read_metrics(path)
    lines = []
    if steps := [entry for entry in entries if entry.keys() >= {"loss", "tokens", "tokens_per_second"}]:
        first, last, seconds, before = steps[0], steps[-1], 0.0, 0
        for entry in steps:
            seconds += (entry["tokens"] - before) / max(entry["tokens_per_second"], 0.1)
            before = entry["tokens"]
        pace = f"{last['tokens'] / max(seconds, 1e-9):,.0f} tokens/s, without validation and saving"
        time_taken = timedelta(seconds=max(0, min(round(seconds), 10**9)))
        lines.append(f"{last['step']:,} steps, {last['tokens']:,} tokens in {time_taken} ({pace})")
        lines.append(f"training loss {first['loss']:.3f} at step {first['step']}, {last['loss']:.3f} at {last['step']}")
    if validated := [entry for entry in entries if "val_loss" in entry]:
        lines.append(f"validation loss {_validated(validated[-1])}")
        if (best := min(reversed(validated), key=lambda entry: entry["val_loss"])) is not validated[-1]:
            lines.append(f"the lowest was {_validated(best)}")
    scores = {key.removeprefix(ACCURACY): (e[key], e["step"]) for e in entries for key in e if key.startswith(ACCURACY)}
    lines += [f"accuracy of {task} {100 * score:.1f} % at step {step}" for task, (score, step) in scores.items()]
    return "\n".join(lines)


def _validated(entry: dict[str, Any]) -> str:
    perplexity = math.exp(min(entry["val_loss"], 700))
    return f"{entry['val_loss']:.3f} at step {entry['step']} (perplexity {perplexity:.4g})"


class Throughput:
    """The progress line: loss, learning rate, tokens a second, MFU, memory.

    MFU, model FLOPs utilisation (Chowdhery et al. 2022, arXiv 2204.02311, appendix B), is the arithmetic that the
    tokens need over the arithmetic that the GPUs could do in that time in bfloat16, whatever the run's dtype; the log
    says once by what peak (see `gpu.peak_flops`). It is left out on a CPU, whose rate in float32 and in bfloat16 can be
    far apart. A token needs 6 FLOP for each trained parameter and 4 for each frozen one; attention and what activation
    checkpointing recomputes are not counted.
    """

    def __init__(self, model: Llama, world: World) -> None:
        embedding = model.model.embed_tokens.weight
        self._flops_per_token = sum(
            (6 if parameter.requires_grad else 4) * parameter.numel()
            for parameter in model.parameters()
            if parameter is not embedding or model.lm_head is None
        )
        self._device, self._ranks, self._peak = world.device, world.size, 0.0
        if world.device.type == "cuda":
            self._peak, source = peak_flops(world.device)
            log.info("MFU is the share of %s (%s)", source, torch.cuda.get_device_name(world.device))

    def line(self, figures: dict[str, float], rate: float) -> str:
        """What `train_step` returned, and a rate in tokens a second over all ranks, as text."""
        said = f"loss {figures['loss']:.3f}, lr {figures['lr']:.1e}, {rate:,.0f} tokens/s, "
        if self._peak:
            said += f"MFU {100 * rate * self._flops_per_token / (self._ranks * self._peak):.0f} %, "
        return said + f"{memory_used(self._device) / 2**30:.1f} GiB"


def memory_used(device: torch.device) -> int:
    """The peak so far, in bytes: of the tensors on a GPU, or of the whole process where the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
