"""NF4 against bitsandbytes'. What it has in common with int8 is in test_quant.py."""

import json
import math

import pytest
import torch

from k2mini.build import load_model, training_model
from k2mini.config import LoraSection, ModelSection, ParallelSection, TrainSection
from k2mini.distributed import ALONE
from k2mini.model_config import tensor_shapes
from k2mini.nn import nf4
from k2mini.nn.lora import lora_modules
from k2mini.nn.quant import int8_matrices
from k2mini.weights.convert import convert
from k2mini.weights.model_directory import CheckpointReader
from k2mini.weights.model_files import save_model
from tests.conftest import ROOT, tiny_config, tiny_llama
from tests.helpers import TOKENS

theirs = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")


def matrix(rows=6, columns=128, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def equals_bitsandbytes(values):
    codes, state = theirs.quantize_4bit(values, quant_type="nf4", compress_statistics=True)
    weight, absmax, scale = nf4.quantize(values)
    assert torch.equal(weight.flatten(), codes.flatten())
    assert torch.equal(absmax.flatten(), state.absmax)
    assert torch.equal(scale, torch.cat([state.code, state.state2.code, state.offset[None], state.state2.absmax]))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        state.dtype = dtype
        ours = nf4.dequantize(weight, absmax, scale, dtype).view(values.shape)
        assert torch.equal(ours, theirs.dequantize_4bit(codes, state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 64), (6, 128), (33, 320), (1000, 576), (256, 64), (128, 344), (64, 7)])
def test_codes_scales_and_values_are_those_of_bitsandbytes(dtype, shape):
    for seed, spread in enumerate((1e-3, 1.0, 30.0)):
        equals_bitsandbytes((matrix(*shape, seed) * spread).to(dtype))
    rows = matrix(*shape, 9) * torch.logspace(-3, 1, shape[0])[:, None]
    rows[0] = 0
    equals_bitsandbytes(rows.to(dtype))
    equals_bitsandbytes(torch.zeros(shape, dtype=dtype))


def test_the_tables_are_those_of_bitsandbytes():
    assert torch.equal(nf4.dynamic_map(), theirs.create_dynamic_map())
    assert torch.equal(torch.tensor(nf4.CODEBOOK), theirs.get_4bit_type("nf4", device="cpu"))


def test_a_real_models_matrices(real_model):
    reader = CheckpointReader(real_model)
    names = [name for name in reader.names() if ".layers.7." in name and len(reader.shape(name)) == 2]
    assert len(names) == 7
    for name in names:
        equals_bitsandbytes(reader.tensor(name))


def test_sizes_that_do_not_divide_and_values_that_are_not_finite(tmp_path, run):
    config = tiny_config(dim=48, num_heads=3, num_kv_heads=3, intermediate_dim=30)
    save_model(tiny_llama(config).state_dict(), config, tmp_path / "odd")
    said = "model.layers.0.mlp.gate_proj.weight is 30 x 48, and NF4 takes whole blocks of 64 values; quantise to int8"
    with pytest.raises(ValueError, match=said):
        load_model(tmp_path / "odd", quantize="nf4")
    status, _, err = run("convert", tmp_path / "odd", "--to", "hf", "--quantize", "nf4", "--out", tmp_path / "out")
    assert status == 2
    assert said.partition(" is ")[2][8:] in err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="W is not finite"):
        nf4.quantize(torch.full((1, 64), torch.inf), "W")


def test_a_directory_of_nf4_is_what_is_quantised_when_it_is_read(wide_directory, tmp_path, run):
    status, _, err = run("convert", wide_directory, "--to", "hf", "--quantize", "nf4", "--out", tmp_path / "four")
    assert status == 0, err
    (stored, _), (fresh, _) = load_model(tmp_path / "four"), load_model(wide_directory, quantize="nf4")
    names = dict(fresh.named_parameters())
    assert names.keys() == dict(stored.named_parameters()).keys()
    assert all(torch.equal(tensor, names[name]) for name, tensor in stored.named_parameters())
    plain, _ = load_model(wide_directory)
    for name in int8_matrices(tensor_shapes(plain.config)):
        codes, state = theirs.quantize_4bit(plain.get_parameter(name), quant_type="nf4", compress_statistics=True)
        plain.get_parameter(name).data.copy_(theirs.dequantize_4bit(codes, state))
    with torch.inference_mode():
        assert torch.equal(stored(TOKENS), plain(TOKENS))
    assert run("verify", tmp_path / "four")[0] == 0
    found = json.loads(run("info", tmp_path / "four", "--json")[1])
    shapes = tensor_shapes(plain.config)
    assert found["dtypes"]["nf4"] == sum(math.prod(shapes[name]) for name in int8_matrices(shapes))
    half, _ = load_model(wide_directory, dtype="bfloat16", quantize="nf4")
    assert found["memory"]["nf4"]["weights"] == sum(p.numel() * p.element_size() for p in half.parameters())
    config = [ROOT / "configs/instruct_stage2_7b.yaml", f"model.path={wide_directory}", "model.quantize=nf4"]
    said = run("plan", *config, "--inference", "--gpu-memory", "1GiB", "--json")
    assert said[0] == 0, said[2]
    assert json.loads(said[1])["weights"] == found["memory"]["nf4"]["weights"]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            ("generate", "--prompt", "x", "--quantize", "int8", "--model"),
            "is quantised to nf4; leave out --quantize int8",
        ),
        (("generate", "--prompt", "x", "--quantize-head", "--model"), "--quantize-head needs --quantize int8"),
        (("convert", "--to", "bin", "--out", "out"), "is quantised; convert the full-precision model"),
    ],
)
def test_what_does_not_go_with_nf4_is_one_sentence(wide_directory, tmp_path, run, monkeypatch, command, said):
    monkeypatch.chdir(tmp_path)
    convert(wide_directory, "hf", tmp_path / "four", quantize="nf4")
    status, _, err = run(*command, tmp_path / "four")
    assert status == 2
    assert said in err.splitlines()[-1]


@pytest.mark.parametrize("quantize", ["nf4", "int8", None])
def test_training_says_as_what_a_base_is_stored(wide_directory, tmp_path, quantize):
    convert(wide_directory, "hf", tmp_path / "four", quantize="nf4")
    section, lora = ModelSection(str(tmp_path / "four"), quantize=quantize), LoraSection(rank=2, dropout=0.0)
    if quantize != "nf4":
        with pytest.raises(ValueError, match=r"train adapters over it with model\.quantize=nf4"):
            training_model(section, TrainSection(lr=1e-3, max_steps=1), ParallelSection(), ALONE, lora)
        return
    model, _ = training_model(section, TrainSection(lr=1e-3, max_steps=1), ParallelSection(), ALONE, lora)
    model.loss(TOKENS[:, :-1], None, TOKENS[:, 1:]).backward()
    assert all(module.lora_B.grad.abs().sum() > 0 for module in lora_modules(model).values())
