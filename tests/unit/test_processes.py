"""What a rank asks of its process before the ranks meet."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("hard", "wanted", "given"),
    [(10_000, 4096, 8192), (10_000, 0, 4096), (6000, 4096, 6000)],  # more than is allowed: as many as are
)
def test_a_rank_may_open_as_many_files_as_its_job_needs(hard: int, wanted: int, given: int) -> None:
    """In a process of its own: a limit that was raised cannot be taken back here. A high hard limit stays as it is."""
    code = (
        "import json, resource; from pipeline.parallel.processes import allow_open_files;"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, (256, {hard})); allow_open_files({wanted});"
        "print(json.dumps(resource.getrlimit(resource.RLIMIT_NOFILE)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [given, hard]
