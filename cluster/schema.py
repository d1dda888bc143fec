"""Config dataclasses as a JSON schema for editors (completion, types, descriptions while typing), and as text for `--explain`."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import re
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal, Union

from cluster.config import flatten, layers, load, to_dict
from cluster.errors import UsageError

_SCALARS = {int: "integer", float: "number", str: "string", bool: "boolean"}
_WORDS = {int: "whole number", float: "number", str: "text", bool: "true or false"}


def json_schema(cls: type, title: str) -> dict[str, Any]:
    """Draft 7, as editors read it. No key is required: `base:` may bring it."""
    tree = _section(cls)
    tree["properties"] = {"base": {"type": "string", "description": "another config file, beside this one: its keys, unless given here"},
                          **tree["properties"]}  # fmt: skip
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": title, **tree}


def explain(cls: type, path: str, overrides: Sequence[str], key: str) -> str:
    """What a key is, may be, is by default, is in this config and where that comes from; of a section, all its keys.

    Raises:
        UsageError: no such key (names the nearest), or a config that cannot be loaded.
    """
    owner, name, hint = _find(cls, key)
    values = flatten(to_dict(load(cls, path, overrides)))
    if dataclasses.is_dataclass(hint):
        lines = [f"{key}: {inspect.cleandoc(hint.__doc__ or '')}", ""]
        for field in dataclasses.fields(hint):
            inner = f"{key}.{field.name}"
            lines.append(f"  {inner} = {_value(values, inner)}")
        return "\n".join(lines)
    field = next(field for field in dataclasses.fields(owner) if field.name == name)
    text = describe(owner, name) or f"(no words of its own; {owner.__name__}: {inspect.cleandoc(owner.__doc__ or '')})"
    return "\n".join([
        f"{key}: {words(typing.get_type_hints(owner)[name])}", f"  {text}", f"  default: {_default(field)}",
        f"  here: {_value(values, key)}, from {_source(path, overrides, key)}",
    ])  # fmt: skip


def describe(cls: type, name: str) -> str:
    """The sentences of a config class's docstring that speak of a key; empty without one."""
    doc = " ".join(inspect.cleandoc(cls.__doc__ or "").split())
    sentences = re.split(r"(?<=[.;]) (?=[\w`])", doc)
    about = [text for text in sentences if re.search(rf"(?<![\w.`]){re.escape(name)}(?=[:,/ (]|$)", text)]
    return " ".join(about)


def words(hint: Any) -> str:
    """A type as a user would say it: `whole number`, `none, mild or dino`, `list of numbers`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin in (Union, types.UnionType):
        return " or ".join("nothing (null)" if arg is type(None) else words(arg) for arg in args)
    if origin is tuple:
        return f"list of {words(args[0])}" if args[-1] is Ellipsis else f"list [{', '.join(map(words, args))}]"
    if origin is dict:
        return f"section: name to {words(args[1])}"
    return "section" if dataclasses.is_dataclass(hint) else _WORDS.get(hint, "anything")


def _section(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    properties = {}
    for field in dataclasses.fields(cls):
        if field.init:
            properties[field.name] = _property(hints[field.name])
            text = describe(cls, field.name)
            if text:
                properties[field.name]["description"] = text
            if field.default is not dataclasses.MISSING and not dataclasses.is_dataclass(hints[field.name]):
                properties[field.name]["default"] = json.loads(json.dumps(field.default))
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _property(hint: Any) -> dict[str, Any]:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _section(typing.cast(type, hint))
    if origin is Literal:
        return {"enum": list(args)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [{"type": "null"} if arg is type(None) else _property(arg) for arg in args]}
    if origin is tuple:
        if args[-1] is Ellipsis:
            return {"type": "array", "items": _property(args[0])}
        return {
            "type": "array",
            "items": [_property(arg) for arg in args],
            "minItems": len(args),
            "maxItems": len(args),
        }
    if origin is dict:
        return {"type": "object", "additionalProperties": _property(args[1])}
    return {"type": _SCALARS[hint]} if hint in _SCALARS else {}


def _find(cls: type, key: str) -> tuple[type, str, Any]:
    """(class that owns the key, its name there, its type)."""
    owner, hint, done = cls, typing.cast(Any, cls), ""
    for name in key.split("."):
        fields = [field.name for field in dataclasses.fields(hint)] if dataclasses.is_dataclass(hint) else []
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1, cutoff=0.0)
            more = f"; nearest is {done}{near[0]}" if near else f"; {done.rstrip('.')} is no section"
            raise UsageError(f"--explain: there is no key {key}{more}")
        owner, hint, done = hint, typing.get_type_hints(hint)[name], f"{done}{name}."
    return owner, key.rsplit(".", 1)[-1], hint


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return json.dumps(field.default)
    if field.default_factory is not dataclasses.MISSING:
        made = field.default_factory()
        return json.dumps(to_dict(made) if dataclasses.is_dataclass(made) else made)
    return "none, it must be given"


def _value(values: dict[str, Any], key: str) -> str:
    inside = {name.removeprefix(f"{key}."): value for name, value in values.items() if name.startswith(f"{key}.")}
    return json.dumps(values.get(key, inside))


def _source(path: str, overrides: Sequence[str], key: str) -> str:
    """The last place that sets the key, or a section that holds it."""
    for override in reversed(overrides):
        name = override.partition("=")[0]
        if f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}."):
            return f"override {override}"
    for file, tree in reversed(layers(path)):
        node: Any = tree
        for part in key.split("."):
            node = node[part] if isinstance(node, dict) and part in node else dataclasses.MISSING
            if node is dataclasses.MISSING:
                break
        else:
            return file
    return "the default"
