import json
import logging
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

import k2mini.build
from k2mini.build import check_memory, load_model, pick_device, resolve_dtype, training_model
from k2mini.config import LoraSection, ModelSection, ParallelSection, TrainSection
from k2mini.distributed import World
from k2mini.gpu import repeat_exactly
from k2mini.weights.model_directory import CheckpointReader, ModelDirectory
from tests.helpers import fill_adapters, loss_and_gradients

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_default_precision():
    assert resolve_dtype(None, torch.float16, CPU) == torch.float32
    assert resolve_dtype(None, torch.float16, CUDA) == torch.float16
    assert resolve_dtype("bfloat16", torch.float16, CPU) == torch.bfloat16
    with pytest.raises(ValueError, match="dtype must be one of"):
        resolve_dtype("int4", torch.float16, CPU)


@pytest.fixture
def two_gpus(monkeypatch):
    """What is made the current device of two that are not there."""
    current = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", current.append)
    for name in ("LOCAL_RANK", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(name, "x")  # so that what is set here is undone
        monkeypatch.delenv(name)
    return current


@pytest.mark.parametrize(
    ("name", "rank", "picked"),
    [(None, None, 0), ("auto", None, 0), ("cuda", None, 0), ("cuda:1", None, 1), ("cuda", "1", 1), ("auto", "1", 1)],
)
def test_a_gpu_has_a_number_and_is_the_current_one(two_gpus, name, rank, picked):
    if rank is not None:
        os.environ["LOCAL_RANK"] = rank
    assert pick_device(name) == torch.device("cuda", picked)
    assert two_gpus == [torch.device("cuda", picked)]
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"


@pytest.mark.parametrize(
    ("name", "rank", "said"),
    [
        ("cuda:2", None, "--device cuda:2: this machine has 2 CUDA devices"),
        ("cuda", "2", "rank 2 of torchrun has no GPU: this machine has 2 CUDA devices"),
        ("cuda:1", "0", "--device cuda:1: each rank takes a GPU of its own"),
    ],
)
def test_a_gpu_that_is_not_there(two_gpus, name, rank, said):
    if rank is not None:
        os.environ["LOCAL_RANK"] = rank
    with pytest.raises(ValueError, match=said):
        pick_device(name)
    assert not two_gpus


def test_the_allocator_of_the_user_stays(two_gpus):
    os.environ["PYTORCH_ALLOC_CONF"] = "max_split_size_mb:64"
    pick_device("cuda")
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ


def test_too_little_memory_says_what_fits(monkeypatch):
    monkeypatch.setattr(k2mini.build, "free_memory", lambda _device: 16 * 2**30)
    seven_billion = 6_738_415_616
    with pytest.raises(ValueError, match=r"25.1 GiB, 16.0 GiB are free on cpu; --dtype float16, as stored"):
        check_memory(seven_billion, torch.float32, torch.float16, CPU)
    with pytest.raises(ValueError, match="--dtype bfloat16 fits"):
        check_memory(seven_billion, torch.float32, torch.float32, CUDA)
    check_memory(seven_billion, torch.float16, torch.float32, CUDA)
    monkeypatch.setattr(k2mini.build, "free_memory", lambda _device: 2**30)
    with pytest.raises(ValueError, match="use a device with more memory"):
        check_memory(seven_billion, torch.float16, torch.float16, CUDA)


def test_a_conversion_that_does_not_fit_is_refused_before_it_starts(tiny_directory, monkeypatch):
    monkeypatch.setattr(k2mini.build, "free_memory", lambda _device: 1000)
    with pytest.raises(ValueError, match="are free on cpu"):
        load_model(tiny_directory, dtype="bfloat16")
    load_model(tiny_directory)  # as stored, it is mapped from the file and needs no memory of its own


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_dtype_is_obeyed(tiny_directory, dtype):
    model, _ = load_model(tiny_directory, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert model(torch.tensor([[1, 5, 9]])).dtype == getattr(torch, dtype)
    assert not model.training


def test_a_tokenizer_of_another_size_is_refused(tiny_directory, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(tiny_directory, directory)
    config = json.loads((directory / "config.json").read_text())
    pieces = config["vocab_size"]
    for rows in (pieces - 1, pieces + 1000):
        (directory / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
        with pytest.raises(ValueError, match=f"has {pieces} tokens, the embedding has {rows:,} rows"):
            load_model(directory)


def test_special_tokens_come_from_the_tokenizer(tiny_directory, tmp_path, caplog):
    directory = tmp_path / "model"
    shutil.copytree(tiny_directory, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "bos_token_id": 0, "eos_token_id": 1}))
    with caplog.at_level(logging.WARNING):
        _, tokenizer = load_model(directory)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert "bos_token_id 0, tokenizer.model says 1; using the tokenizer's" in caplog.text
    assert "eos_token_id 1, tokenizer.model says 2; using the tokenizer's" in caplog.text


def test_each_file_of_a_directory_is_opened_once(tiny_directory, monkeypatch):
    opened, read_bytes, read_weights = Counter(), Path.read_bytes, CheckpointReader._open

    def count_bytes(path):
        opened[path.name] += path.parent == tiny_directory
        return read_bytes(path)

    def count_weights(reader, path):
        opened[path.name] += 1
        return read_weights(reader, path)

    monkeypatch.setattr(Path, "read_bytes", count_bytes)
    monkeypatch.setattr(CheckpointReader, "_open", count_weights)
    directory = ModelDirectory(tiny_directory)
    _, tokenizer = load_model(directory)
    assert directory.require_tokenizer() is tokenizer
    assert directory.fingerprint() == ModelDirectory(tiny_directory).fingerprint()
    once = {"config.json": 1, "manifest.json": 1, "tokenizer.model": 1, "generation_config.json": 1}
    assert opened == {**once, "model.safetensors": 2}  # the second for the comparison


def start_training(directory):
    section = TrainSection(lr=1e-3, max_steps=1)
    return training_model(ModelSection(str(directory)), section, ParallelSection(), World())[1]


def test_training_opens_the_tokenizer_when_it_is_asked_for(tiny_directory, monkeypatch):
    def opened(path):
        raise ValueError(f"opened {path.name}")

    monkeypatch.setattr("k2mini.weights.model_directory.Tokenizer", opened)
    directory = start_training(tiny_directory)
    assert directory.require_tokenizer_file() == tiny_directory / "tokenizer.model"
    with pytest.raises(ValueError, match=r"opened tokenizer.model"):
        directory.require_tokenizer()


def test_training_needs_a_tokenizer(tiny_directory, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(tiny_directory, directory)
    (directory / "tokenizer.model").unlink()
    assert load_model(directory)[1] is None
    for call in (start_training, lambda path: ModelDirectory(path).require_tokenizer()):
        with pytest.raises(ValueError, match=r"has no tokenizer.model; copy the one the model was trained with"):
            call(directory)


def test_a_path_that_is_no_directory(tmp_path):
    with pytest.raises(ValueError, match=r"there is no directory .*/nothing"):
        load_model(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"hf download daven3/k2-v1 --local-dir k2-v1"):
        load_model("daven3/k2-v1")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        load_model(tmp_path / "file")
    with pytest.raises(ValueError, match=r"has no config.json"):
        load_model(tmp_path)


@pytest.mark.parametrize("command", [["generate", "--prompt", "a"], ["score", "--text", "a"]])
def test_quantize_head_alone_is_refused_in_the_options_words(tiny_directory, run, monkeypatch, command):
    monkeypatch.setattr(k2mini.build, "_materialise", lambda *_: pytest.fail("the weights were read"))
    status, out, err = run(*command, "--model", tiny_directory, "--quantize-head")
    assert (status, out) == (2, "")
    assert err.splitlines()[-1] == "k2mini: --quantize-head needs --quantize int8"


def test_training_that_repeats(two_gpus, monkeypatch):
    asked = []
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    repeat_exactly()
    assert asked == [True]
    assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"


def test_compiled_blocks_keep_int8_for_the_backward_pass(tiny_directory, monkeypatch):
    """And no floats made of it, which would be as large as a model that is not quantised."""
    how, whole = {"backend": "aot_eager_decomp_partition"}, torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: whole(module, **how))
    torch._dynamo.reset()
    section, base = TrainSection(lr=1e-3, max_steps=1, compile=True), ModelSection(str(tiny_directory), quantize="int8")
    model, _ = training_model(base, section, ParallelSection(), World(), LoraSection(rank=2))
    matrices = {tuple(p.shape) for p in model.parameters() if p.dtype == torch.int8}
    kept = []

    @torch.compiler.disable
    def keep(tensor):
        kept.append((tuple(tensor.shape), tensor.dtype))
        return tensor

    tokens = torch.randint(3, 199, (3, 50))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train().loss(tokens, None, tokens).backward()
    assert {dtype for shape, dtype in kept if shape in matrices or shape[::-1] in matrices} == {torch.int8}


@pytest.mark.parametrize("recomputed", [0, 1])
def test_compiled_blocks_of_lora_share_one_graph(tiny_directory, monkeypatch, recomputed):
    """Whichever block, length or number of rows; a single row, which compilers treat apart, has another."""
    graphs, whole = [], torch.nn.Module.compile

    def counting(graph, _inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **how: whole(module, backend=counting, **how))
    torch._dynamo.reset()
    lora, base = LoraSection(rank=2, dropout=0.0), ModelSection(str(tiny_directory), quantize="int8")

    def model(**how):
        section = TrainSection(lr=1e-3, max_steps=1, activation_checkpointing=recomputed, **how)
        return training_model(base, section, ParallelSection(), World(), lora)[0].train()

    compiled, plain = model(compile=True), model()
    for rows, length, expected in ((4, 40, 1), (4, 40, 1), (4, 24, 1), (3, 40, 1), (1, 40, 2), (1, 24, 2), (4, 56, 2)):
        tokens = torch.randint(3, 199, (rows, length), generator=torch.Generator().manual_seed(length))
        positions = torch.arange(length).repeat(rows, 1)
        ours, theirs = (each.loss(tokens, positions, tokens) for each in (compiled, plain))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
        ours.backward()
        theirs.backward()
        assert len(graphs) == expected, (rows, length)
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(compiled.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-5)
    assert plain.model.layers[0].self_attn.q_proj.lora_B.grad.any()
    with torch.no_grad():
        for length in (40, 24):
            tokens = torch.ones(4, length, dtype=torch.int64)
            compiled.loss(tokens, torch.arange(length).repeat(4, 1), tokens)
    assert len(graphs) == 3


@pytest.mark.parametrize("recomputed", [0, 1])
def test_compiled_blocks_drop_and_attend_as_others_do(tiny_directory, monkeypatch, recomputed):
    """Each adapter has a mask of its own; rows hold several documents, whose lengths do not change the graph."""
    how, whole, graphs = (
        {"backend": "aot_eager_decomp_partition"},
        torch.nn.Module.compile,
        torch._dynamo.utils.counters,
    )
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **given: whole(module, **{**given, **how}))
    torch._dynamo.reset()
    graphs.clear()

    def model(**changes):
        section = TrainSection(lr=1e-3, max_steps=1, activation_checkpointing=recomputed, **changes)
        lora, base = LoraSection(rank=2, dropout=0.3), ModelSection(str(tiny_directory))
        made = training_model(base, section, ParallelSection(), World(), lora)[0].train()
        fill_adapters(made)
        return made

    compiled, plain = model(compile=True), model()
    for lengths in ([9, 31], [40], [1, 2, 3, 34]):
        positions = torch.cat([torch.arange(length) for length in lengths]).repeat(3, 1)
        tokens = torch.randint(3, 199, positions.shape, generator=torch.Generator().manual_seed(len(lengths)))
        results = []
        for each in (compiled, plain):
            torch.manual_seed(1)
            loss, *gradients = loss_and_gradients(each, tokens, positions, tokens)
            results.append([loss, torch.get_rng_state(), *gradients])
        torch.testing.assert_close(results[0][:2], results[1][:2], rtol=1e-6, atol=0)
        torch.testing.assert_close(results[0][2:], results[1][2:], rtol=0, atol=1e-4)
    assert graphs["stats"]["unique_graphs"] == 1
