"""What k2mini notes beside the weights it writes, so that what does not belong together is not put together."""

from __future__ import annotations

import hashlib

import torch

from k2mini.weights.formats import CheckpointReader


def model_fingerprint(reader: CheckpointReader) -> str:
    """A hash by which a model is known again, made in well under a second for 13 GB.

    It covers every tensor's name and shape, all vectors, and the first and the last row of every matrix, as float32: so
    any training changes it, and a copy in another layout, or in a wider dtype, does not.
    """
    digest = hashlib.sha256()
    for name in reader.names():
        shape = reader.shape(name)
        digest.update(f"{name}{shape}".encode())
        ends = [(0, shape[0])] if len(shape) == 1 else [(0, 1), (shape[0] - 1, shape[0])]
        for start, stop in ends:
            digest.update(reader.rows(name, start, stop).to(torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()
