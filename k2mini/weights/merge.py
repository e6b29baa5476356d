"""Adapters merged into the weights of their base."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from k2mini.files import check_output
from k2mini.model_config import tensor_shapes
from k2mini.nn.lora import merged_weight
from k2mini.weights.adapter import check_base, read_adapter, read_adapter_config
from k2mini.weights.model_directory import CheckpointReader, ModelDirectory, check_tensors
from k2mini.weights.model_files import find_tokenizer, save_model


def merge_adapters(
    base: Path, adapters: Sequence[Path], out: Path, *, weights: Sequence[float] = (), force: bool = False
) -> None:
    """Write base + adapters as a Hugging Face directory, in the base's dtype, with the base's tokenizer.

    A few megabytes are merged at a time.

    Args:
        weights: what each adapter's product is multiplied by; none: 1. Ranks and modules may differ, as in peft's
            `add_weighted_adapter` with combination_type 'cat'.

    Raises ValueError where base and adapters do not belong together, or the result is not finite.
    """
    if weights and (len(weights) != len(adapters) or not all(map(math.isfinite, weights))):
        numbers = " ".join(f"{weight:g}" for weight in weights)
        raise ValueError(f"--weights {numbers}: as many finite numbers are needed as adapters, {len(adapters)}")
    if len({adapter.resolve() for adapter in adapters}) < len(adapters):
        raise ValueError(f"--adapter {' '.join(map(str, adapters))}: one is named twice; give it twice the weight")
    check_output(out, force=force, inputs=(base, *adapters))
    directory = ModelDirectory(base)
    directory.require_model()
    if directory.quantized is None:
        check_tensors(directory.reader, tensor_shapes(directory.config), base)
    source, tokenizer = merged_reader(directory, adapters, weights), find_tokenizer(base)
    save_model(source, directory.config, out, tokenizer=tokenizer, force=force, inputs=(base, *adapters))


def merged_reader(base: ModelDirectory, adapters: Sequence[Path], weights: Sequence[float] = ()) -> MergedReader:
    """A base's tensors with adapters merged into them, each times its weight (none: 1).

    Raises ValueError where base and adapters do not belong together, or the base is quantised.
    """
    if base.quantized is not None:
        raise ValueError(f"{base.path} is quantised; an adapter is merged into full-precision weights only")
    reader, products = base.reader, dict[str, list[tuple[Tensor, Tensor, float]]]()
    for adapter, weight in zip(adapters, weights or [1.0] * len(adapters), strict=True):
        section = read_adapter_config(adapter)
        pairs = read_adapter(adapter, section)
        check_base(adapter, base)
        for module, (lora_a, lora_b) in pairs.items():
            name = f"{module}.weight"
            if name not in reader.files or reader.shape(name) != (lora_b.shape[0], lora_a.shape[1]):
                raise ValueError(f"{adapter}: {module} does not fit {base.path}; they do not belong together")
            products.setdefault(name, []).append((lora_a, lora_b, weight * section.scaling))
    return MergedReader(reader, products)


class MergedReader(CheckpointReader):
    """The tensors of a directory with adapters merged into them as they are read."""

    def __init__(self, reader: CheckpointReader, products: dict[str, list[tuple[Tensor, Tensor, float]]]) -> None:
        self.directory, self.files = reader.directory, reader.files
        self._reader, self._products = reader, products
        self.shape, self.stored_dtype = reader.shape, reader.stored_dtype  # type: ignore[method-assign]

    def tensor(self, name: str) -> Tensor:
        """One whole tensor, with the adapters' products in it where it has some."""
        return self.rows(name, 0, self.shape(name)[0])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of the base's tensor, with the same rows of each `scaling * B @ A` added; any rows can be asked for."""
        weight, products = self._reader.rows(name, start, stop), self._products.get(name)
        if products is None:
            return weight
        try:
            return merged_weight(weight, *((a, b[start:stop], scaling) for a, b, scaling in products))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
