"""What is said of a model, and which of its tensors is not finite."""

import torch

from k2mini.weights.info import nonfinite_tensor
from k2mini.weights.model_files import save_model
from tests.conftest import SHAPES, tiny_config, tiny_llama


def test_the_first_tensor_that_is_not_finite_is_named():
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_llama(dtype=dtype)
        assert nonfinite_tensor(model) is None
        for value in (torch.nan, -torch.inf):
            model = tiny_llama(dtype=dtype)
            model.get_parameter("model.layers.1.mlp.up_proj.weight").data[3, 5] = value
            assert nonfinite_tensor(model) == "model.layers.1.mlp.up_proj.weight"


def test_other_architectures_are_named(tmp_path, run):
    titles = {"grouped": "LLaMA", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    for name, title in titles.items():
        model = tiny_llama(tiny_config(**SHAPES[name]))
        save_model(model.state_dict(), model.config, tmp_path / name)
        status, out, err = run("info", tmp_path / name)
        assert status == 0, err
        assert out.startswith(f"{tmp_path / name}: a {title} model\n")
        assert ("max_seq_len 256, sliding_window 4\n" if name == "mistral" else "max_seq_len 256\n") in out
