"""The options that several commands share, as `parents` of their parsers.

Each command's file declares the rest. This file imports nothing that takes time, for `k2mini --help` imports it.
"""

from __future__ import annotations

import argparse
import logging
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from k2mini.config import DTYPE_NAMES, QUANTIZE_NAMES
from k2mini.data.chats import CHAT_TEMPLATES
from k2mini.data.prompts import TEMPLATES

if TYPE_CHECKING:
    from collections.abc import Callable

    from k2mini.data.tokenizer import Tokenizer
    from k2mini.nn.llama import Llama

log = logging.getLogger("k2mini.commands")


class Print(argparse.Action):
    """An option that prints what the function `const` returns, which may take time, and ends."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(self.const())
        parser.exit()


def version() -> str:
    """The program's name and version."""
    from importlib.metadata import version

    return f"k2mini {version('k2mini')}"


LIST: Any = {"nargs": "+", "action": "extend"}  # an option that takes several values, and more where it is repeated
# How a model is asked.
TEMPLATE_HELP = f"{', '.join((*TEMPLATES, *CHAT_TEMPLATES))}, or own, the model's chat template"
_DEFAULT = "the adapter's run's, else own, else alpaca"
TEMPLATE: Any = {"metavar": "NAME", "help": f"{TEMPLATE_HELP} (default: {_DEFAULT})"}

SHARD: Any = {"action": "store_true", "help": "of ranks (torchrun): each keeps a part of the weights, not all of them"}

DEBUG = argparse.ArgumentParser(add_help=False)
DEBUG.add_argument("--debug", action="store_true", help="show the traceback of an error")

# Where a command writes a directory.
TARGET = argparse.ArgumentParser(add_help=False, parents=[DEBUG])
TARGET.add_argument("--out", required=True, type=Path, metavar="DIR", help="what is written, a new directory")
TARGET.add_argument("--force", action="store_true", help="replace DIR, once what replaces it is complete")

# How a command computes.
COMPUTE = argparse.ArgumentParser(add_help=False, parents=[DEBUG])
_group = COMPUTE.add_argument_group("common options")
_group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
_group.add_argument(
    "--dtype",
    choices=DTYPE_NAMES,
    help="precision (default: as stored on a GPU, float32 on a CPU; of a run: its model.dtype)",
)
_group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
_group.add_argument(
    "--seed", type=int, metavar="N", help="seed of all that is drawn (default: 0; of a run: its run.seed)"
)

# The model that a command loads. LOADED are the parameters of `load_model` that options name as it does.
MODEL = argparse.ArgumentParser(add_help=False)
MODEL.add_argument("--model", required=True, metavar="DIR", help="a Hugging Face directory, or an id (extra: hub)")
MODEL.add_argument("--adapter", metavar="DIR", help="a LoRA adapter for it (PEFT's format)")
MODEL.add_argument("--merge", action="store_true", help="put the adapter into the weights (default: beside them)")
MODEL.add_argument(
    "--quantize",
    choices=QUANTIZE_NAMES,
    help="keep the blocks' matrices in 8 bits, or 4 (nf4) (default: no)",
)
MODEL.add_argument("--quantize-head", action="store_true", help="the vocabulary projection, too")
MODEL.add_argument("--compile", action="store_true", help="compile decoding: seconds at first, then faster")
LOADED = ("adapter", "dtype", "quantize", "merge", "quantize_head")

# The same of one that answers, and how its answers are drafted ahead (inference/speculate.py).
ANSWER = argparse.ArgumentParser(add_help=False, parents=[COMPUTE])
ANSWER.add_argument("--speculate", action="store_true", help="draft what stood before, and check it: the same, sooner")
ANSWER.add_argument("--draft-model", metavar="DIR", help="draft with this smaller model, which has the same tokenizer")

# The configuration of a run.
CONFIG = argparse.ArgumentParser(add_help=False)
CONFIG.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file, such as those in configs/")
CONFIG.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the file")


def drafting(options: argparse.Namespace, tokenizer: Tokenizer) -> Callable[[Llama], Llama | None]:
    """What lets a model's answers be drafted as `ANSWER` says; made before it is loaded, for what can't be is found."""
    from k2mini.build import open_model
    from k2mini.inference.speculate import check_vocabulary, speculate
    from k2mini.weights.model_directory import ModelDirectory

    if options.draft_model is None:
        return speculate
    directory = ModelDirectory(options.draft_model)
    directory.require_model()
    check_vocabulary(tokenizer, directory.require_tokenizer(), str(directory.path))

    def begin(model: Llama) -> Llama | None:
        draft, _ = open_model(directory, options.device, options.threads, dtype=options.dtype)
        return speculate(model, draft)

    return begin


def tuned_in(*adapters: str | Path) -> str | None:
    """The template that adapters were tuned in, as the run beside them notes it; None where there is no note.

    Raises ValueError where they were tuned in several.
    """
    from k2mini.files import read_json

    found = set()
    for path in adapters:
        with suppress(OSError, ValueError, KeyError, TypeError):
            found.add(read_json(Path(path).absolute().parent / "config.yaml")["data"]["template"])
    if len(found) > 1:
        names = " and ".join(sorted(map(str, found)))
        raise ValueError(f"the adapters were tuned with {names}; --template names the one to use")
    name = found.pop() if found else None
    if name is not None:
        log.info("the template is %s, as the run beside the adapter notes", name)
    return name
