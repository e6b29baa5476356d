"""Which tensor of a model is not finite."""

import torch

from k2mini.weights.info import nonfinite_tensor
from tests.conftest import tiny_llama


def test_the_first_tensor_that_is_not_finite_is_named():
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_llama(dtype=dtype)
        assert nonfinite_tensor(model) is None
        for value in (torch.nan, -torch.inf):
            model = tiny_llama(dtype=dtype)
            model.get_parameter("model.layers.1.mlp.up_proj.weight").data[3, 5] = value
            assert nonfinite_tensor(model) == "model.layers.1.mlp.up_proj.weight"
