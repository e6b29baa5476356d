"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): linear layers with an adapter, and what is done with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from k2mini.config import LORA_TARGETS, LoraSection
from k2mini.distributed import World, fill, is_dtensor, local_part
from k2mini.model_config import ModelConfig
from k2mini.nn.layers import Linear, product
from k2mini.nn.llama import Llama
from k2mini.nn.quant import PARTS, parts_of, quantized_product

# An adapter that does not train: module name -> A (R, in), B (out, R), scaling.
Adapter = Mapping[str, tuple[Tensor, Tensor, float]]

TARGETS = LORA_TARGETS
WHOLE = {"embed_tokens": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}  # by peft's names of their modules


class LoraLinear(Linear):
    """y = x W^T + (alpha / rank) dropout(x) A^T B^T (Hu et al., equation 3), plus W's bias where it has one. The weight
    keeps its name and is frozen.

    W may be quantised. A and B are kept in `promote_types(W.dtype, float32)` and multiply in x's dtype, as W does;
    `init_adapters` gives them values.
    """

    def __init__(self, base: Linear, section: LoraSection) -> None:
        with torch.device("meta"):
            super().__init__(base.in_features, base.out_features)
        self.weight, self.bias = base.weight.requires_grad_(False), base.bias
        for part in PARTS.get(base.weight.dtype, ()):
            setattr(self, part, getattr(base, part))
        kept = getattr(base, "dtype", base.weight.dtype)
        dtype, device = torch.promote_types(kept, torch.float32), base.weight.device
        self.lora_A = nn.Parameter(torch.empty(section.rank, base.in_features, dtype=dtype, device=device))  # (R, in)
        self.lora_B = nn.Parameter(torch.empty(base.out_features, section.rank, dtype=dtype, device=device))  # (out, R)
        self.scaling = section.scaling
        self.dropout = section.dropout
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out), in x's dtype."""
        out = (quantized_product if self.weight.dtype in PARTS else product)(x, *parts_of(self))
        scaling = self.scaling
        if self.training and self.dropout > 0:
            x, keep = dropped(x, self.dropout, self.lora_A)
            scaling = scaling / keep
        low = F.linear(x, self.lora_A.to(x.dtype))  # (…, R)
        return self.biased(out) + F.linear(low, self.lora_B.to(x.dtype)) * scaling


def dropped(x: Tensor, dropout: float, own: Tensor) -> tuple[Tensor, float]:
    """x with some of its values zero, and the probability that one is kept, by which the others are to be divided.

    A CPU draws 16 bits a value, four at once from PyTorch's generator, and takes `dropout` as a multiple of 2^-16:
    `F.dropout` draws one by one, which takes four times as long.

    Args:
        own: a tensor that only this adapter has: a compiler would draw once for calls with the same arguments.
    """
    if x.device.type != "cpu":
        return F.dropout(x, dropout), 1.0
    zeros = min(round(dropout * 2**16), 2**16 - 1)  # of 2^16 values of the bits
    if torch.compiler.is_dynamo_compiling():
        kept = (random_bits(x, own) >= zeros - 2**15).to(x.dtype)
    else:
        kept = torch.ge(_random_bits(x), zeros - 2**15, out=torch.empty_like(x))
    return x * kept, 1 - zeros / 2**16


def _random_bits(x: Tensor) -> Tensor:
    drawn = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    return drawn.view(torch.int16)[: x.numel()].view(x.shape)


