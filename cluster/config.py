"""Strict typed configuration: one frozen dataclass tree, one YAML file, `key.path=value` overrides.

An unknown or ill-typed key is a `UsageError` that names its full path and the nearest valid one. Resolving is done before
anything else; `fingerprint` of the resolved tree goes to the run directory, the checkpoint and the tracker.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast

from cluster.errors import UsageError
from cluster.plain import Plain, plain
from cluster.secrets import redact

T = TypeVar("T")


def load(cls: type[T], path: str | None, overrides: Sequence[str] = ()) -> T:
    """Builds `cls` from a YAML file (none: defaults) and overrides such as `train.steps=50`; the overrides win.

    A file may name another one with `base: other.yaml`, beside it: then it holds only what differs (`layers`).

    Raises:
        UsageError: a missing or unparsable file, an unknown key, a wrong type, or a value the dataclass itself refuses.
    """
    files = layers(path) if path else []
    tree: dict[str, Any] = {}
    for _, part in files:
        tree = _merged(tree, part)
    for override in overrides:
        _apply_override(tree, override)
    below = ", ".join(Path(file).name for file, _ in files[:-1])
    return from_dict(cls, tree, where=f"{path} (base {below})" if below else path or "defaults")


def layers(path: str) -> list[tuple[str, dict[str, Any]]]:
    """(file, its own keys) of a config file and of all that it is based on, the lowest first.

    Sections are merged key by key, anything else (lists too) is replaced by the file above.

    Raises:
        UsageError: a file that is missing or no mapping, a `base` that is no file name, or a circle of files.
    """
    found: list[tuple[str, dict[str, Any]]] = []
    seen: list[Path] = []
    while True:
        if Path(path).resolve() in seen:
            raise UsageError(
                f"config file {path} is based on itself, by way of {' -> '.join(file for file, _ in found)}"
            )
        seen.append(Path(path).resolve())
        tree = _read_yaml(path)
        below = tree.pop("base", None)
        found.append((path, tree))
        if below is None:
            return found[::-1]
        if not isinstance(below, str) or not below:
            raise UsageError(f"config file {path}: base must be the name of a file, found {below!r}")
        path = str(Path(path).parent / str(below))


def _merged(tree: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(tree)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def from_dict(cls: type[T], tree: Mapping[str, Any], where: str = "config") -> T:
    """Builds the dataclass tree `cls` from nested plain dicts, strictly."""
    return cast(T, _build(cls, tree, "", where))


def to_dict(config: Any) -> dict[str, Any]:
    """The tree as plain JSON types (tuples become lists); `from_dict` of it gives an equal tree. This is the form that is kept
    and sent, so secrets are taken out of it (`cluster.secrets`)."""
    return redact(json.loads(json.dumps(dataclasses.asdict(config), allow_nan=False)), environment=False)


def check_ranges(config: Any, **rules: str) -> None:
    """Checks numbers of a config dataclass in its `__post_init__`: `check_ranges(self, steps=">= 1", betas="0..1")`. None passes;
    of a tuple or dict every value is checked.

    Raises:
        ValueError: names the field, the rule and the value.
    """
    for name, rule in rules.items():
        value = getattr(config, name)
        values = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,)
        if not all(item is None or _within(item, rule) for item in values):
            words = rule.replace("..", " to ") if ".." in rule else rule
            raise ValueError(f"{name} must be {words}, found {value}")


def _within(value: float, rule: str) -> bool:
    if ".." in rule:
        low, high = rule.split("..")
        return float(low) <= value <= float(high)
    sign, limit = rule.split()
    return value >= float(limit) if sign == ">=" else value > float(limit)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` → `{"a.b": 1}`; the form in which settings are tracked and compared."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def fingerprint(config: Any) -> str:
    """First 16 hex digits of the sha256 of the canonical JSON of a config tree (dataclass or dict)."""
    tree = to_dict(config) if dataclasses.is_dataclass(config) else config
    return hashlib.sha256(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


def _read_yaml(path: str) -> dict[str, Any]:
    import yaml  # here: a tree that is no file, such as an exported model's, needs no YAML library

    from cluster.yaml12 import read

    try:
        tree = read(Path(path).read_text())
    except FileNotFoundError:
        raise UsageError(
            f"config file {path} does not exist; shipped ones lie under data_prep/runs and pipeline/runs"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"config file {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"config file {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None or (isinstance(tree, Plain) and tree.value is None):
        return {}
    if not isinstance(tree, dict):
        raise UsageError(f"config file {path} must hold a mapping of keys at the top, found {type(tree).__name__}")
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UsageError(f"override {override!r} is not of the form key.path=value")
    import yaml

    from cluster.yaml12 import read

    try:
        value = read(text) if text else ""
    except yaml.YAMLError:
        value = text
    except UsageError as error:
        raise UsageError(f"override {override!r}: {error}") from None
    node = tree
    *parents, leaf = key.split(".")
    for parent in parents:
        if node.get(parent) is None or (isinstance(node[parent], Plain) and node[parent].value is None):
            node[parent] = {}  # a section that stands there without keys
        child = node[parent]
        if not isinstance(child, dict):
            raise UsageError(f"override {override!r}: {parent} holds a value, not a section")
        node = child
    node[leaf] = value


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """Field types of a config class, resolved once: resolving annotations is the slow part of building a tree."""
    return typing.get_type_hints(cls)


def _build(cls: Any, tree: Any, path: str, where: str) -> Any:
    if tree is None or (isinstance(tree, Plain) and tree.value is None):
        tree = {}
    if not isinstance(tree, Mapping):
        raise UsageError(f"{where}: {path or 'the top level'} must be a section of keys, found {tree!r}")
    hints = _hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in tree:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.0)
            hint = f"; nearest valid key is {path}{near[0]}" if near else ""
            raise UsageError(f"{where}: unknown key {path}{key}{hint}")
    values = {key: _convert(hints[key], value, f"{path}{key}", where) for key, value in tree.items()}
    missing = [
        name for name, field in fields.items()
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]  # fmt: skip
    if missing:
        raise UsageError(
            f"{where}: key {path}{missing[0]} is required and missing; add it or pass {path}{missing[0]}=…"
        )
    try:
        return cls(**values)
    except ValueError as error:  # a dataclass checks its own values in __post_init__
        raise UsageError(f"{where}: {path.rstrip('.') or 'config'}: {error}") from None


def _convert(hint: Any, value: Any, path: str, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, Plain) and hint is not str and origin not in (Union, types.UnionType, Literal):
        value = value.value
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, f"{path}.", where)
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, path, where)
    if origin is Literal:
        if isinstance(value, Plain):
            value = str(value) if str(value) in args else value.value
        if value not in args:
            near = difflib.get_close_matches(str(value), [str(a) for a in args], n=1, cutoff=0.0)
            raise UsageError(
                f"{where}: {path}={value!r} is not one of {', '.join(map(str, args))}; nearest is {near[0]}"
            )
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _type_error(where, path, "a list", value)
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_convert(args[0], item, f"{path}[{i}]", where) for i, item in enumerate(value))
        if len(value) != len(args):
            raise _type_error(where, path, f"a list of {len(args)}", value)
        return tuple(_convert(a, item, f"{path}[{i}]", where) for i, (a, item) in enumerate(zip(args, value)))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _type_error(where, path, "a section of keys", value)
        return {_convert(args[0], k, path, where): _convert(args[1], v, f"{path}.{k}", where) for k, v in value.items()}
    return _convert_scalar(hint, value, path, where)


def _convert_union(args: Sequence[Any], value: Any, path: str, where: str) -> Any:
    if type(None) in args and (value is None or (isinstance(value, Plain) and value.value is None)):
        return None
    options = [a for a in args if a is not type(None)]
    for option in options[:-1]:
        try:
            return _convert(option, value, path, where)
        except UsageError:
            continue
    return _convert(options[-1], value, path, where)


def _convert_scalar(hint: Any, value: Any, path: str, where: str) -> Any:
    if hint is Any:
        return plain(value)
    if hint is str and isinstance(value, Plain) and value.value is not None:
        return str(value)  # as typed: 0123 is no number here, and no is no boolean
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            raise _type_error(where, path, "a number", value) from None
        if not math.isfinite(number):
            raise UsageError(f"{where}: {path}={value!r} must be a finite number")
        return number
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is str and isinstance(value, str):
        return value
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if hint is bool and isinstance(value, bool):
        return value
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    raise _type_error(where, path, names.get(hint, str(hint)), value)


def _type_error(where: str, path: str, wanted: str, value: Any) -> UsageError:
    return UsageError(f"{where}: {path} must be {wanted}, found {value!r} ({type(value).__name__})")
