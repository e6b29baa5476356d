"""Configuration files: YAML into the dataclasses of config.py; a file with mistakes is refused with all of them."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from k2mini.config import FinetuneConfig, PretrainConfig

Config = TypeVar("Config", PretrainConfig, FinetuneConfig)


def load_config(kind: type[Config], path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file into `kind`, with `section.key=value` overrides.

    Raises ValueError with every error found, a line each: unknown keys (and the nearest right one), missing ones,
    values of the wrong type or out of range.
    """
    raw = _read(path)
    errors: list[str] = []
    for override in overrides:
        _override(raw, override, errors)
    config = _fill(kind, raw, "", errors)
    if errors:
        raise ValueError(f"{path}: " + "; ".join(errors))
    assert isinstance(config, kind)
    return config


def config_kind(path: Path) -> type[PretrainConfig] | type[FinetuneConfig]:
    """The class that a file fills: FinetuneConfig where it has `lora`, `data.template` or `data.max_seq_len`."""
    raw = _read(path)
    data = raw.get("data")
    instructions = isinstance(data, dict) and ("template" in data or "max_seq_len" in data)
    return FinetuneConfig if "lora" in raw or instructions else PretrainConfig


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no configuration file {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must hold sections such as run, model, data and train")
    return raw


def _override(raw: dict[str, Any], override: str, errors: list[str]) -> None:
    target, equals, text = override.partition("=")
    section, dot, key = target.partition(".")
    if not equals or not dot or not key:
        errors.append(f"override {override!r} is not section.key=value")
        return
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        errors.append(f"override {override!r}: the value is not valid YAML")
        return
    content = raw.setdefault(section, {})
    if isinstance(content, dict):
        content[key] = value


def _fill(kind: type, raw: Any, prefix: str, errors: list[str]) -> Any:
    """`raw` as the dataclass `kind`; None where it has mistakes, each of which is added to `errors`."""
    if not isinstance(raw, dict):
        errors.append(f"{prefix.rstrip('.')} must be a section with keys, not {raw!r}")
        return None
    known = {f.name: f for f in fields(kind)}
    before = len(errors)
    for key in raw:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; known are {', '.join(known)}"
            errors.append(f"unknown key {prefix}{key}{hint}")
    hints = typing.get_type_hints(kind)
    values = {}
    for name, spec in known.items():
        if name in raw:
            if is_dataclass(hints[name]):
                values[name] = _fill(hints[name], raw[name], f"{name}.", errors)
            else:
                values[name] = _value(hints[name], raw[name], prefix + name, errors)
        elif spec.default is MISSING and spec.default_factory is MISSING:
            errors.append(f"{prefix}{name} is missing")
    if len(errors) > before:
        return None
    try:
        return kind(**values)
    except ValueError as error:
        errors.append(str(error))
        return None


def _value(kind: Any, value: Any, name: str, errors: list[str]) -> Any:
    """`value`, checked to be of the type `kind`: str, int, float, bool, Literal, list[str], or one of these or None."""
    union = typing.get_origin(kind) in (types.UnionType, typing.Union)
    options = typing.get_args(kind) if union else (kind,)
    if value is None and type(None) in options:
        return None
    (plain,) = [option for option in options if option is not type(None)]
    if typing.get_origin(plain) is Literal:
        choices = typing.get_args(plain)
        if value not in choices:
            errors.append(f"{name} must be one of {', '.join(map(str, choices))}, not {value!r}")
        return value
    if typing.get_origin(plain) is list:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            errors.append(f"{name} must be a list of words, not {value!r}")
        return value
    if plain is float and isinstance(value, str):
        try:  # YAML 1.1 reads 1e-5 as text
            return float(value)
        except ValueError:
            pass
    if plain is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, plain) or (isinstance(value, bool) and plain is not bool):
        word = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}[plain]
        errors.append(f"{name} must be {word}, not {value!r}")
    return value
