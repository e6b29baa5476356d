"""What each rank does, of one or several. `main` and `main_offloaded` leave a JSON file in the folder that they get."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.tensor import DTensor

from k2mini import cli
from k2mini.build import is_sharded, training_model
from k2mini.config import (
    CheckpointSection,
    CorpusSection,
    EvalSection,
    LoraSection,
    ModelSection,
    ParallelSection,
    PretrainConfig,
    RunSection,
    TrainSection,
)
from k2mini.data.batches import Blocks
from k2mini.data.corpus import Documents
from k2mini.distributed import local_part, ranks
from k2mini.evaluation.score import Request, score
from k2mini.inference.decoding import Decoding
from k2mini.inference.generate import generate
from k2mini.inference.journal import Journal
from k2mini.training.loop import Task, read_metrics, train
from k2mini.training.run import pretrain
from k2mini.training.step import accumulate, local_batches
from k2mini.weights.convert import convert
from k2mini.weights.model_directory import ModelDirectory

STEPS = 30


def documents(number=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 60, (number,), generator=generator).tolist()
    return Documents([[1, *torch.randint(3, 199, (length,), generator=generator).tolist()] for length in lengths])


class Recorder(Blocks):
    """Blocks that note which samples were asked for."""

    def __init__(self, seed=3):
        super().__init__(documents(), 32, document_mask=True, seed=seed)
        self.asked = set()

    def batch(self, position, count):
        self.asked |= set(range(position, position + count))
        return super().batch(position, count)


def section(world, *, accumulation=1, **changes):
    values = {"lr": 1e-3, "global_batch_size": 8, "max_steps": STEPS, "warmup_steps": 3, **changes}
    return TrainSection(**{"micro_batch_size": 8 // world.size // accumulation, **values})


def run(
    path,
    world,
    out,
    *,
    dtype="float64",
    quantize=None,
    parallel=None,
    lora=None,
    seed=3,
    accumulation=1,
    keep=None,
    evaluate=None,
    answer=None,
    **changes,
):
    """Losses and gradient norms of a run, and its checkpoints' folder."""
    parallel, training = parallel or ParallelSection(), section(world, accumulation=accumulation, **changes)
    model, _ = training_model(ModelSection(str(path), dtype, quantize), training, parallel, world, lora, seed)
    samples = Recorder(seed)
    train(
        model,
        Task(samples, Blocks(documents(9, seed=1), 32, document_mask=True, seed=None), {"data": "x"}, answer=answer),
        RunSection(str(out), seed),
        training,
        keep or CheckpointSection(every=10, keep_last=5),
        EvalSection(["x"], every=5),
        evaluate,
        world,
    )
    world.barrier()
    rows = read_metrics(out / "metrics.jsonl")
    return [[row[key] for key in ("loss", "grad_norm", "val_loss", "scored") if key in row] for row in rows]


def scored(model):
    """What a benchmark makes of a model in training: prompts of several lengths that have a start in common."""
    start = tuple(range(5, 25))
    requests = [Request((*start, *range(30, 30 + n)), ((7,), (8, 9), (10, 11, 12)), 0) for n in (1, 3, 6)]
    found = dict(score(model, requests))
    return {"scored": sum(value * (n + 1) for place in range(3) for n, value in enumerate(found[place]))}


def answered(model):
    """What `eval.prompts` makes of one: greedy answers, of which each takes all of its steps."""
    found = generate(model, [[1, 5, 6, 7], [1, *range(30, 50)]], Decoding(max_new_tokens=6), stop_ids=())
    return [(str(number), " ".join(map(str, each.tokens))) for number, each in enumerate(found)]


def gradients(path, world, accumulation):
    """The gradients of one global batch, whole, as one number a parameter: its norm and a fixed projection."""
    training = section(world, accumulation=accumulation)
    model, _ = training_model(ModelSection(str(path), "float64"), training, ParallelSection(), world)
    batches = local_batches(Recorder(), 0, training, world)
    (count,) = world.all_reduce(sum(batch.num_supervised() for batch in batches))
    accumulate(model, batches, count, world)
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        weights = torch.linspace(-1, 1, gradient.numel(), dtype=torch.float64)
        found[name] = [gradient.norm().item(), (gradient.flatten() * weights).sum().item()]
    return found


def sharding(path, world):
    """How much of the model this rank keeps."""
    model, _ = training_model(ModelSection(str(path), "float64"), section(world), ParallelSection(), world)
    return sum(local_part(parameter).numel() for parameter in model.parameters())


