"""What must not be read by others: one redaction for everything that is written, shown or sent.

A run writes its settings into many places: batch script, resolved.json, checkpoints, exports, MLflow, reports, logs. Secrets belong
into the environment and nowhere else; should one stand in a setting, a URL or an error message all the same, `redacted` takes it out.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, unquote

MASK = "***"

_NAME = r"(?:password|passwd|passphrase|pwd|secret|token|signature|credentials?|api[_-]?key|access[_-]?key(?:[_-]?id)?|secret[_-]?key|auth|sig)"
_URL = re.compile(r"(?P<scheme>\b[a-zA-Z][\w+.-]*://)(?P<rest>[^\s\"'`<>]+)")
_HOST = re.compile(r"@(?=(?:[\w.-]+|\[[0-9a-fA-F:]+\])(?::\d+)?[.:,;)\]}]*(?:[/?#,;)\]}]|$))|@(?=[/?]|$)")
_PARAMETER = re.compile(rf"(?i)([?&;]|\b)((?:[\w-]*[_-])?{_NAME}=)(?!\*\*\*)(\"[^\"]*\"|'[^']*'|[^&\s\"'#;,)\]}}]+)")
_FIELD = re.compile(
    r"(?i)([\"']?\b(?:[\w-]*[_-])?(?:password|passwd|passphrase|secret|secret[_-]?(?:access[_-]?)?key|session[_-]?token|api[_-]?key)"
    r"[\"']?\s*:\s*)(\"[^\"]+\"|'[^']+'|[^\s,}\]\"']+)"
)
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}")
_SECRET_VARIABLE = re.compile(
    r"(?i)(?:password|passwd|passphrase|secret|token|(?:api|secret|access|private|account|storage|encryption)_?key)$"
)
SHORTEST = 6  # of a variable's value that is searched for: a shorter one would also be found where it means nothing


def redacted(text: str) -> str:
    """`text` without passwords and tokens: in URLs (`user:pass@`, `:token@`, `?password=`), as `NAME=value`, as fields of YAML or
    JSON, as authorisation headers, and wherever the value of a secret variable of this process's environment stands."""
    for value in _known():
        text = text.replace(value, MASK)
    return _structural(text)


def _structural(text: str) -> str:
    """What can be told from the text alone."""
    text = _URL.sub(lambda match: match["scheme"] + _without_user(match["scheme"], match["rest"]), text)
    text = _PARAMETER.sub(rf"\1\2{MASK}", text)
    text = _FIELD.sub(lambda match: match[1] + (f'"{MASK}"' if match[2][0] in "\"'" else MASK), text)
    return _BEARER.sub(rf"\1 {MASK}", text)


def redact(tree: Any, environment: bool = True) -> Any:
    """`redacted` for every value that is a text in a tree of dicts and lists; keys and other values as they are.

    environment: look for the values of secret variables, too; without it the result depends on the tree alone.
    """
    if isinstance(tree, str):
        scheme, separator, rest = tree.partition(
            "://"
        )  # one URL may hold quotes and spaces, of which `redacted` ends a URL
        is_url = separator and scheme.replace("+", "").isalnum()
        text = f"{scheme}://{_without_user(scheme, rest)}" if is_url else tree
        return redacted(text) if environment else _structural(text)
    if isinstance(tree, Mapping):
        return {key: redact(value, environment) for key, value in tree.items()}
    return [redact(value, environment) for value in tree] if isinstance(tree, list | tuple) else tree


def holds_secret(text: str) -> bool:
    """Whether `redacted` takes something out, or has done so."""
    return MASK in text or redacted(text) != text


def _without_user(scheme: str, rest: str) -> str:
    """Masks the password before the last `@` that a host can follow. A password may hold `/`, `:`, `?` and `@` itself, so that rather
    too much is taken than too little."""
    places = [match.start() for match in _HOST.finditer(rest)]
    if not places:
        return rest
    user, host = rest[: places[-1]], rest[places[-1] :]
    name, colon, _ = user.partition(":")
    if colon and "/" not in name:
        return f"{name}:{MASK}{host}"
    if "/" in user or not scheme.lower().startswith(
        ("http", "git", "ftp", "ssh")
    ):  # a path with an @; a bare user name
        return rest
    return f"{MASK}{host}"


def _known() -> list[str]:
    """Values of this process's secret variables, the longest first."""
    found = {value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name) and len(value) >= SHORTEST}
    for name, value in os.environ.items():
        if name.endswith(("_URI", "_URL", "_DSN")) and "://" in value:
            user, at, _ = value.partition("://")[2].rpartition("@")
            password = user.partition(":")[2]
            if at and len(password) >= SHORTEST:
                found.add(password)
    secrets = (value for value in found if value != MASK and not (value.startswith("/") and os.path.exists(value)))
    return sorted({form for value in secrets for form in _forms(value)}, key=len, reverse=True)


@functools.cache
def _forms(value: str) -> tuple[str, ...]:
    """How a secret may stand in a text: as it is, in a URL, in JSON, and as a client decodes it for its own messages."""
    forms = {value, unquote(value), quote(value, safe=""), quote(value), json.dumps(value)[1:-1]}
    return tuple(form for form in forms if len(form) >= SHORTEST)
