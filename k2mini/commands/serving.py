"""The command `serve`."""

from __future__ import annotations

import argparse
import logging
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from k2mini.commands.common import TEMPLATE_HELP, drafting, tuned_in
from k2mini.config import QUANTIZE_NAMES
from k2mini.data.chats import CHAT_TEMPLATES, open_template
from k2mini.data.prompts import TEMPLATES

if TYPE_CHECKING:
    from k2mini.data.prompts import AnyTemplate
    from k2mini.inference.engine import Engine
    from k2mini.serving.service import Service
    from k2mini.weights.model_directory import ModelDirectory

log = logging.getLogger("k2mini.commands")

DEMO = Path("runs/demo")
BASE = DEMO / "base"  # which learnt no geoscience: what the demo began with


def serve_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `serve`."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", metavar="DIR", help="a Hugging Face directory, or an id (extra: hub)")
    which.add_argument("--demo", action="store_true", help=f"the models of `k2mini demo`, in {DEMO}")
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="NAME=DIR", help="a LoRA adapter, by name; may be repeated"
    )
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="0: one that is free (default: 8000)")
    parser.add_argument(
        "--slots",
        type=int,
        default=4,
        metavar="N",
        help="requests at a time, each with all of the context (default: 4)",
    )
    parser.add_argument("--max-tokens", type=int, metavar="N", help="of an answer (default: what the context leaves)")
    parser.add_argument("--queue", type=int, default=64, metavar="N", help="requests that may wait (default: 64)")
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="keys, a line each, of those who may ask")
    parser.add_argument(
        "--cors", action="append", default=[], metavar="ORIGIN", help="a site whose pages may ask; may be repeated"
    )
    parser.add_argument("--template", metavar="NAME", help=f"of chats: {TEMPLATE_HELP} (default: the run's)")
    parser.add_argument(
        "--quantize", choices=QUANTIZE_NAMES, help="keep the blocks' matrices in 8 bits, or 4 (default: no)"
    )
    parser.add_argument("--quantize-head", action="store_true", help="the vocabulary projection, too")
    parser.add_argument("--compile", action="store_true", help="compile decoding; on a CPU it answers meanwhile")
    parser.set_defaults(run=run_serve)


