"""What training's engine computes (two ranks, experts parted between them), an exported file computes in a bare process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_prep.build import build
from data_prep.config import BuildConfig, OutputConfig, SourceConfig, SplitConfig
from data_prep.simulate.write import simulate
from pipeline.config import ProbeConfig, ViewConfig
from pipeline.export import export, load_model
from pipeline.probes.in_loop import probe_scores
from tests.data_folder import REPOSITORY
from tests.rank_jobs import run_ranks

pytestmark = pytest.mark.integration
VIEW = ViewConfig(64, 8, 3, 2)

# A fresh interpreter in which DeepSpeed and MLflow cannot be imported, as if they were not installed
BARE = """
import json, sys
sys.modules["deepspeed"] = sys.modules["mlflow"] = None
import torch
from model.pretrained import load_backbone
model = load_backbone(sys.argv[1])
from data_prep.shards import ShardSet
from model.inputs import normalise
from pipeline.config import ViewConfig
from pipeline.probes.sites import view_of_sites
shards = ShardSet.open(sys.argv[2])
view = view_of_sites([shards.read_sample(row) for row in (0, 1)], ViewConfig(64, 8, 3, 2), model.cfg.modalities)
with torch.no_grad():
    print(json.dumps(model.skysense(normalise(view, model.statistics)).fused.tolist()))
"""


def test_exported_features_and_probes_equal_the_engines(tmp_path: Path) -> None:
    catalog = simulate(str(tmp_path / "sites"), 24, seed=2, side_m=80)
    shards = str(tmp_path / "shards")
    split = SplitConfig(fractions={"train": 0.6, "val": 0.0, "probe": 0.4})
    build(BuildConfig(SourceConfig((catalog,)), OutputConfig(shards), split=split, workers=1))
    overrides = [
        f"data.url={shards}", f"run.dir={tmp_path / 'run'}", "train.steps=3", "train.batch=4", "tracking.uri=none", "probe.every=0", "probe.tasks=[knn,segment]",
        "probe.samples=8", "checkpoint.every=3", "optimizer.lr=0.01", "optimizer.warmup=4", "objective.ema_momentum=[0.5,0.5]",
        "data.views_global={hr_px: 64, series_px: 8, s2_dates: 3, s1_dates: 2}",
    ]  # fmt: skip
    results = run_ranks(
        "tests.integration.export_job:train_and_feel", 2,
        {"config": "tests/runs/small.yaml", "overrides": overrides, "shards": shards}, tmp_path / "job",
    )  # fmt: skip
    assert results[0] == results[1]  # all ranks get the same figures
    engine = np.array(results[0]["fused"])
    assert np.ptp(engine) > 0

    out = str(tmp_path / "backbone.safetensors")
    facts = export(str(tmp_path / "run"), out)
    assert facts["step"] == 3
    done = subprocess.run(
        [sys.executable, "-c", BARE, out, shards], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.array(json.loads(done.stdout)), engine, atol=1e-5)

    from data_prep.shards import ShardSet

    model = load_model(out)
    probed = probe_scores(
        model.skysense, ShardSet.open(shards), ProbeConfig(samples=8, tasks=("knn", "segment")), VIEW, model.statistics
    )
    for name, score in probed.scores.items():  # one process or two, the same sites and the same score
        assert score.value == results[0]["probes"][f"probe/{name}"]
