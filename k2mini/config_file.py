"""Configuration files: YAML into the dataclasses of config.py; a file with mistakes is refused with all of them."""

from __future__ import annotations

import difflib
import inspect
import json
import logging
import math
import re
import types
import typing
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from k2mini.config import CorpusSection, FinetuneConfig, InstructionSection, PretrainConfig, RunConfig
from k2mini.errors import short

log = logging.getLogger(__name__)

Config = TypeVar("Config", bound=PretrainConfig | FinetuneConfig)
Filled = TypeVar("Filled")  # one of these, or what a task of `eval` says


MOST = 2**17  # bytes of a file

# What PyYAML raises: for the tags of numbers, dates and the like it is whatever their conversion does.
_INVALID = (yaml.YAMLError, ValueError, ArithmeticError, LookupError, AttributeError, TypeError)


class _Loader(yaml.SafeLoader):
    """YAML in which no key stands twice in a section, and `<<` merges nothing: a small file could make a huge one."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.constructor.ConstructorError(None, None, "<< is not supported; repeat the keys", node.start_mark)
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                raise yaml.constructor.ConstructorError(None, None, f"{short(key)} stands twice", node.start_mark)


def load_config(kind: type[Filled], path: Path, overrides: Sequence[str] = ()) -> Filled:
    """Read a YAML file into `kind`, with `section.key=value` overrides.

    Raises ValueError with every error found, a line each: unknown keys (and the nearest right one), missing ones,
    values of the wrong type or out of range.
    """
    raw = _read(path)
    for name, number in Counter(override.partition("=")[0] for override in overrides).items():
        if number > 1:
            log.warning("%s is given %d times: the last one holds", name[:99], number)
    errors: list[str] = []
    for override in overrides:
        _override(raw, override, errors)
    try:
        config = _fill(kind, raw, "", errors)
    except ValueError as error:  # of a number of thousands of digits, which can't be printed
        raise ValueError(f"{path}: {error}") from None
    if errors:
        more = [f"and {len(errors) - 30} more"] if len(errors) > 30 else []
        raise ValueError(f"{path}: " + "; ".join(errors[:30] + more))
    assert isinstance(config, kind)
    return config


def config_kind(path: Path) -> type[PretrainConfig] | type[FinetuneConfig]:
    """The class that a file fills, by the keys of `data` that only one has; without such, FinetuneConfig has `lora`."""
    raw = _read(path)
    corpus, instructions = ({spec.name for spec in fields(kind)} for kind in (CorpusSection, InstructionSection))
    given = set(data) if isinstance(data := raw.get("data"), dict) else set()
    tuned = given & instructions - corpus or ("lora" in raw and not given & corpus - instructions)
    return FinetuneConfig if tuned else PretrainConfig


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:  # a pipe will do
            content = file.read(MOST + 1)
    except FileNotFoundError:
        raise ValueError(f"there is no configuration file {path}") from None
    if len(content) > MOST:
        raise ValueError(f"{path} is no configuration: it has more than {MOST:,} bytes")
    try:
        raw = yaml.load(content.decode("utf-8-sig"), _Loader)
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
    except _INVALID as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must hold sections such as run, model, data and train, or of a task its keys")
    return raw


def _override(raw: dict[str, Any], override: str, errors: list[str]) -> None:
    target, equals, text = override.partition("=")
    section, dot, key = target.partition(".")
    if target and text == "null" and not dot:  # such as lora=null
        raw[target] = None
        return
    if not equals or not dot or not key:
        errors.append(f"override {short(override)} is not section.key=value")
        return
    try:
        value = yaml.load(text, _Loader)
    except (*_INVALID, RecursionError):
        errors.append(f"override {short(override)}: the value is not valid YAML")
        return
    content = raw[section] = {} if raw.get(section) is None else raw[section]
    if isinstance(content, dict):
        content[key] = value


def _fill(kind: type, raw: Any, prefix: str, errors: list[str]) -> Any:
    """`raw` as the dataclass `kind`; None where it has mistakes, each of which is added to `errors`."""
    if not isinstance(raw, dict):
        errors.append(f"{prefix.rstrip('.')} must be a section with keys, not {short(raw)}")
        return None
    known = {f.name: f for f in fields(kind)}
    before = len(errors)
    for key in raw:
        if key not in known:
            key = key if isinstance(key, str) else short(key)
            near = difflib.get_close_matches(key[:99], known, n=1, cutoff=0.5)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; known are {', '.join(known)}"
            errors.append(f"unknown key {prefix}{key[:99]}{hint}")
    hints = typing.get_type_hints(kind)
    values = {}
    for name, spec in known.items():
        if name in raw:
            if (section := _section(hints[name])) is None:
                values[name] = _value(hints[name], raw[name], prefix + name, errors)
            elif raw[name] is None and section is not hints[name]:
                values[name] = None
            else:
                values[name] = _fill(section, raw[name], f"{name}.", errors)
        elif spec.default is MISSING and spec.default_factory is MISSING:
            errors.append(f"{prefix}{name} is missing")
    if len(errors) > before:
        return None
    try:
        return kind(**values)
    except ValueError as error:
        errors.append(str(error))
        return None


def _section(kind: Any) -> Any:
    """The dataclass that a field holds, or may hold; None: it holds a value."""
    return next(filter(is_dataclass, (kind, *typing.get_args(kind))), None)


def _value(kind: Any, value: Any, name: str, errors: list[str]) -> Any:
    """`value`, checked to be of the type `kind`: str, int, float, bool, Literal, a list; or None, or a word."""
    union = typing.get_origin(kind) in (types.UnionType, typing.Union)
    options = typing.get_args(kind) if union else (kind,)
    if value is None and type(None) in options:
        return None
    plain, *words = [option for option in options if option is not type(None)]
    if any(value in typing.get_args(word) for word in words):  # such as 'all', in the place of a list
        return value
    if isinstance(value, int) and abs(value) >= 2**63:
        errors.append(f"{name} must be below 2**63")
        return None
    if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
        errors.append(f"{name} has a character that no text or path may have: {short(value)}")
    if typing.get_origin(plain) is Literal:
        choices = typing.get_args(plain)
        if value not in choices:
            errors.append(f"{name} must be one of {', '.join(map(str, choices))}, not {short(value)}")
        return value
    if typing.get_origin(plain) is dict:
        known = typing.get_args(typing.get_args(plain)[0])
        if not isinstance(value, dict) or not all(key in known and isinstance(value[key], str) for key in value):
            errors.append(f"{name} must be {_kind(plain)}, each a text, not {short(value)}")
        return value
    if typing.get_origin(plain) is list:
        if isinstance(value, list) and (item := _section(plain)):
            return [_fill(item, entry, f"{name}[{place}].", errors) for place, entry in enumerate(value)]
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            errors.append(f"{name} must be {_kind(plain)}, not {short(value)}")
        return value
    if plain is float and isinstance(value, str):
        with suppress(ValueError):  # YAML 1.1 reads 1e-5 as text
            value = float(value)
    if plain is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(value, float) and not math.isfinite(value) and name != "train.max_grad_norm":
        errors.append(f"{name} must be finite, not {value}")
    if not isinstance(value, plain) or (isinstance(value, bool) and plain is not bool):
        word = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}[plain]
        errors.append(f"{name} must be {word}, not {short(value)}")
    return value


def describe_keys() -> str:
    """All keys of both kinds of configuration, as Markdown: type, default, and the comment beside each in config.py."""
    lines = [
        "# Configuration keys",
        "",
        "What a file for `k2mini pretrain` or `k2mini finetune` may hold, section by section; `k2mini config --list`",
        "prints this page. On the command line `section.key=value` replaces a value, and `null` unsets it.",
    ]
    kinds = {"pretrain": typing.get_type_hints(PretrainConfig), "finetune": typing.get_type_hints(FinetuneConfig)}
    for name in dict.fromkeys(name for hints in kinds.values() for name in hints):
        sections: dict[type, list[str]] = {}
        for command, hints in kinds.items():
            if name in hints:
                sections.setdefault(_section(hints[name]), []).append(command)
        for section, commands in sections.items():
            only = f" ({commands[0]} only)" if len(commands) == 1 else ""
            lines += ["", f"## {name}{only}", "", inspect.getdoc(section) or "", ""]
            comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(section), re.MULTILINE))
            hints = typing.get_type_hints(section)
            for spec in fields(section):
                given = spec.default if spec.default_factory is MISSING else spec.default_factory()
                shown = given if given and isinstance(given, str) else json.dumps(given, default=str)
                default = "required" if given is MISSING else f"default {shown}"
                lines.append(f"- `{name}.{spec.name}` ({_kind(hints[spec.name])}; {default}): {comments[spec.name]}")
    return "\n".join(lines)


def _kind(kind: Any) -> str:
    """A field's type in words."""
    if typing.get_origin(kind) is list:
        return f"a list of {_kind(typing.get_args(kind)[0]).replace('text', 'words')}"
    if typing.get_origin(kind) is dict:
        return f"{{{', '.join(typing.get_args(typing.get_args(kind)[0]))}}}"
    if is_dataclass(kind):
        return f"{{{', '.join(spec.name for spec in fields(kind))}}}"
    words = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null"}
    if kind in words:
        return words[kind]
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(str, typing.get_args(kind)))
    return " or ".join(_kind(option) for option in typing.get_args(kind))