def run_serve(options: argparse.Namespace) -> None:
    """Serve until a signal; what costs nothing is checked before the model is loaded."""
    from k2mini.files import read_text
    from k2mini.serving.app import LOOPBACK, Access, App
    from k2mini.serving.server import open_socket, serve
    from k2mini.weights.adapter import checked_adapter
    from k2mini.weights.model_directory import ModelDirectory, model_directory

    for name in ("slots", "queue", "max_tokens"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    pairs = [word.partition("=")[::2] for word in options.adapter]
    if options.demo:
        options.model = str(DEMO / "pretrain" / "model")
        pairs[:0] = [(stage, str(DEMO / stage / "adapter")) for stage in ("stage1", "stage2")]
        if missing := [path for path in (BASE, options.model, *dict(pairs).values()) if not Path(path).exists()]:
            raise ValueError(f"there is no {missing[0]}; `k2mini demo` makes it, in minutes")
    adapters = {name: model_directory(path) for name, path in pairs}
    if not all(name and path for name, path in pairs) or len(adapters) < len(pairs):
        raise ValueError(f"--adapter takes NAME=DIR, each name once, not {' '.join(options.adapter)}")
    keys = [key.encode() for key in read_text(options.api_key_file).split()] if options.api_key_file else []
    if options.api_key_file and not keys:
        raise ValueError(f"{options.api_key_file} holds no key")
    directory = ModelDirectory(options.model)
    directory.require_model()
    tokenizer = directory.require_tokenizer()
    own = directory.path.resolve().name if Path(options.model).is_dir() else options.model
    bases = [BASE.name, "pretrain"] if options.demo else [own]
    if taken := {*bases} & {*adapters}:
        raise ValueError(f"--adapter {taken.pop()} has the name of a model")
    for path in adapters.values():
        checked_adapter(path, directory, stacked=True)
    template = open_template(options.template or tuned_in(*adapters.values()), directory.path, tokenizer)
    local = options.host in LOOPBACK
    if not local and not keys:
        log.warning("whoever reaches %s may ask: no --api-key-file FILE says whose keys are good", options.host)
    listening = open_socket(options.host, options.port)
    host, port = listening.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def ready(service: Service) -> None:
        served, slots = service.served, options.slots
        room = f"{slots} slot{'s' * (slots > 1)}, each of {served.capacity:,} tokens for a prompt and its answer"
        print(f"{address} serves {', '.join(served.models)}: {room}", flush=True)
        log.info("chats are asked in the template %s", template.name)

    log.info("%s is open; it answers once %s is loaded", address, options.model)
    app = App(Access(keys, options.cors, LOOPBACK if local and not keys else ()))
    serve(app, listening, partial(_load, options, directory, bases, adapters, template), ready)


def _templates(directory: ModelDirectory, default: AnyTemplate) -> dict[str, AnyTemplate]:
    """What a request may name: all that are built in, and the model's own where it can be had."""
    found, tokenizer = {**TEMPLATES, default.name: default}, directory.require_tokenizer()
    for name in (*CHAT_TEMPLATES, "own"):
        with suppress(ValueError):  # there is none, or it wants the extra
            found.setdefault(name, open_template(name, directory.path, tokenizer))
    return found


def _load(
    options: argparse.Namespace,
    directory: ModelDirectory,
    bases: list[str],
    adapters: dict[str, Path],
    template: AnyTemplate,
) -> Service:
    """The model with its adapters, and of the demo what it began with."""
    from k2mini.serving.asked import Served
    from k2mini.serving.fields import MOST_ROWS
    from k2mini.serving.service import Service
    from k2mini.weights.model_directory import ModelDirectory

    engine = _engine(options, directory, adapters)
    others = {BASE.name: _engine(options, ModelDirectory(str(BASE)), {})} if options.demo else {}
    models = {**dict.fromkeys(bases), **{name: name for name in adapters}}
    told = (directory.require_tokenizer(), models, template.name, engine.capacity, options.max_tokens, options.seed)
    rows = min(MOST_ROWS, options.slots + options.queue)
    return Service(engine, Served(*told, rows, _templates(directory, template)), others)


def _engine(options: argparse.Namespace, directory: ModelDirectory, adapters: dict[str, Path]) -> Engine:
    """An engine whose slots are as long as the model's context, or as memory allows."""
    from k2mini.build import free_memory, open_model
    from k2mini.inference.compile import compile_behind, compile_decoding
    from k2mini.inference.engine import Engine
    from k2mini.nn.slots import token_bytes
    from k2mini.weights.adapter import load_adapters

    wanted = {name: getattr(options, name) for name in ("dtype", "quantize", "quantize_head")}
    drafted = options.speculate or options.draft_model
    draft = drafting(options, directory.require_tokenizer()) if drafted else None
    model, directory = open_model(directory, options.device, options.threads, **wanted)
    beside = draft(model) if draft is not None else None
    config, a_token = model.config, token_bytes(model.config, model.dtype)
    a_token += token_bytes(beside.config, beside.dtype) if beside is not None else 0  # it has slots of its own
    room = 0.8 * free_memory(model.device)
    capacity = int(min(config.max_seq_len, room // (options.slots * a_token)))
    if capacity < config.max_seq_len:
        said = "memory leaves each of %d slots %d tokens of the model's %d; with fewer --slots it is more"
        log.warning(said, options.slots, capacity, config.max_seq_len)
    if options.compile:
        compile_decoding(model, rows=())
    engine = Engine(
        model,
        slots=options.slots,
        capacity=capacity,
        vocab_size=directory.require_tokenizer().vocab_size,
        queue=options.queue,
        adapters=load_adapters(model, directory, adapters),
    )
    if options.compile and model.device.type == "cpu":
        compile_behind(model, engine.cache)
    return engine