@torch.library.custom_op("k2mini::random_bits", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def random_bits(x: Tensor, own: Tensor) -> Tensor:
    """(…) int16, of x's shape, from PyTorch's generator: one operation to the compiler (see `dropped`)."""
    return _random_bits(x)


@random_bits.register_fake
def _(x: Tensor, own: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.int16)


def attach(model: Llama, section: LoraSection, *, whole: bool = False) -> list[str]:
    """Freeze the model and put an adapter, without values yet, on every linear module that a target names.

    Args:
        whole: embedding and head train, too, where `section` says so. They are kept in float32 at least then, and cast
            to the model's dtype where they are used.

    Returns: the names of these modules. Raises ValueError where the model has no module of a target's name.
    """
    model.requires_grad_(False)
    names = []
    for target in section.target_modules:
        found = [name for name, module in model.named_modules() if name.rpartition(".")[2] == target]
        if target not in TARGETS or not found:
            raise ValueError(f"lora.target_modules: the model has no {target!r}; there are {', '.join(TARGETS)}")
        names += found
    for name in sorted(names):
        parent, _, child = name.rpartition(".")
        base = model.get_submodule(name)
        assert isinstance(base, Linear)
        setattr(model.get_submodule(parent), child, LoraLinear(base, section))
    if whole:
        _train_whole(model, section)
    return sorted(names)


def whole_weights(section: LoraSection, config: ModelConfig) -> list[str]:
    """The names of the weights that train whole beside the adapters.

    Raises ValueError where embedding and head are one matrix: a change for the one would change the other unasked.
    """
    if section.modules_to_save and config.tie_embeddings:
        raise ValueError(
            "lora.train_embeddings and lora.train_head need a model whose embedding and head are two matrices; this "
            "one's are tied (tie_word_embeddings), so neither can train or be saved alone: set both to false"
        )
    return [WHOLE[name] for name in section.modules_to_save]


def _train_whole(model: Llama, section: LoraSection) -> None:
    dtype = model.dtype
    for name in whole_weights(section, model.config):
        module = model.get_submodule(name.removesuffix(".weight"))
        assert isinstance(module.weight, Tensor)
        module.weight = nn.Parameter(module.weight.detach().to(torch.promote_types(dtype, torch.float32)))
    if section.train_embeddings:
        model.gathered_dtype = dtype
        model.model.embed_tokens.register_forward_hook(lambda _module, _tokens, rows: rows.to(dtype))


def init_adapters(model: nn.Module, seed: int) -> None:
    """Fill all adapters: A is Kaiming-uniform, drawn from `seed`, and B zero, so a fresh adapter changes nothing.

    The values do not depend on how the adapters are sharded.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, module in sorted(lora_modules(model).items()):
            bound = module.in_features**-0.5  # Kaiming-uniform with a = sqrt(5), as in the authors' code and peft
            start = torch.empty(module.lora_A.shape, dtype=module.lora_A.dtype)
            fill(module.lora_A, start.uniform_(-bound, bound, generator=generator))
            local_part(module.lora_B).zero_()


def average_gradients(model: nn.Module, world: World) -> None:
    """Average over the ranks, in one message, the gradients of what each of them keeps whole; FSDP does the rest."""
    whole = [p.grad for p in model.parameters() if p.grad is not None and not is_dtensor(p)]
    if whole:
        summed = torch.cat([gradient.flatten() for gradient in whole])
        dist.all_reduce(summed)
        parts = (summed / world.size).split([gradient.numel() for gradient in whole])
        torch._foreach_copy_(whole, [part.view_as(gradient) for part, gradient in zip(parts, whole, strict=True)])


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' parameters by name."""
    return {
        f"{name}.{kind}": getattr(module, kind).detach()
        for name, module in lora_modules(model).items()
        for kind in ("lora_A", "lora_B")
    }


def lora_modules(model: nn.Module) -> dict[str, LoraLinear]:
    """The adapted modules by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def merged_weight(weight: Tensor, *adapters: tuple[Tensor, Tensor, float]) -> Tensor:
    """W + the sum of `scaling` B A over adapters (A, B, scaling). (out, in).

    Computed in `promote_types(W.dtype, float32)`, rounded once. Raises ValueError where the result is not finite.
    """
    precise = torch.promote_types(weight.dtype, torch.float32)
    merged = weight.to(precise)
    for lora_a, lora_b, scaling in adapters:
        merged = merged + scaling * (lora_b.to(precise) @ lora_a.to(precise))
    merged = merged.to(weight.dtype)
    if not torch.isfinite(merged).all():
        raise ValueError(f"merging gives values that are not finite in {weight.dtype}")
    return merged


class StackedLora(Linear):
    """A linear layer and several adapters, in inference: each token has one of them, or none.

    Attributes:
        parts: which of N tokens have which adapter; -1 is none. No product has a single row, so a token's bits do not
            depend on its company.
        route: (N,) int64, the same as a tensor, for code that is compiled or captured; None: `parts` says it.
    """

    def __init__(self, base: Linear, adapters: Mapping[int, tuple[Tensor, Tensor, float]], number: int) -> None:
        with torch.device("meta"):
            super().__init__(base.in_features, base.out_features)
        self.weight = base.weight
        self.base, self.adapters = base, adapters  # number -> A (R, in), B (out, R), scaling
        self.parts: list[tuple[int, slice]] = []
        self.route: Tensor | None = None
        rank, (like, *_) = max(len(lora_a) for lora_a, _, _ in adapters.values()), next(iter(adapters.values()))
        self.stacked_a = like.new_zeros(number + 1, rank, base.in_features)  # the last has zeros: none
        self.stacked_b = like.new_zeros(number + 1, base.out_features, rank)
        for each, (lora_a, lora_b, scaling) in adapters.items():
            self.stacked_a[each, : len(lora_a)], self.stacked_b[each, :, : len(lora_a)] = lora_a, lora_b * scaling

    def forward(self, x: Tensor) -> Tensor:
        """(1, N, in) -> (1, N, out)."""
        out: Tensor = self.base(x)
        if self.route is not None:
            low = torch.bmm(self.stacked_a[self.route], x[0].unsqueeze(-1))  # (N, R, 1)
            return out + torch.bmm(self.stacked_b[self.route], low).squeeze(-1)
        for number, part in self.parts:
            if number in self.adapters:
                lora_a, lora_b, scaling = self.adapters[number]
                rows = x[0, part]
                doubled = rows if len(rows) > 1 else rows.expand(2, -1)
                out[0, part] += (product(product(doubled, lora_a), lora_b) * scaling)[: len(rows)]
        return out


def stack_adapters(model: nn.Module, adapters: Sequence[Adapter]) -> list[StackedLora]:
    """Put several adapters beside the model's linear layers."""
    stacked = []
    for name in sorted({name for adapter in adapters for name in adapter}):
        parent, _, child = name.rpartition(".")
        base = model.get_submodule(name)
        assert isinstance(base, Linear)
        own = {number: adapter[name] for number, adapter in enumerate(adapters) if name in adapter}
        layer = StackedLora(base, own, len(adapters))
        setattr(model.get_submodule(parent), child, layer)
        stacked.append(layer)
    return stacked
