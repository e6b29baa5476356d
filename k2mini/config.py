"""The settings of a training run as dataclasses, which check their values. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

DTYPE_NAMES = ("float32", "bfloat16", "float16", "float64")  # torch's own; dtypes.py has the dtypes
QUANTIZE_NAMES = ("int8", "nf4")  # how weights are kept for inference; build.py has the layers
_Field = Literal["instruction", "input", "output"]  # of an instruction
IGNORE_INDEX = -100  # the label of a position that is not supervised (PyTorch's own default)


def _check_positive(section: Any, name: str, *keys: str) -> None:
    for key in keys:
        if not getattr(section, key) > 0:
            raise ValueError(f"{name}.{key} must be positive, not {getattr(section, key)}")


_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", dict: "an object"}
_WORDS[list] = "a list"


def check_fields(content: Any, kinds: Mapping[str, type], where: str) -> None:
    """Raise ValueError beginning with `where`, naming field and value, unless `content` is an object with these fields.

    The content is JSON that nobody vouches for; a whole number is a number too, and is not negative.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{where} must be an object, not {content!r:.60}")
    for name, kind in kinds.items():
        value: Any = content.get(name)
        right = isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)
        if not right or (kind is int and value < 0):
            raise ValueError(f"{where}: {name} must be {_WORDS[kind]}, not {value!r:.60}")


@dataclass(frozen=True)
class RunSection:
    """The directory of a run, and the seed of its random draws (order of samples, dropout, initialisation of LoRA)."""

    dir: str  # gets checkpoints, metrics.jsonl and the result; one run each
    seed: int = 0  # the same seed, data and number of threads give the same run
    deterministic: bool = False  # on a GPU, repeat bit for bit, slower; a CPU does in any case
    tensorboard: bool = False  # also write the metrics for TensorBoard (extra: tensorboard)
    wandb: bool = False  # and for Weights & Biases, project k2mini or $WANDB_PROJECT (extra: wandb)


@dataclass(frozen=True)
class ModelSection:
    """The model that training starts from: a Hugging Face directory, and the precision to compute in.

    Parameters that train, their gradients and AdamW's moments are kept in float32 at least.
    """

    path: str  # a Hugging Face directory with its tokenizer, or an id (extra: hub); demo:base is the demo's
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"  # to compute in
    quantize: Literal["int8", "nf4"] | None = None  # the frozen base of LoRA in 8 or 4 bits


@dataclass(frozen=True)
class SourceSection:
    """One of several files or corpora that a run is trained on."""

    path: str  # as data.path
    weight: float = 1.0  # how often an epoch goes through it: 2 twice, 0.5 a half, and the next epoch the other half


def _check_sources(section: CorpusSection | InstructionSection) -> None:
    if (section.path is None) == (section.sources is None):
        raise ValueError("set exactly one of data.path and data.sources (null unsets the other)")
    for place, source in enumerate(section.sources or ()):
        if not 0 < source.weight < float("inf"):
            raise ValueError(f"data.sources[{place}].weight must be positive, not {source.weight}")


@dataclass(frozen=True)
class CorpusSection:
    """Plain documents for further pretraining: a directory that `k2mini prepare` made, or documents as it takes them.

    Documents are prepared on first use, into `run.dir`.
    """

    path: str | None = None  # the directory, a file, a folder of files, or its hf://…; demo:corpus.jsonl is the demo's
    val_path: str | None = None  # documents to validate on; null: the split that `prepare --val-percent` made, if any
    seq_len: int = 1024  # tokens a block
    eos: bool = True  # EOS after each document (BOS stands before it in any case)
    document_mask: bool = True  # if false, attention runs across the documents of a block, K2's scheme
    exceed_context: bool = False  # let seq_len be above the context that the model was trained for
    sources: list[SourceSection] | None = None  # in place of path; an epoch goes weight times through each (default 1)

    def __post_init__(self) -> None:
        _check_sources(self)


