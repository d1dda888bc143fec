"""One self-contained HTML file: style, scripts, data and pictures inside, and a policy that forbids every request."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Okabe and Ito's colours: told apart with any colour vision
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")
FORBID = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_HERE = Path(__file__).parent
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:75rem;padding:0 1rem;color:#1b1b1b;background:#fff}
h1{font-size:1.5rem} h2{font-size:1.15rem;margin-top:2rem} table{border-collapse:collapse;margin:.5rem 0}
td,th{border:1px solid #ccc;padding:.25rem .6rem;text-align:left;vertical-align:top;overflow-wrap:anywhere}
td.n{text-align:right;font-variant-numeric:tabular-nums} .bad{border-left:5px solid #b00020;background:#fdecee;padding:.6rem 1rem}
.good{border-left:5px solid #1b7f3b;background:#eaf6ee;padding:.6rem 1rem} .plots{display:flex;flex-wrap:wrap;gap:1rem}
figure{margin:0} figcaption{font-weight:600;font-size:.9rem} .key{display:inline-block;width:.9em;height:.9em;margin-right:.3em}
img{max-width:100%} summary{cursor:pointer;font-weight:600;margin:.6rem 0} pre{background:#f5f5f5;padding:.6rem;overflow-x:auto}
.controls{display:flex;flex-wrap:wrap;gap:.4rem 1.2rem;align-items:center;margin:.6rem 0} .controls label{white-space:nowrap}
.u-legend .aux{display:none} .u-legend{font-size:.75rem;text-align:left} .u-legend .u-marker{width:.8em;height:.8em}
"""


def page(title: str, parts: Sequence[str], scripts: Sequence[str] = ()) -> str:
    """The whole document. parts: HTML; scripts: JavaScript, run in order at the end."""
    head = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{FORBID}">'
        f'<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>"
    )
    return "\n".join([head, *parts, *(f"<script>{script}</script>" for script in scripts), "</body></html>"])


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numeric: bool = True) -> str:
    """A table of texts; numeric: columns after the first are aligned right."""
    cells = "".join(f"<th>{html.escape(text)}</th>" for text in head)
    kind = ' class="n"' if numeric else ""
    body = "".join(
        "<tr>" + "".join(f"<td{kind if i else ''}>{html.escape(cell)}</td>" for i, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"


def picture(data: bytes, caption: str) -> str:
    """A PNG or JPEG inside the page, its caption also what is read aloud."""
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    text = html.escape(caption)
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return f'<figure><img src="{source}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def embedded(name: str, tree: Any) -> str:
    """Data for a script, as JSON under an id. No text in it can end the element: `<` is written as its escape."""
    text = json.dumps(tree, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'


def own_file(name: str) -> str:
    """A script or style sheet that lies beside this module."""
    return (_HERE / name).read_text(encoding="utf-8")
