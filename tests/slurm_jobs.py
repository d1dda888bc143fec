"""Runs of the stand-in trainer (`standin_trainer`) on the tests' SLURM, submitted as `cluster submit` does it.

The caller sets SLURM_CONF in its own environment to the cluster's.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from cluster.rundir import RunDir
from cluster.slurm import script
from cluster.slurm.submit import Submission, submit
from tests.slurm_cluster import SlurmCluster

REPOSITORY = Path(__file__).resolve().parents[1]
STEPS = 30


class Sent:
    """A submitted run of the stand-in trainer."""

    def __init__(self, slurm: SlurmCluster, run_dir: Path, chain: int = 1, options: dict[str, str] | None = None,
                 steps: int = 30, signal_s: int = 120, follow: bool = False, **test: Any) -> None:  # fmt: skip
        python = run_dir.parent / "python"
        if not python.exists():
            real, stand_in = shlex.quote(sys.executable), shlex.quote(str(REPOSITORY / "tests" / "standin_trainer.py"))
            python.write_text(f'#!/bin/bash\n[ "$2" = pipeline ] && exec {real} {stand_in} "$4"\nexec {real} "$@"\n')
            python.chmod(0o755)
        job = script.Job("test", "test", "", "", str(run_dir.parent), str(python), nodes=2, signal_s=signal_s,
                         options=options or {})  # fmt: skip
        resolved = {"run": {"dir": str(run_dir)}, "train": {"steps": steps}, "test": test}
        answer = submit(Submission("train", job, str(run_dir), resolved, "f", chain=chain, follow=follow))
        self.slurm, self.run, self.jobs, self.folder = (
            slurm,
            RunDir(str(run_dir)),
            answer["jobs"],
            Path(answer["job_dir"]),
        )
        self.job = self.jobs[-1]

    def at_step(self, step: int) -> Sent:
        self.slurm.wait(lambda: (self.run.last_step() or 0) >= step, f"step {step} of {self.job}")
        return self

    def ends(self, *states: str, timeout: float = 60) -> Sent:
        try:
            self.slurm.wait_state(self.job, *(states or ("COMPLETED",)), timeout=timeout)
        except AssertionError as error:
            texts = [p.read_text() for p in sorted(Path(self.run.logs_url).iterdir())]
            raise AssertionError("\n".join([str(error), *texts])) from None
        return self

    @property
    def attempts(self) -> list[dict[str, Any]]:
        return json.loads((self.folder / "attempts.json").read_text())

    def assert_every_step_once(self, steps: int = 30) -> None:
        lines = Path(self.run.metrics_url).read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, steps + 1))