@dataclass(frozen=True)
class InstructionSection:
    """Instructions with answers: JSON, JSONL, CSV or TSV with `instruction`, `output` and, where there is one, `input`.

    Or conversations, of which each answer is learned: `messages`, or `conversations` as ShareGPT has them.
    """

    path: str | None = None  # the file, or its hf://…; demo:general.json and demo:expert.json are the demo's
    val_path: str | None = None  # a file to validate on
    val_size: int = 0  # so many records, drawn by run.seed, validate and are not trained on
    template: str | None = None  # as of `k2mini generate --template`; null: the model's own, or else alpaca
    max_seq_len: int = 512  # tokens; longer examples are cut, and counted
    train_on_inputs: bool = False  # if true, the prompt counts in the loss too, K2's choice
    packing: bool = True  # several examples share a row of max_seq_len; train.micro_batch_size counts rows then
    on_error: Literal["raise", "skip"] = "raise"  # at a record of another form; skipped ones are counted
    exceed_context: bool = False  # let max_seq_len be above the context that the model was trained for
    sources: list[SourceSection] | None = None  # in place of path; an epoch goes weight times through each (default 1)
    limit: int | None = None  # the first so many records of each file alone, for a trial
    fields: dict[_Field, str] | None = None  # what the files call these: {instruction: question, output: answer}

    def __post_init__(self) -> None:
        _check_sources(self)
        _check_positive(self, "data", "max_seq_len", *["limit"] * (self.limit is not None))
        if self.val_size < 0:
            raise ValueError(f"data.val_size must not be negative, it is {self.val_size}")
        if self.val_size and self.val_path is not None:
            raise ValueError("set data.val_size or data.val_path, not both")


LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraSection:
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685).

    `lora: null` trains all parameters, as `pretrain` does without this section; `finetune` takes these defaults then.
    """

    rank: int = 8  # of the product that is added to a weight
    alpha: float = 16.0  # the product is scaled by alpha / rank
    dropout: float = 0.05  # of the adapters' input
    rslora: bool = False  # scale by alpha / sqrt(rank), not alpha / rank (Kalajdzievski 2023, arXiv 2312.03732)
    target_modules: list[str] | Literal["all"] = field(default_factory=lambda: [*LORA_TARGETS[:3]])  # what is adapted
    train_embeddings: bool = False  # the token embedding trains whole, for domains with words of their own
    train_head: bool = False  # the output head trains whole, too
    init_adapter: str | None = None  # start from this adapter's weights, with a fresh optimiser and schedule

    def __post_init__(self) -> None:
        _check_positive(self, "lora", "rank", "alpha")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout must be at least 0 and below 1, not {self.dropout}")
        if not self.target_modules:
            raise ValueError("lora.target_modules is empty, so nothing would be trained")
        if self.target_modules == "all":
            object.__setattr__(self, "target_modules", list(LORA_TARGETS))

    @property
    def scaling(self) -> float:
        """The factor of the adapter's output."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    @property
    def modules_to_save(self) -> list[str]:
        """What trains whole beside the adapters, by peft's name for it."""
        return ["embed_tokens"] * self.train_embeddings + ["lm_head"] * self.train_head


@dataclass(frozen=True)
class TrainSection:
    """The optimiser, its schedule, the length of the run and the sizes of batches."""

    lr: float  # the peak learning rate, reached at the end of warm-up
    global_batch_size: int = 128  # samples an optimiser step
    micro_batch_size: int = 4  # samples a forward pass
    max_steps: int | None = None  # optimiser steps; exactly one of max_steps and epochs is set
    epochs: float | None = None  # passes over the data, in place of max_steps
    schedule: Literal["constant", "linear", "cosine"] = "linear"  # after warm-up; the latter two end at 0
    warmup_steps: int = 0  # steps in which the learning rate rises linearly
    warmup_ratio: float | None = None  # of all steps, in place of warmup_steps
    weight_decay: float = 0.0  # not on norms
    beta1: float = 0.9  # AdamW's decay of the mean gradient
    beta2: float = 0.999  # AdamW's decay of the mean squared gradient
    eps: float = 1e-8  # AdamW's, added to the root of the latter
    max_grad_norm: float = 1.0  # gradients of a larger L2 norm are scaled down to it
    val_every: int | None = None  # steps between validations; null: at the end only
    activation_checkpointing: int = 0  # recompute every n-th block in the backward pass: 1 all of them, 0 none
    compile: bool = False  # torch.compile, block by block
    tf32: bool = False  # float32 matrix products in TensorFloat-32, on GPUs that have it

    def __post_init__(self) -> None:
        _check_positive(self, "train", "lr", "global_batch_size", "micro_batch_size", "max_grad_norm", "eps")
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError("set exactly one of train.max_steps and train.epochs (null unsets the other)")
        for name in ("max_steps", "epochs", "val_every"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"train.{name} must be positive, not {value}")
        if self.warmup_ratio is not None and not (0 <= self.warmup_ratio <= 1 and self.warmup_steps == 0):
            raise ValueError(
                f"train.warmup_ratio ({self.warmup_ratio}) must be between 0 and 1, and stands in place of warmup_steps"
            )
        for name in ("warmup_steps", "weight_decay", "beta1", "beta2", "activation_checkpointing"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name} must not be negative, it is {getattr(self, name)}")
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"train.global_batch_size ({self.global_batch_size}) must be a multiple of "
                f"train.micro_batch_size ({self.micro_batch_size})"
            )


