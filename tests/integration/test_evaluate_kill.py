"""`pipeline evaluate --mode finetune` killed with SIGKILL and started again ends as the uninterrupted run, through the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from model.pretrained import save_backbone
from tests import published
from tests.data_folder import REPOSITORY
from tests.unit.test_evaluate_run import tiny_model

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]
EPOCHS = 4


def command(task: str, backbone: Path, root: Path, out: Path) -> list[str]:
    return [
        sys.executable, "-m", "pipeline", "evaluate", str(backbone), "--task", task, "--data", str(root), "--mode", "finetune",
        "--epochs", str(EPOCHS), "--out", str(out), "--json",
    ]  # fmt: skip


@pytest.mark.parametrize("task", ["flair2", "nwpu_vhr10"])  # a dense head, and a detector that samples its proposals
def test_killed_and_started_again_equals_uninterrupted(task: str, tmp_path: Path) -> None:
    root, backbone = tmp_path / "set", tmp_path / "tiny.safetensors"
    published.MAKERS[task](root, np.random.default_rng(0))
    model = tiny_model(1)
    save_backbone(str(backbone), model.skysense.state_dict(), model.cfg, model.statistics, {})
    env = {**os.environ, "OMP_NUM_THREADS": "1"}

    def to_its_end(out: Path) -> str:
        asked = command(task, backbone, root, out)
        return subprocess.run(asked, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=True).stdout

    whole = to_its_end(tmp_path / "a")
    killed = subprocess.Popen(
        command(task, backbone, root, tmp_path / "b"),
        cwd=REPOSITORY,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 900
    while not list((tmp_path / "b").glob(f"finetune/{task}-trained-*/step-0000000[12]/manifest.json")):
        assert killed.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "b" / "results.jsonl").exists()
    again = to_its_end(tmp_path / "b")
    first, second = (json.loads(text.strip().splitlines()[-1]) for text in (whole, again))
    timing = ("seconds", "heads")
    assert {k: v for k, v in first.items() if k not in timing} == {k: v for k, v in second.items() if k not in timing}
    for name in ("trained", "scratch"):
        (a,), (b,) = (
            (tmp_path / folder).glob(f"finetune/{task}-{name}-*/step-*/state.safetensors") for folder in ("a", "b")
        )
        assert a.read_bytes() == b.read_bytes()
