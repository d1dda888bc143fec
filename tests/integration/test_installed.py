"""`pip install .` in an environment of torch, numpy and safetensors only: it loads an export, embeds a site, and its features are those
of the checkout.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from model.config import ModelConfig, MoEConfig
from model.pretrained import embed, load_backbone, save_backbone
from model.skysense import SkySense
from tests.data_folder import REPOSITORY

pytestmark = pytest.mark.integration
ALLOWED = ("torch", "numpy", "safetensors")
SCRIPT = """
import json, sys
import geoloom, numpy as np, torch
model = geoloom.load(sys.argv[1])
site = np.load(sys.argv[2])
np.savez(sys.argv[3], **geoloom.embed(model, {"s2": site["s2"], "s1": site["s1"]}, doy={"s2": site["doy"]}))
maps = geoloom.encoder(sys.argv[1], "s2", frozen=True)(torch.from_numpy(site["s2"][:1]))
print(json.dumps({"maps": [list(m.shape) for m in maps], "where": geoloom.__file__,
                  "ours": [name for name in sys.modules if name.split(".")[0] in ("cluster", "data_prep", "model", "pipeline", "yaml")]}))
"""


def link_environment(folder: Path) -> list[str]:
    """Links to what an environment of ALLOWED alone would hold: those distributions and what they require, from this environment."""
    waiting, found = list(ALLOWED), []
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform
        found.append(name)
        for required in distribution.requires or ():
            if "extra ==" not in required:
                waiting.append(re.match(r"[\w.-]+", required)[0])  # type: ignore[index]
        for top in {file.parts[0] for file in distribution.files or () if ".." not in file.parts}:
            source, target = Path(str(distribution.locate_file(top))), folder / top
            if (
                source.is_dir() and target.is_symlink() and top != "__pycache__"
            ):  # shared by several (namespace `nvidia`)
                continue
            if source.exists() and not target.exists():
                target.symlink_to(source)
    return found


def test_the_reader_needs_three_packages(tmp_path: Path) -> None:
    source = tmp_path / "source"  # pip leaves build/ beside what it builds
    for name in ("cluster", "data_prep", "model"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source / name)
    target, others = tmp_path / "installed", tmp_path / "site-packages"
    others.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
         "--disable-pip-version-check", "--target", str(target), str(source)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in target.iterdir() if not path.name.endswith(".dist-info")) == ["geoloom"]
    environment = link_environment(others)
    assert set(ALLOWED) <= set(environment)
    assert not {"pyyaml", "deepspeed", "rasterio", "scipy", "mlflow"} & set(environment)
    wanted = [re.match(r"[\w-]+", line)[0] for line in importlib.metadata.Distribution.at(next(target.glob("*.dist-info"))).requires or ()]  # type: ignore[index]  # fmt: skip
    assert sorted(wanted) == sorted(ALLOWED)

    cfg = ModelConfig(size="debug", moe=MoEConfig(experts=4, blocks=1))
    torch.manual_seed(0)
    network = SkySense(cfg)
    statistics = {
        name: {"mean": [1.0] * bands, "std": [2.0] * bands} for name, bands in (("hr", 3), ("s2", 10), ("s1", 2))
    }
    save_backbone(str(tmp_path / "export.safetensors"), network.state_dict(), cfg, statistics, {"step": 1})
    rng = np.random.default_rng(0)
    site = {
        "s2": rng.uniform(1, 4000, (2, 10, 8, 8)).astype(np.float32),
        "s1": rng.normal(-12, 3, (1, 2, 8, 8)).astype(np.float32),
        "doy": np.array([30, 200]),
    }
    np.savez(tmp_path / "site.npz", **site)
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path += [{str(target)!r}, {str(others)!r}]\n{SCRIPT}",
         *(str(tmp_path / name) for name in ("export.safetensors", "site.npz", "out.npz"))],
        capture_output=True, text=True, check=False, cwd=tmp_path, env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["where"].startswith(str(target))
    assert told["ours"] == []
    assert [shape[:2] for shape in told["maps"]] == [[1, dim] for dim in cfg.dims]
    here = embed(
        load_backbone(str(tmp_path / "export.safetensors")),
        {"s2": site["s2"], "s1": site["s1"]},
        doy={"s2": site["doy"]},
    )
    with np.load(tmp_path / "out.npz") as there:
        assert sorted(there) == sorted(here) == ["fused", "s1", "s2"]
        assert all(np.array_equal(there[name], here[name]) for name in here)
