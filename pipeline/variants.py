"""What an ablation varies: lists of named variants (YAML; shipped ones lie in `pipeline/ablations/`), grids `KEY=V1,V2`, single keys.

A list file:

```
about: what it asks
base: {objective.cross_weight: 0.0}          # of all its runs, before the user's own overrides
variants:
  no_prompts: {claim: prompts help, group: prompts, against: base, set: {model.prompts: 0}}
```

claim: a sentence that holds if the variant is worse than its reference; group: name under which --only takes several; against: the
variant it is held against. All three may be left out.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.errors import UsageError

BASE = "base"
SHIPPED = Path(__file__).parent / "ablations"
_KEYS = ("claim", "group", "against", "set")


@dataclass(frozen=True)
class Variant:
    """One setting: its name (part of its run directories), the overrides that make it, the setting it is held against."""

    name: str
    overrides: tuple[str, ...]
    against: str = BASE
    claim: str | None = None
    group: str | None = None


@dataclass(frozen=True)
class VariantList:
    """base: overrides of all runs of the list."""

    about: str
    base: tuple[str, ...]
    variants: tuple[Variant, ...]


def read_list(name: str) -> VariantList:
    """A shipped list by its name, or one of the user's by the path of its file.

    Raises:
        UsageError: no such list, or a file that is none; names the key.
    """
    path = SHIPPED / f"{name}.yaml" if "/" not in name and not name.endswith((".yaml", ".yml")) else Path(name)
    try:
        tree = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UsageError(
            f"--variants {name}: no such list; shipped are {', '.join(shipped())}, or give a file"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    return _list(tree, str(path))


def shipped() -> list[str]:
    """Names of the lists that come with the code."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def choose(variants: Sequence[Variant], names: Sequence[str]) -> list[Variant]:
    """Those of these names or groups, with the references they need; all without names."""
    known = {variant.name for variant in variants} | {variant.group for variant in variants if variant.group}
    for name in names:
        if name not in known:
            raise UsageError(f"--only {name}: known ones are {', '.join(sorted(known))}")
    wanted = {variant.name for variant in variants if not names or variant.name in names or variant.group in names}
    wanted |= {variant.against for variant in variants if variant.name in wanted}
    return [variant for variant in variants if variant.name in wanted]


def single(override: str) -> Variant:
    """`--set KEY=VALUE`."""
    return Variant(folder(override), (override,))


def grid(overrides: Sequence[str]) -> tuple[list[str], list[Variant]]:
    """Overrides of every run, and one variant per cell but the first, where some `KEY=V1,V2` name several values.

    The first value of every key is the base's. Commas inside brackets, braces and quotes part nothing.
    """
    axes, fixed = [], []
    for override in overrides:
        key, _, text = override.partition("=")
        values = split_values(text)
        fixed.append(f"{key}={values[0]}")
        if len(values) > 1:
            if len(set(values)) < len(values):
                raise UsageError(f"{override}: a value stands twice")
            axes.append([f"{key}={value}" for value in values])
    cells = itertools.product(*axes) if axes else []
    made = []
    for cell in list(cells)[1:]:
        changed = tuple(text for text, axis in zip(cell, axes) if text != axis[0])
        made.append(Variant("-".join(folder(text) for text in changed)[:100], changed))
    return fixed, made


def split_values(text: str) -> list[str]:
    """`4,8` → [4, 8]; `[1,2],[3,4]` → [[1,2], [3,4]]."""
    values, depth, quote, start = [], 0, "", 0
    for i, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "[{(":
            depth += 1
        elif letter in ")}]":
            depth -= 1
        elif letter == "," and depth == 0:
            values.append(text[start:i].strip())
            start = i + 1
    return [*values, text[start:].strip()] if values else [text]


def folder(override: str) -> str:
    """`model.moe.top_k=2` → `top_k_2`."""
    key, _, value = override.partition("=")
    text = f"{key.rsplit('.', 1)[-1]}_{value}"
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in text)[:60]


def _list(tree: Any, where: str) -> VariantList:
    if not isinstance(tree, dict) or not isinstance(tree.get("variants"), dict) or not tree["variants"]:
        raise UsageError(f"{where}: a list of variants has `variants:` with at least one name under it")
    unknown = set(tree) - {"about", "base", "variants"}
    if unknown:
        raise UsageError(f"{where}: unknown key {min(unknown)}; known are about, base, variants")
    variants = []
    for name, entry in tree["variants"].items():
        if not isinstance(entry, dict) or set(entry) - set(_KEYS) or not isinstance(entry.get("set"), dict):
            raise UsageError(
                f"{where}: variants.{name} must be {{set: {{key.path: value}}}}, with {', '.join(_KEYS[:3])} if wished"
            )
        if folder(f"x={name}") != f"x_{name}" or name == BASE:
            raise UsageError(f"{where}: variants.{name}: a name has letters, digits, - and _ only, and is not {BASE}")
        text = {key: str(entry[key]) for key in _KEYS[:3] if key in entry}
        variants.append(
            Variant(name, _overrides(entry["set"]), text.get("against", BASE), text.get("claim"), text.get("group"))
        )
    for variant in variants:
        if variant.against not in {BASE, *tree["variants"]}:
            raise UsageError(f"{where}: variants.{variant.name}.against: there is no {variant.against}")
    return VariantList(str(tree.get("about", "")), _overrides(tree.get("base") or {}), tuple(variants))


def _overrides(settings: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(f"{key}={json.dumps(value)}" for key, value in settings.items())