@dataclass(frozen=True)
class CheckpointSection:
    """When checkpoints are saved, which are kept, and from which one a run goes on."""

    every: int = 100  # steps between checkpoints
    async_save: bool = True  # train on while a copy in the host's memory is written; false: no copy, wait
    keep_last: int = 2  # how many of the newest are kept
    keep_best: bool = True  # keep the one of the lowest validation loss as well
    resume: str = "auto"  # 'auto': from the newest complete one of this run; 'none': start anew; or a checkpoint's path
    ignore_changes: bool = False  # resume although data, tokenizer, schedule or seed changed

    def __post_init__(self) -> None:
        _check_positive(self, "checkpoint", "every", "keep_last")


@dataclass(frozen=True)
class ParallelSection:
    """How the ranks that torchrun started share the model; a single process keeps all of it.

    LoRA's frozen base is not shared: each rank keeps all of it, and receives the adapters' gradients and nothing else.
    `replicate: 1` shares it, where it is too large; so does `offload`, which moves it to the host's memory as well.
    """

    replicate: int | None = None  # copies, each sharded over world size / replicate ranks; null: 1, of LoRA one a rank
    reshard_after_forward: bool = True  # ZeRO-3; if false, ZeRO-2: more memory and less communication
    offload: Literal["cpu"] | None = None  # keep weights, gradients and moments in the host's memory; far slower
    timeout_minutes: float = 10.0  # after which a rank gives up waiting for another

    def __post_init__(self) -> None:
        _check_positive(self, "parallel", *["replicate"] * (self.replicate is not None), "timeout_minutes")


@dataclass(frozen=True)
class EvalSection:
    """A benchmark, as of `k2mini eval`, and prompts, asked while training: for the metrics, and for samples.jsonl."""

    benchmark: list[str] = field(default_factory=list)  # files, as of `k2mini eval --benchmark`
    every: int = 0  # steps between its runs, the last of them after the last step; 0: never
    limit: int | None = None  # so many questions of each task, the first ones; null: all
    scoring: str = "letter"  # as of `k2mini eval --scoring`
    template: str | None = None  # as of `k2mini eval --template`; null: the model's own, or else alpaca
    answer_prefix: str = ""  # what the answer begins with, after the prompt
    prompts: list[str] = field(default_factory=list)  # answered at each validation, in data.template or eval.template
    max_new_tokens: int = 64  # of each answer to them

    def __post_init__(self) -> None:
        _check_positive(self, "eval", "max_new_tokens")
        if self.every < 0 or (self.every and not self.benchmark):
            raise ValueError(f"eval.every ({self.every}) must be 0, or a number of steps with an eval.benchmark to run")


def _check_frozen(config: Any) -> None:
    if config.lora is None and config.model.quantize is not None:
        raise ValueError("model.quantize is for LoRA's frozen base; without lora all weights are trained")


@dataclass(frozen=True)
class PretrainConfig:
    """The configuration of `k2mini pretrain`, which trains all parameters, or LoRA alone, on plain documents."""

    run: RunSection
    model: ModelSection
    data: CorpusSection
    train: TrainSection
    checkpoint: CheckpointSection = CheckpointSection()
    parallel: ParallelSection = ParallelSection()
    eval: EvalSection = field(default_factory=EvalSection)
    lora: LoraSection | None = None

    def __post_init__(self) -> None:
        _check_frozen(self)


@dataclass(frozen=True)
class FinetuneConfig:
    """The configuration of `k2mini finetune`, which trains LoRA on instructions; all parameters where it is null."""

    run: RunSection
    model: ModelSection
    data: InstructionSection
    train: TrainSection
    lora: LoraSection | None = field(default_factory=LoraSection)
    checkpoint: CheckpointSection = CheckpointSection()
    parallel: ParallelSection = ParallelSection()
    eval: EvalSection = field(default_factory=EvalSection)

    def __post_init__(self) -> None:
        _check_frozen(self)


RunConfig = PretrainConfig | FinetuneConfig
