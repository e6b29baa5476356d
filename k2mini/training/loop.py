"""The one training loop: further pretraining and instruction tuning differ in their batches and in what trains."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from k2mini.config import CheckpointSection, TrainSection
from k2mini.data.batches import Batch, Prefetcher, Samples, without_weight
from k2mini.distributed import World, reshard
from k2mini.errors import StoppedBySignalError
from k2mini.files import progress_bar
from k2mini.nn.llama import Llama
from k2mini.training.checkpoint import best_checkpoint, checkpoints, load_checkpoint, prune, read_state, save_checkpoint
from k2mini.training.metrics import Metrics
from k2mini.training.optim import build_optimizer, lr_at
from k2mini.training.throughput import Throughput

log = logging.getLogger(__name__)

ALONE = World()
Evaluate = Callable[[Llama], dict[str, float]]


def total_steps(section: TrainSection, num_samples: int) -> int:
    """Optimiser steps of the whole run."""
    if section.max_steps is not None:
        return section.max_steps
    assert section.epochs is not None
    return max(1, math.ceil(section.epochs * num_samples / section.global_batch_size))


def rank_share(section: TrainSection, world_size: int) -> int:
    """Samples a rank takes of each global batch. Raises ValueError where the portions don't come out even."""
    share, rest = divmod(section.global_batch_size, world_size)
    if rest or share % section.micro_batch_size:
        raise ValueError(
            f"train.global_batch_size ({section.global_batch_size}) must be a multiple of train.micro_batch_size "
            f"({section.micro_batch_size}) times the {world_size} ranks"
        )
    return share


def local_batches(samples: Samples, position: int, section: TrainSection, world: World) -> list[Batch]:
    """This rank's micro-batches of the step that begins at a position."""
    if samples.even:
        rank_share(section, world.size)
    return samples.rank_batches(position, section.global_batch_size, section.micro_batch_size, world.rank, world.size)


def accumulate(model: Llama, batches: list[Batch], count: float, world: World = ALONE) -> float:
    """Add the gradients of this rank's part of the mean loss over the supervised tokens of the whole global batch.

    Args:
        count: the supervised tokens of the global batch, over all ranks.

    Returns: the sum of this rank's losses / count. Summed over the ranks it is the global batch's loss.
    """
    total = 0.0
    for batch in batches:
        part = _loss_sum(model, batch) / max(count, 1)
        # Gradients are averaged over the ranks when they are reduced; this makes the average a sum.
        (part * world.size).backward()
        total += part.item()
    return total


def _loss_sum(model: Llama, batch: Batch) -> torch.Tensor:
    device = model.device
    positions = None if batch.positions is None else batch.positions.to(device)
    return model.loss(batch.tokens.to(device), positions, batch.labels.to(device))


