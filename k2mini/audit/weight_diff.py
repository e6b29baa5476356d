"""How the weights of two checkpoints differ, or what an adapter adds, tensor by tensor.

Tensors are read one at a time, so the memory needed is that of a few matrices, not of two models.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k2mini.errors import some
from k2mini.files import progress_bar
from k2mini.weights.adapter import check_base, read_adapter, read_adapter_config, read_whole
from k2mini.weights.merge import merged_reader
from k2mini.weights.model_directory import CheckpointReader, ModelDirectory

EXACT = 1024  # a matrix with at most this many rows or columns gets its exact singular values; others an estimate
VALUES = 16  # how many of the largest singular values are kept
SUBSPACE = 64  # how many of the base's left singular vectors span its top subspace
ROWS = 1024  # how many rows of a matrix are read at a time
SHOWN = 10**8  # models with more numbers than this get a progress bar
ZERO = 1e-6  # singular values below this part of the largest count as zero


@dataclass(frozen=True)
class Change:
    """How one tensor changed.

    Attributes:
        relative: ||after - before|| / ||before||, Frobenius norms.
        cosine: of the angle between before and after, taken as vectors.
        spectrum: the largest singular values of the change (of a vector, its norm).
        effective_rank: (sum of s^2)^2 / sum of s^4, the participation ratio: r for r equal singular values.
        rank: how many singular values are not zero; None where only the largest are known and none of them is zero.
        in_top: the part of the change's squared norm that lies in the span of the base's SUBSPACE first left singular
            vectors; None where it was not asked for.
    """

    name: str
    relative: float
    cosine: float
    spectrum: list[float]
    effective_rank: float
    rank: int | None
    in_top: float | None = None


def diff_checkpoints(before: Path, after: Path, *, subspace: bool = False) -> list[Change]:
    """How every tensor changed, in the checkpoint's order.

    Args:
        subspace: compute `in_top` as well, which costs a singular value decomposition of every matrix of `before`.

    Raises ValueError where the two are models of different shapes, or a tensor is not finite.
    """
    one, other = check_shapes(before, after)
    names, found = one.names(), []
    size = sum(prod(one.shape(name)) for name in names)
    with progress_bar(len(names), "comparing", "tensors", shown=size > SHOWN) as progress:
        for name in names:
            found.append(_change(one, other, name, subspace=subspace))
            progress.update()
    return found


def check_shapes(before: Path, after: Path) -> tuple[CheckpointReader, CheckpointReader]:
    """Open two checkpoints. Raises ValueError where they are models of different shapes."""
    one, other = CheckpointReader(before), CheckpointReader(after)
    odd = sorted(set(one.names()) ^ set(other.names()))
    odd += [name for name in one.names() if name in other.files and one.shape(name) != other.shape(name)]
    if odd:
        raise ValueError(f"{before} and {after} are models of different shapes: {some(odd)}")
    return one, other


def diff_adapter(base: Path, adapter: Path) -> list[Change]:
    """What an adapter adds to every matrix that it adapts, with exact rank and spectrum; how those that it has changed.

    Raises ValueError where the adapter was not trained on this base.
    """
    directory, section = ModelDirectory(base), read_adapter_config(adapter)
    reader = directory.reader
    check_base(adapter, directory)
    found = []
    for module, (lora_a, lora_b) in sorted(read_adapter(adapter, section).items()):
        name = f"{module}.weight"
        if name not in reader.files:
            raise ValueError(f"{adapter}: {base} has no {module}; they do not belong together")
        weight = reader.tensor(name).float()
        # B A = Q_b (R_b R_a^T) Q_a^T has the singular values of R_b R_a^T, which is rank x rank.
        r_b = torch.linalg.qr(lora_b.double()).R
        r_a = torch.linalg.qr(lora_a.double().T).R
        values = torch.linalg.svdvals(r_b @ r_a.T) * section.scaling
        delta = (lora_b.double() @ lora_a.double() * section.scaling).float()
        top = _top_subspace(weight)
        found.append(
            Change(
                name,
                (delta.norm() / weight.norm()).item(),
                _cosine(weight, weight + delta),
                values[:VALUES].tolist(),
                _participation(values),
                int((values > ZERO * values[0]).sum()),
                ((top.T @ delta).square().sum() / delta.square().sum()).item(),
            )
        )
    if whole := read_whole(adapter, section, directory.config):
        merged = merged_reader(directory, [adapter])
        found += [_change(reader, merged, name, subspace=True) for name in whole]
    return found


def _change(one: CheckpointReader, other: CheckpointReader, name: str, *, subspace: bool) -> Change:
    """How one tensor changed; both checkpoints are read ROWS rows at a time."""
    shape = one.shape(name)
    delta = torch.empty(shape)
    squares = torch.zeros(3, dtype=torch.float64)  # of before, of after, and of their product
    for start in range(0, shape[0], ROWS):
        before, after = (reader.rows(name, start, start + ROWS).float() for reader in (one, other))
        squares += torch.stack([(before * before).sum(), (after * after).sum(), (before * after).sum()]).double()
        torch.sub(after, before, out=delta[start : start + ROWS])
    if not bool(squares.isfinite().all()):
        odd = (other if bool(squares[0].isfinite()) else one).directory
        raise ValueError(f"{odd}: {name} holds NaN or infinity")
    size, (length, after_length, product) = delta.norm(), squares.tolist()
    relative = size.item() / length**0.5 if length else float("inf")
    cosine = product / (length * after_length) ** 0.5 if length and after_length else 0.0
    if size == 0:
        return Change(name, 0.0, 1.0, [], 0.0, 0)
    if delta.dim() == 1:
        return Change(name, relative, cosine, [size.item()], 1.0, 1)
    if min(delta.shape) <= EXACT:
        values = torch.linalg.svdvals(delta)
        rank: int | None = int((values > ZERO * max(delta.shape) ** 0.5 * values[0]).sum())
        spread = _participation(values)
    else:
        values = _largest(delta)
        # sum of s^4 = ||D D^T||^2, of the smaller of the two products.
        small = delta if delta.shape[0] <= delta.shape[1] else delta.T
        spread = (size**4 / (small @ small.T).square_().sum()).item()
        below = values < 1e-4 * values[0]  # the estimate's own error is above ZERO
        rank = int((~below).sum()) if bool(below.any()) else None
    in_top = None
    if subspace:
        in_top = ((_top_subspace(one.tensor(name).float()).T @ delta).square().sum() / size**2).item()
    return Change(name, relative, cosine, values[:VALUES].tolist(), spread, rank, in_top)


def _cosine(a: Tensor, b: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


def _participation(values: Tensor) -> float:
    """The participation ratio of singular values: (sum of s^2)^2 / sum of s^4."""
    squares = values.double().square()
    return (squares.sum() ** 2 / squares.square().sum()).item() if values.numel() and squares.sum() > 0 else 0.0


def _range_basis(matrix: Tensor, size: int, steps: int = 3) -> Tensor:
    """An orthonormal basis of nearly the top left singular vectors (Halko et al. 2011, arXiv 0909.4061, alg. 4.4)."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(matrix @ torch.randn(matrix.shape[1], size, generator=generator)).Q
    for _ in range(steps):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    return basis