def disagreements(path, world, out):
    """What each rank is told where the last one was started with another configuration, or has another base."""
    if world.is_main:
        (out / "few.txt").write_text("granite is made of quartz. " * 100)
    world.barrier()
    whole = PretrainConfig(
        RunSection(str(out / "disagreeing")),
        ModelSection(str(path)),
        CorpusSection(str(out / "few.txt"), seq_len=32),
        TrainSection(lr=1e-3, global_batch_size=4, micro_batch_size=1, max_steps=2),
    )
    others = [("run", "seed", 1), ("model", "path", "other"), ("data", "seq_len", 16), ("train", "lr", 0.1)]
    others += [("train", "max_steps", 9), ("train", "max_grad_norm", 2.0), ("parallel", "timeout_minutes", 1.0)]
    told = []
    for name, key, value in [*others, ("base", "", None)]:
        config, fingerprint = whole, ModelDirectory.fingerprint
        if world.rank == world.size - 1 and name == "base":
            ModelDirectory.fingerprint = lambda _: "another"
        elif world.rank == world.size - 1:
            config = replace(whole, **{name: replace(getattr(whole, name), **{key: value})})
        try:
            pretrain(config, world)
        except ValueError as error:
            told.append(str(error))
        ModelDirectory.fingerprint = fingerprint
        world.barrier()
    return world.all_gather([told, sorted(entry.name for entry in out.glob("disagreeing/*"))])


def refused(path, world, out):
    """What each rank is told where the disk of the last one refuses the second save, and the steps of the metrics.

    The write fails only after that rank has gone on with training.
    """
    write, times = FileSystemWriter.write_data, iter(range(9))

    def full(*arguments):
        if next(times) == 0 or world.rank < world.size - 1:
            return write(*arguments)
        time.sleep(0.5)
        raise OSError(28, "No space left on device")

    FileSystemWriter.write_data = full
    told = ""
    try:
        run(path, world, out / "refused", keep=CheckpointSection(every=10, keep_last=1))
    except OSError as error:
        told = str(error)
    FileSystemWriter.write_data = write
    steps = read_metrics(out / "refused/metrics.jsonl")[-1]["step"] if world.is_main else 0
    world.barrier()
    left = sorted(entry.name for entry in (out / "refused/checkpoints").iterdir())
    return world.all_gather([told, left]), steps


def kin(path, world, out):
    """Gradients and losses of the models beside the first, which have biases, norms of q and k, or a sliding window."""
    found = {}
    for each in sorted(path.parent.glob("kin_*")):
        lora, shared = LoraSection(rank=2, dropout=0.0), ParallelSection(replicate=1)
        found[each.name] = {
            "gradients": gradients(each, world, 1),
            "losses": run(each, world, out / f"{each.name}_all", max_steps=4, activation_checkpointing=2),
            "lora": run(
                each, world, out / f"{each.name}_lora", lora=lora, quantize="int8", parallel=shared, max_steps=3
            ),
        }
    return found


def offloaded(path, world, out):
    """Runs with and without offload, one gone on with from its middle, one killed at its first start: `killed` is made.

    A CPU is offloaded to itself here, which commands refuse: what FSDP moves stays where it is.
    """
    found, few = {}, {"max_steps": 6, "evaluate": scored}
    marker = out / f"killed_{world.size}"

    def killed(model):
        values = scored(model)
        if world.is_main and not marker.exists() and marker.with_suffix(".first").exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if world.is_main:
            marker.with_suffix(".first").touch()
        return values

    keep = CheckpointSection(every=2, keep_last=9, async_save=False)
    parallel = ParallelSection(offload="cpu")
    found["killed"] = run(path, world, out / "again", parallel=parallel, keep=keep, evaluate=killed, max_steps=12)
    found["whole"] = run(path, world, out / "whole", keep=keep, evaluate=scored, max_steps=12)
    kinds = {"all": {}, "bfloat16": {"dtype": "bfloat16"}, "int8": {"lora": LoraSection(rank=2), "quantize": "int8"}}
    for kind, settings in kinds.items():
        for name, offload, resume in (("kept", None, "auto"), ("moved", "cpu", "auto"), ("on", "cpu", "moved")):
            keep = CheckpointSection(every=3, resume="auto")
            if resume != "auto":
                keep = replace(keep, resume=str(out / f"{kind}_{resume}/checkpoints/step_0000003"))
            parallel, to = ParallelSection(replicate=1, offload=offload), out / f"{kind}_{name}"
            losses = run(path, world, to, parallel=parallel, keep=keep, **few, **settings)
            saved = json.loads((to / "checkpoints/step_0000006/state.json").read_text())["files"]
            found[f"{kind}_{name}"] = [losses, {file: saved[file] for file in saved if file != ".metadata"}]
    return found


def main_offloaded(path, out):
    path, out = Path(path), Path(out)
    torch.set_num_threads(1)
    with ranks(torch.device("cpu"), ParallelSection(), alone_too=True) as world:
        results = offloaded(path, world, out)
        if world.is_main:
            (out / "results.json").write_text(json.dumps(results))