@torch.no_grad()
def validation_loss(model: Llama, samples: Samples, batch_size: int, world: World = ALONE) -> float:
    """The mean loss (nats a token) over all supervised tokens of one epoch, without dropout."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0.0
    for start in range(0, samples.num_samples, batch_size * world.size):
        mine = start + world.rank * batch_size
        size = min(batch_size, samples.num_samples - mine)
        # All ranks run as many passes, since each gathers what the others keep.
        batch = samples.batch(mine, size) if size > 0 else without_weight(samples.batch(0, 1))
        total += _loss_sum(model, batch).item()
        count += batch.num_supervised()
    model.train(was_training)
    reshard(model)
    total, count = world.all_reduce(total, count)
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
    world: World = ALONE,
    tensorboard: bool = False,
    save_best: bool = False,
    evaluate: Evaluate | None = None,
    eval_every: int = 0,
) -> Path:
    """Train what `requires_grad`, from where the run stopped, to the end; `run_dir` gets metrics and checkpoints.

    Every draw follows from (seed, step, rank), so a run that was killed and resumed has the losses of one that was not.

    Args:
        identity: what must be the same for a checkpoint to be resumed (data, schedule, …), as plain JSON.
        label: of the progress line.
        save_best: save whenever validation finds a lower loss than before.
        evaluate: called every `eval_every` steps and at the end; what it returns goes into the metrics.

    Returns: the checkpoint of the last step.

    Raises:
        ValueError: a global batch that the ranks can't share evenly; a checkpoint that does not fit; a loss or gradient
            that is not finite.
        StoppedBySignalError: after SIGINT or SIGTERM, with a checkpoint saved.
    """
    if samples.even:
        rank_share(section, world.size)
    optimizer = build_optimizer(model, section)
    folder, batch_size = run_dir / "checkpoints", section.global_batch_size
    steps = total_steps(section, samples.num_samples)
    with _signals() as received, ExitStack() as stack:
        step, tokens = _resume(folder, checkpoint, model, optimizer, identity, world)
        metrics = Metrics(run_dir, step, tensorboard=tensorboard) if world.is_main else None
        throughput, best = Throughput(model, world), world.broadcast(_best_loss(folder))
        prefetcher = stack.enter_context(Prefetcher(lambda position: local_batches(samples, position, section, world)))
        progress = stack.enter_context(progress_bar(steps, label, "steps", step, shown=world.is_main))
        model.train()
        while step < steps:
            start = time.perf_counter()
            torch.manual_seed(_draw_seed(seed, step, world.rank))
            batches = prefetcher.get(step * batch_size, (step + 1) * batch_size if step + 1 < steps else None)
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, steps, section)
            numbers = _step(model, optimizer, batches, step, section, world)
            seen, stop = world.all_reduce(sum(batch.num_tokens() for batch in batches), bool(received))
            step, tokens = step + 1, tokens + int(seen)
            rate = seen / (time.perf_counter() - start)
            val_loss = None
            if val is not None and (step == steps or (section.val_every and step % section.val_every == 0)):
                val_loss = validation_loss(model, val, section.micro_batch_size, world)
            if metrics is not None:
                metrics.write(step, **numbers, tokens=tokens, tokens_per_second=round(rate, 1))
                if val_loss is not None:
                    metrics.write(step, val_loss=val_loss)
                line = f"loss {numbers['loss']:.3f}, lr {numbers['lr']:.1e}, {throughput.line(rate)}"
                progress.set_postfix_str(line, refresh=False)
                progress.update()
            if evaluate is not None and eval_every and (step == steps or step % eval_every == 0):
                model.eval()
                scores = evaluate(model)
                model.train()
                reshard(model)
                if metrics is not None:
                    metrics.write(step, **scores)
            better = save_best and val_loss is not None and val_loss < best
            if step == steps or step % checkpoint.every == 0 or stop or better:
                best = min(best, val_loss if val_loss is not None else best)
                state = {"identity": identity, "tokens": tokens, "val_loss": val_loss}
                path = save_checkpoint(folder, step, model, optimizer, state, world)
                if world.is_main:
                    prune(folder, checkpoint.keep_last, keep_best=checkpoint.keep_best)
                if stop and step < steps:
                    raise StoppedBySignalError(received[0] if received else signal.SIGTERM, f"saved {path}")
    model.eval()
    return folder / f"step_{step:07}"


def _step(
    model: Llama,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    step: int,
    section: TrainSection,
    world: World,
) -> dict[str, float]:
    """One optimiser step. Returns its numbers, the same on all ranks.

    Raises ValueError on all ranks, before any weight changes, where loss or gradient is not finite.
    """
    (count,) = world.all_reduce(sum(batch.num_supervised() for batch in batches))
    (loss,) = world.all_reduce(accumulate(model, batches, count, world))
    grad_norm = clip_gradients(model, section.max_grad_norm)
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        first, last = step * section.global_batch_size, (step + 1) * section.global_batch_size - 1
        raise ValueError(
            f"stopped before step {step + 1} (samples {first} to {last}): its loss is {loss}, its gradient norm "
            f"{grad_norm}; the weights are those of step {step}"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"loss": loss, "lr": optimizer.param_groups[0]["lr"], "grad_norm": grad_norm}


def _best_loss(folder: Path) -> float:
    path = best_checkpoint(folder)
    return math.inf if path is None else float(read_state(path)["val_loss"])


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scale the gradients to a global L2 norm of at most `max_norm`. Returns the norm before, the same on all ranks."""
    norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], max_norm)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def _draw_seed(seed: int, step: int, rank: int) -> int:
    return (seed * 1_000_003 + step + rank * 1_000_000_007) % 2**63


def _resume(
    folder: Path,
    section: CheckpointSection,
    model: Llama,
    optimizer: torch.optim.Optimizer,
    identity: dict[str, Any],
    world: World,
) -> tuple[int, int]:
    """Load what `checkpoint.resume` says. Returns the step and the tokens seen so far."""
    existing = world.broadcast(checkpoints(folder))
    if section.resume == "none" and existing:
        raise ValueError(f"checkpoint.resume is none, but {folder} holds a run; remove it or set another run.dir")
    if section.resume == "none" or (section.resume == "auto" and not existing):
        return 0, 0
    path = existing[-1] if section.resume == "auto" else Path(section.resume)
    state = read_state(path)
    changed = [key for key in identity if state["identity"].get(key) != identity[key]]
    if changed and not section.ignore_changes:
        raise ValueError(
            f"{path} was made with {_differences(state['identity'], identity, changed)}; set run.dir to a new folder "
            "to start anew, restore what changed, or set checkpoint.ignore_changes to true"
        )
    load_checkpoint(path, model, optimizer, world)
    if world.is_main:
        log.info("resuming from %s", path)
    return state["step"], state["tokens"]


def _differences(old: dict[str, Any], new: dict[str, Any], changed: list[str]) -> str:
    """What changed, with both values where they are short: 'another schedule.lr (0.001, now 0.01)'."""
    parts = []
    for key in changed:
        was, now = old.get(key), new[key]
        if isinstance(was, dict) and isinstance(now, dict):
            inner = [f"{key}.{name}" for name in now if was.get(name) != now[name]]
            pairs = [(name, was.get(name.partition(".")[2]), now[name.partition(".")[2]]) for name in inner]
        else:
            pairs = [(key, was, now)]
        for name, before, after in pairs:
            short = len(f"{before}{after}") < 60
            parts.append(f"another {name} ({before}, now {after})" if short else f"another {name}")
    return ", ".join(parts)
