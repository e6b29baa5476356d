"""The one training loop: further pretraining and instruction tuning differ in their batches and in what trains."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm

from k2mini.config import CheckpointSection, TrainSection
from k2mini.errors import StoppedBySignalError
from k2mini.nn.llama import Llama
from k2mini.nn.loss import token_loss
from k2mini.progress import progress_bar
from k2mini.text.batches import Batch, Samples
from k2mini.training.checkpoint import checkpoints, load_checkpoint, prune, read_state, save_checkpoint
from k2mini.training.metrics import Metrics
from k2mini.training.optim import build_optimizer, lr_at


def total_steps(section: TrainSection, num_samples: int) -> int:
    """Optimiser steps of the whole run."""
    if section.max_steps is not None:
        return section.max_steps
    assert section.epochs is not None
    return max(1, math.ceil(section.epochs * num_samples / section.global_batch_size))


def global_batch(samples: Samples, position: int, section: TrainSection) -> list[Batch]:
    """The micro-batches of the step that begins at a position."""
    size = section.micro_batch_size
    return [samples.batch(position + start, size) for start in range(0, section.global_batch_size, size)]


def accumulate(model: Llama, batches: list[Batch]) -> float:
    """Add the gradients of the mean loss over all supervised tokens of the global batch. Returns that loss."""
    count = max(1, sum(batch.num_supervised() for batch in batches))
    loss = 0.0
    for batch in batches:
        part = _loss_sum(model, batch) / count
        part.backward()
        loss += part.item()
    return loss


def _loss_sum(model: Llama, batch: Batch) -> torch.Tensor:
    positions = None if batch.positions is None else batch.positions.to(model.device)
    logits = model(batch.tokens.to(model.device), positions)
    return token_loss(logits, batch.labels.to(model.device))[0]


@torch.no_grad()
def validation_loss(model: Llama, samples: Samples, batch_size: int) -> float:
    """The mean loss (nats a token) over all supervised tokens of one epoch, without dropout."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for start in range(0, samples.num_samples, batch_size):
        batch = samples.batch(start, min(batch_size, samples.num_samples - start))
        total += _loss_sum(model, batch).item()
        count += batch.num_supervised()
    model.train(was_training)
    return total / max(1, count)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Within it, the first SIGINT or SIGTERM is put into the list yielded; a second one acts as usual."""
    received: list[int] = []
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        for each, handler in previous.items():
            signal.signal(each, handler)

    for number in previous:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def train(
    model: Llama,
    samples: Samples,
    run_dir: Path,
    *,
    seed: int,
    section: TrainSection,
    checkpoint: CheckpointSection,
    identity: dict[str, Any],
    val: Samples | None = None,
    label: str = "train",
) -> None:
    """Train what `requires_grad`, from where the run stopped, to the end; `run_dir` gets metrics and checkpoints.

    Every draw follows from (seed, step), so a run that was killed and resumed has the losses of one that was not.

    Args:
        identity: what must be the same for a checkpoint to be resumed (data, schedule, …), as plain JSON.
        label: of the progress line.

    Raises:
        ValueError: a checkpoint that does not fit; a loss or gradient that is not finite.
        StoppedBySignalError: after SIGINT or SIGTERM, with a checkpoint saved.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    optimizer = build_optimizer(model, section)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    folder = run_dir / "checkpoints"
    step, tokens = _resume(folder, checkpoint.resume, model, optimizer, identity)
    steps = total_steps(section, samples.num_samples)
    metrics = Metrics(run_dir / "metrics.jsonl", step)
    batch_size = section.global_batch_size

    def save() -> Path:
        path = folder / f"step_{step:07}"
        if not path.exists():
            save_checkpoint(folder, step, model, optimizer, {"identity": identity, "tokens": tokens})
            prune(folder, checkpoint.keep_last)
        return path

    model.train()
    with _signals() as received, progress_bar(steps, label, "steps", initial=step) as progress:
        while step < steps:
            start = time.perf_counter()
            torch.manual_seed(_step_seed(seed, step))
            batches = global_batch(samples, step * batch_size, section)
            loss = accumulate(model, batches)
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, section.max_grad_norm).item()
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                first, last = step * batch_size, (step + 1) * batch_size - 1
                raise ValueError(
                    f"stopped before step {step + 1} (samples {first} to {last}): "
                    f"its loss is {loss}, its gradient norm {grad_norm}"
                )
            lr = lr_at(step, steps, section)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            seen = sum(_num_tokens(batch) for batch in batches)
            tokens += seen
            rate = seen / (time.perf_counter() - start)
            metrics.write(
                step=step, loss=loss, lr=lr, grad_norm=grad_norm, tokens=tokens, tokens_per_second=round(rate, 1)
            )
            progress.set_postfix_str(f"loss {loss:.3f}, lr {lr:.1e}, {rate:,.0f} tokens/s", refresh=False)
            progress.update()
            if val is not None and (step == steps or (section.val_every and step % section.val_every == 0)):
                metrics.write(step=step, val_loss=validation_loss(model, val, section.micro_batch_size))
            if step == steps or step % checkpoint.every == 0 or received:
                path = save()
            if received and step < steps:
                raise StoppedBySignalError(received[0], f"saved {path}")
    model.eval()


def _step_seed(seed: int, step: int) -> int:
    return (seed * 1_000_003 + step) % 2**63


def _num_tokens(batch: Batch) -> int:
    return batch.tokens.numel() if batch.positions is None else int((batch.positions >= 0).sum())


def _resume(
    folder: Path, resume: str, model: Llama, optimizer: torch.optim.Optimizer, identity: dict[str, Any]
) -> tuple[int, int]:
    """Load what `checkpoint.resume` says. Returns the step and the tokens seen so far."""
    existing = checkpoints(folder)
    if resume == "none" and existing:
        raise ValueError(f"checkpoint.resume is none, but {folder} holds a run; remove it or set another run.dir")
    if resume == "none" or (resume == "auto" and not existing):
        return 0, 0
    path = existing[-1] if resume == "auto" else Path(resume)
    state = read_state(path)
    changed = [key for key in identity if state["identity"].get(key) != identity[key]]
    if changed:
        raise ValueError(
            f"{path} was made with another {', '.join(changed)}; "
            "set run.dir to a new folder to start anew, or restore what changed"
        )
    load_checkpoint(path, model, optimizer)
    tqdm.write(f"resuming from {path}", file=sys.stderr)
    return state["step"], state["tokens"]