def check_context(config: RunConfig, max_seq_len: int) -> None:
    """Raise ValueError where samples may be longer than the model's `max_seq_len`, unless that is asked for."""
    data = config.data
    name, length = ("seq_len", data.seq_len) if isinstance(data, CorpusSection) else ("max_seq_len", data.max_seq_len)
    if length > max_seq_len and not data.exceed_context:
        raise ValueError(
            f"data.{name} is {length:,}, the context of {config.model.path} {max_seq_len:,} tokens by its config.json; "
            "shorten it, or set data.exceed_context to true"
        )


# Settings of how a step is computed, or of what is done with data that can't be used. None of them changes what a step
# computes, so they may change when a run is resumed.
_FREE = (
    "micro_batch_size",
    "val_every",
    "activation_checkpointing",
    "compile",
    "tf32",
    "on_error",
    "exceed_context",
)


def settings_of(config: RunConfig) -> dict[str, dict[str, Any]]:
    """What a run's result depends on, section by section, with whole paths to its files."""
    found: dict[str, dict[str, Any]] = {"run": {"seed": config.run.seed}}
    for name in ("model", "data", "train", "lora"):
        section = asdict(part) if (part := getattr(config, name)) is not None else {}
        sources = section.pop("sources", None)
        paths = {key: str(Path(value).resolve()) for key, value in section.items() if key.endswith("path") and value}
        found[name] = {key: value for key, value in (section | paths).items() if key not in _FREE}
        if sources:
            found[name]["sources.path"] = [str(Path(source["path"]).resolve()) for source in sources]
            found[name]["sources.weight"] = [source["weight"] for source in sources]
    for key in ("train_embeddings", "train_head"):  # false, they are left out, as in checkpoints from before them
        if not found["lora"].get(key):
            found["lora"].pop(key, None)
    return found
