"""The dtypes that k2mini reads and writes, and the names that each kind of file has for them."""

from __future__ import annotations

import torch

from k2mini.config import DTYPE_NAMES

# By PyTorch's own name, as configurations, options and manifests write it.
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}
# The signed integer as wide as a floating-point dtype. A `bits` delta takes the bits of a number as such an integer.
INTEGERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}
NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in (*INTEGERS, *INTEGERS.values(), torch.int8, torch.uint8)}
# safetensors' codes. Weights are floating-point; a `bits` delta and quantised weights are integers.
SAFETENSORS_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SAFETENSORS = {
    **SAFETENSORS_FLOATS,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
SAFETENSORS_CODES = {dtype: code for code, dtype in SAFETENSORS.items()}
# The storage classes that a pickled state dict (`.bin`, `.pth`) names.
STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}
