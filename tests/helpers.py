"""Adapters, examples and settings that several test modules use."""

import json
import shutil

import torch
from torch.overrides import TorchFunctionMode

from k2mini.config import LoraSection, TrainSection
from k2mini.data.packing import Example
from k2mini.nn.llama import Llama
from k2mini.nn.lora import adapter_tensors, attach, init_adapters
from k2mini.nn.quant import fill, int8_matrices, quantize_blocks
from k2mini.weights.model_files import save_model
from tests.conftest import tiny_config, tiny_llama

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = torch.randint(199, (2, 25), generator=torch.Generator().manual_seed(1))


# As SmolLM2's, but that it refuses two messages of one role in a row, as Gemma's does.
CHATML = (
    "{% for message in messages %}"
    "{% if not loop.first and message['role'] == messages[loop.index0 - 1]['role'] %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_chat_model(folder, template=CHATML, ends=None, seed=0):
    """A tiny model with a byte-level tokenizer.json whose EOS is <|endoftext|>, and a chat template of its own.

    Args:
        template: None: it has none.
        ends: the list of generation_config.json, if it has one.
    """
    from tokenizers import ByteLevelBPETokenizer

    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    made = ByteLevelBPETokenizer()
    made.train_from_iterator(["granite is a rock, basalt is a rock of the mantle. "] * 9, 300, 2, False, names)
    config = tiny_config(vocab_size=made.get_vocab_size(), max_seq_len=512)
    save_model(tiny_llama(config, seed).state_dict(), config, folder)
    made.save(str(folder / "tokenizer.json"))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": names[0]}
    if template is not None:
        fields["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    if ends is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return folder


def one_step(folder, model, **data):
    """The configuration of a run of one step, as a file."""
    train = {"lr": 1e-3, "max_steps": 1, "global_batch_size": 1, "micro_batch_size": 1}
    content = {"run": {"dir": str(folder / "run")}, "model": {"path": str(model)}, "data": data, "train": train}
    (folder / "run.yaml").write_text(json.dumps(content))
    return folder / "run.yaml"


def copy_model(source, folder, **generation):
    """A copy of a model, with another generation_config.json."""
    shutil.copytree(source, folder)
    (folder / "manifest.json").unlink()
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def fill_adapters(model: Llama, std: float = 0.1) -> None:
    """Random B matrices: a fresh adapter's are zero, so that it does nothing yet."""
    generator = torch.Generator().manual_seed(2)
    for name, tensor in adapter_tensors(model).items():
        if name.endswith("lora_B"):
            tensor.normal_(0, std, generator=generator)


def adapted(config=None, targets=("q_proj", "k_proj", "v_proj"), dropout=0.0, fill=True, dtype=torch.float32):
    """A tiny model with an adapter that does something."""
    model = tiny_llama(config, dtype=dtype)
    attach(model, LoraSection(rank=4, alpha=6.0, dropout=dropout, target_modules=list(targets)))
    init_adapters(model, seed=1)
    if fill:
        fill_adapters(model)
    return model


def loss_and_gradients(model, *batch, **more):
    """What a model's `loss` is, and the gradients of what trains."""
    model.zero_grad()
    loss = model.loss(*batch, **more)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def quantised(model, how="int8"):
    """The same model with its blocks' matrices quantised."""
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantize_blocks(model.model.layers, how)
    for name in int8_matrices({name: tuple(tensor.shape) for name, tensor in values.items()}):
        module = model.get_submodule(name.removesuffix(".weight"))
        fill(module, name, lambda name, start, stop: values[name][start:stop], model.device, stored=False)
    return model


def examples(number=23):
    """Examples of 5 to 41 tokens, of which the second half is supervised."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 40, (number,), generator=generator).tolist()
    return [
        Example([1, *torch.randint(3, 199, (length,), generator=generator).tolist(), 2], length // 2)
        for length in lengths
    ]


def section(**changes):
    return TrainSection(**{"lr": 1e-3, "global_batch_size": 4, "micro_batch_size": 4, "max_steps": 20, **changes})


class HostWaits(TorchFunctionMode):
    """What inside of it would make the host wait for a GPU, in `found`: names of tensors' methods."""

    NAMES = ("tolist", "item", "__bool__", "__float__", "__int__", "nonzero", "numpy", "cpu")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, _types, args=(), kwargs=None):
        places = args[1] if func.__name__ in ("__getitem__", "__setitem__") else None
        places = places if isinstance(places, tuple) else (places,)
        if func.__name__ in self.NAMES or any(isinstance(p, torch.Tensor) and p.dtype == torch.bool for p in places):
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))
