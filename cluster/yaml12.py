"""YAML as its version 1.2 reads it: `no` is a word, `0123` no octal number, `1e-4` a number, `2024-01-01` no date.

PyYAML follows version 1.1 and decides the type before anybody knows what is wanted. Here a scalar without quotes stays what was typed
(`Plain`) until a field's type decides.
"""

from __future__ import annotations

from typing import Any

import yaml

from cluster.errors import UsageError
from cluster.plain import Plain


class _Loader(yaml.SafeLoader):
    """Safe (no objects), without implicit types, refusing a key that stands twice."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own attribute)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise UsageError(f"line {key.start_mark.line + 1}: key {key.value} stands twice")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _scalar(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
    text = loader.construct_scalar(node)
    return Plain(text) if node.style is None else text


_Loader.add_constructor("tag:yaml.org,2002:str", _scalar)


def read(text: str) -> Any:
    """The tree of a YAML text, its unquoted scalars as `Plain`. Raises yaml.YAMLError, UsageError for a key that stands twice."""
    return yaml.load(text, Loader=_Loader)  # noqa: S506  (a SafeLoader)
