"""Adapters merged into the weights of their base."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from k2mini.files import check_output
from k2mini.model_config import tensor_shapes
from k2mini.nn.lora import merged_weight
from k2mini.weights.adapter import check_base, read_adapter, read_adapter_config, read_whole
from k2mini.weights.model_directory import CheckpointReader, ModelDirectory, check_tensors, read_manifest
from k2mini.weights.model_files import find_tokenizer, save_model

log = logging.getLogger(__name__)


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
    whole: dict[str, Tensor] = {}
    for adapter, weight in zip(adapters, weights or [1.0] * len(adapters), strict=True):
        section = read_adapter_config(adapter)
        pairs = read_adapter(adapter, section)
        check_base(adapter, base)
        if (how := (read_manifest(adapter) or {}).get("quantize")) is not None:
            log.warning("%s was trained over %s weights; merged, its answers differ a little", adapter, how)
        if section.modules_to_save and (len(adapters) > 1 or weight != 1):
            names = " and ".join(section.modules_to_save)
            raise ValueError(
                f"{adapter} has its own {names}, which can't be added to others: merge it alone, unweighted"
            )
        whole |= read_whole(adapter, section, base.config)
        for module, (lora_a, lora_b) in pairs.items():
            name = f"{module}.weight"
            if name not in reader.files or reader.shape(name) != (lora_b.shape[0], lora_a.shape[1]):
                raise ValueError(f"{adapter}: {module} does not fit {base.path}; they do not belong together")
            products.setdefault(name, []).append((lora_a, lora_b, weight * section.scaling))
    return MergedReader(reader, products, whole)


class MergedReader(CheckpointReader):
    """The tensors of a directory with adapters merged into them as they are read."""

    def __init__(
        self,
        reader: CheckpointReader,
        products: dict[str, list[tuple[Tensor, Tensor, float]]],
        whole: dict[str, Tensor],
    ) -> None:
        self.directory, self.files = reader.directory, reader.files
        self._reader, self._products, self._whole = reader, products, whole
        self.shape, self.stored_dtype = reader.shape, reader.stored_dtype  # type: ignore[method-assign]

    def tensor(self, name: str) -> Tensor:
        """One whole tensor, with the adapters' products in it where it has some."""
        return self.rows(name, 0, self.shape(name)[0])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of the base's tensor, with the same rows of each `scaling * B @ A` added; any rows can be asked for.

        An adapter's own embedding or head takes the place of the base's, in its dtype.
        """
        weight, products = self._reader.rows(name, start, stop), self._products.get(name)
        if name in self._whole:
            weight = self._whole[name][start:stop].to(weight.dtype)
            if not torch.isfinite(weight).all():
                raise ValueError(f"{name}: the adapter's has values that are not finite in {weight.dtype}")
        if products is None:
            return weight
        try:
            return merged_weight(weight, *((a, b[start:stop], scaling) for a, b, scaling in products))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