def nf4(path, world, out):
    """Adapters over NF4, of matrices whose groups of absmaxes lie over several ranks: made when read, and as stored."""
    if world.is_main:
        convert(path, "hf", out / "in_nf4", quantize="nf4")
    world.barrier()
    lora, found = LoraSection(rank=2, dropout=0.0, target_modules=["q_proj", "up_proj"]), {}
    for name, base, parallel in (
        ("plain", path, ParallelSection()),
        ("shared", path, ParallelSection(replicate=1)),
        ("stored", out / "in_nf4", ParallelSection(replicate=1)),
    ):
        made = {"lora": lora, "quantize": "nf4", "parallel": parallel, "max_steps": STEPS // 3}
        found[name] = run(base, world, out / f"nf4_{name}", **made)
    return found


def main(path, out):
    path, out = Path(path), Path(out)
    torch.set_num_threads(1)
    with ranks(torch.device("cpu"), ParallelSection()) as world:  # a rank says so in its environment
        few = {"max_steps": STEPS // 3}
        lora, shared = LoraSection(rank=2, dropout=0.0), ParallelSection(replicate=1)
        whole, some = replace(lora, train_embeddings=True, train_head=True), {"max_steps": 6, "weight_decay": 0.1}
        halves = CheckpointSection(every=5)
        results = {
            "plain": run(path, world, out / "plain"),
            "float32": run(path, world, out / "float32", dtype="float32"),
            "recomputed": run(path, world, out / "recomputed", activation_checkpointing=2, **few),
            "accumulated": run(path, world, out / "accumulated", accumulation=8 // world.size, **few),
            "lora": run(path, world, out / "lora", lora=lora, keep=halves, **few),
            "lora_shared": run(path, world, out / "lora_shared", lora=lora, parallel=shared, keep=halves, **few),
            "whole": run(path, world, out / "whole", lora=whole, keep=CheckpointSection(every=3), **some),
            "whole_shared": run(
                path, world, out / "whole_shared", lora=whole, parallel=shared, keep=CheckpointSection(every=3), **some
            ),
            "whole_int8": run(path, world, out / "whole_int8", lora=whole, quantize="int8", parallel=shared, **some),
            "int8": run(path, world, out / "int8", lora=lora, quantize="int8", **few),
            "int8_shared": run(path, world, out / "int8_shared", lora=lora, quantize="int8", parallel=shared, **few),
            "evaluated": run(path, world, out / "evaluated", evaluate=scored, answer=answered, **few),
            "answered": (out / "evaluated/samples.jsonl").read_text(),
            "gradients": gradients(path, world, 1),
            "gradients_accumulated": gradients(path, world, 8 // world.size),
            "kept": world.all_gather(sharding(path, world)),
            "kin": kin(path, world, out),
            "nf4": nf4(path.parent / "wide", world, out),
        }
        if world.size > 1:
            results["refused"] = refused(path, world, out)
            results["disagreements"] = disagreements(path, world, out)
            results["zero2"] = run(
                path, world, out / "zero2", parallel=ParallelSection(reshard_after_forward=False), **few
            )
            results["replicated"] = run(
                path, world, out / "replicated", parallel=ParallelSection(replicate=world.size), **few
            )
            results["whole_bfloat16"] = run(
                path, world, out / "whole_bfloat16", dtype="bfloat16", lora=whole, parallel=shared, **some
            )
            results["bfloat16"] = run(path, world, out / "bfloat16", dtype="bfloat16", evaluate=scored, **few)
        if world.is_main:
            (out / f"results_{world.size}.json").write_text(json.dumps(results))


def bf16_alone(path):
    """One process that trains in bf16 keeps its weights in float32."""
    section = ModelSection(path, "bfloat16")
    assert is_sharded(section, ParallelSection(), None, 1)
    with ranks(torch.device("cpu"), ParallelSection(), alone_too=True) as world:
        model, _ = training_model(section, TrainSection(lr=1e-3, max_steps=1), ParallelSection(), world)
        tokens = torch.ones(1, 9, dtype=torch.int64)
        loss = model.loss(tokens, None, tokens)
        loss.backward()
        assert loss.dtype == torch.float32
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())


def patient():
    """One rank does something alone, for longer than ranks wait for each other within a step."""
    with ranks(torch.device("cpu"), ParallelSection(timeout_minutes=0.02)) as world:
        assert world.all_reduce(1) == [2]
        time.sleep(2.5 * world.is_main)
        world.barrier()
        assert world.broadcast(world.rank) == 0


def command(words):
    """A function's name and its arguments."""
    name, *arguments = words
    {"main": main, "main_offloaded": main_offloaded, "bf16_alone": bf16_alone, "patient": patient}[name](*arguments)


def dying(words):
    """A command line; a rank ends by a signal as it has made so many results: RANK NUMBER SIGNAL WORD …"""
    rank, number, ending, *line = words
    own = os.environ.get("RANK", "0")
    if own == rank:
        places = iter(range(int(number)))
        Journal.add = ending_at(Journal.add, places, int(ending))
    cli.main([word.replace("{rank}", own) for word in line])


def ending_at(function, places, ending):
    def counted(*arguments):
        if next(places, None) is None:
            os.kill(os.getpid(), ending)
        return function(*arguments)

    return counted
