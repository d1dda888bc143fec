"""A scalar as somebody typed it without quotes, and what YAML 1.2 makes of it. Without a YAML library: `cluster.yaml12` reads files."""

from __future__ import annotations

import re
from typing import Any

_INT = re.compile(r"[-+]?[0-9]+$")
_BASED = re.compile(r"0o[0-7]+$|0x[0-9a-fA-F]+$")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")
_SPECIAL = {
    **dict.fromkeys(("null", "Null", "NULL", "~", ""), None),
    **dict.fromkeys(("true", "True", "TRUE"), True), **dict.fromkeys(("false", "False", "FALSE"), False),
    **{sign + name: float(sign + "inf") for sign in ("", "+", "-") for name in (".inf", ".Inf", ".INF")},
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}  # fmt: skip


class Plain(str):
    """A scalar without quotes, as typed. `value` is what YAML 1.2 (core schema) makes of it."""

    @property
    def value(self) -> Any:
        text = str(self)
        if text in _SPECIAL:
            return _SPECIAL[text]
        if len(text) > 400:  # no number; and the patterns below look at every character
            return text
        if _BASED.match(text):
            return int(text, 0)
        if _INT.match(text):
            return int(text)
        return float(text) if _FLOAT.match(text) else text


def plain(tree: Any) -> Any:
    """The tree with every `Plain` resolved, for where no field type decides."""
    if isinstance(tree, Plain):
        return tree.value
    if isinstance(tree, dict):
        return {str(key): plain(value) for key, value in tree.items()}
    return [plain(value) for value in tree] if isinstance(tree, list) else tree