def _largest(matrix: Tensor) -> Tensor:
    """Estimates of the largest singular values: those of the matrix within a basis of twice VALUES columns."""
    return torch.linalg.svdvals(_range_basis(matrix, 2 * VALUES).T @ matrix)


def _top_subspace(weight: Tensor) -> Tensor:
    """The first SUBSPACE left singular vectors of a matrix, estimated for a large one. (rows, SUBSPACE)."""
    size = min(SUBSPACE, *weight.shape)
    if min(weight.shape) <= EXACT:
        return torch.linalg.svd(weight, full_matrices=False).U[:, :size]
    return _range_basis(weight, size + 8)[:, :size]


def moved_rows(before: Path, after: Path, number: int = 20) -> list[tuple[int, float]]:
    """The `number` tokens whose embeddings moved most: (token, distance relative to the embedding's length)."""
    name = "model.embed_tokens.weight"
    one, other = CheckpointReader(before), CheckpointReader(after)
    parts = []
    for start in range(0, one.shape(name)[0], ROWS):
        a, b = (reader.rows(name, start, start + ROWS).float() for reader in (one, other))
        parts.append((b - a).norm(dim=1) / a.norm(dim=1).clamp(min=1e-12))
    moved = torch.cat(parts)
    values, places = moved.topk(min(number, len(moved)))
    return list(zip(places.tolist(), values.tolist(), strict=True))


def by_module(changes: list[Change]) -> dict[str, float]:
    """The relative change of each kind of module (q_proj, q_proj.bias, …): the root mean square over all layers."""
    kinds: dict[str, list[float]] = {}
    for change in changes:
        parts = change.name.removesuffix(".weight").split(".")
        kinds.setdefault(".".join(parts[-2:]) if parts[-1] == "bias" else parts[-1], []).append(change.relative)
    return {kind: (sum(v * v for v in values) / len(values)) ** 0.5 for kind, values in sorted(kinds.items())}


def by_layer(changes: list[Change]) -> dict[int, float]:
    """The relative change of each layer: the root mean square over its tensors."""
    layers: dict[int, list[float]] = {}
    for change in changes:
        if ".layers." in change.name:
            layers.setdefault(int(change.name.split(".")[2]), []).append(change.relative)
    return {layer: (sum(v * v for v in values) / len(values)) ** 0.5 for layer, values in sorted(layers.items())}


def as_json(changes: list[Change]) -> list[dict[str, Any]]:
    """The changes as plain values, one object a tensor."""
    return [asdict(change) for change in changes]
