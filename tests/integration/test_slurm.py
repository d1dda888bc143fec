"""Jobs on a real SLURM of two nodes: signals, time limits, crashes and hostile names, with a stand-in trainer that counts.

`test_slurm_training` does the same with the real trainer.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.ranks import job_port
from cluster.slurm.status import find_record, report
from tests.faults.campaign import Case, Kind
from tests.faults.slurm import KINDS
from tests.slurm_cluster import SlurmCluster, slurm_cluster
from tests.slurm_jobs import Sent

pytestmark = pytest.mark.integration
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmCluster]:
    with slurm_cluster(nodes=2, cpus=8, gpus=0) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def environment(slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])


@pytest.fixture(scope="module", autouse=True)
def limited(slurm: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[Sent, Sent]:
    """Two runs with a time limit, sent first, so that it strikes while other tests run: one that hears the signal ahead of it,
    one that hangs. SLURM's shortest limit is a minute, and it looks every half a minute who is near it: with 58 s ahead the
    signal comes within 30 s."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
        hears, hangs = (tmp_path_factory.mktemp(name) / "run" for name in ("hears", "hangs"))
        return (
            Sent(slurm, hears, steps=320, options={"time": "1"}, signal_s=58, step_s=0.1),
            Sent(slurm, hangs, options={"time": "1"}, signal_s=30, hang_at=25),
        )


def test_a_run_completes_on_two_nodes(slurm: SlurmCluster, tmp_path: Path) -> None:
    sent = Sent(slurm, tmp_path / "run").ends()
    sent.assert_every_step_once()
    logs = [(tmp_path / "run" / "logs" / f"rank-0000{rank}.log").read_text() for rank in (0, 1)]
    first, port = slurm.names[0], job_port(int(sent.job))
    assert all(f"meets at {first} {port} from 0" in log for log in logs)
    assert ["on node1" in log for log in logs] == [True, False]
    seen = report(*find_record(str(tmp_path / "run")))
    assert (seen["step"], seen["jobs"][0]["state"], seen["failure"]) == (30, "COMPLETED", None)
    assert find_record(sent.job)[0] == str(sent.folder)


def test_hostile_names_on_the_real_thing(slurm: SlurmCluster, tmp_path: Path) -> None:
    folder = tmp_path / "a b $(touch PWNED) '\"; %j\n#SBATCH --uid=1"
    folder.mkdir()
    comment = 'say "hi" $(touch PWNED) \\ it\'s # 5%'
    sent = Sent(slurm, folder / "run `id`", options={"comment": comment}).ends()
    sent.assert_every_step_once()
    assert f"   Comment={comment} \n" in slurm.run("scontrol", "show", "job", sent.job)
    assert not list(tmp_path.rglob("PWNED"))


def test_a_signal_ahead_checkpoints_and_requeues(slurm: SlurmCluster, tmp_path: Path) -> None:
    sent = Sent(slurm, tmp_path / "run", step_s=0.1).at_step(5)
    slurm.run("scancel", "--signal=USR1", "--batch", sent.job)
    assert sent.ends().slurm.job(sent.job)["Restarts"] == "1"
    sent.assert_every_step_once()
    assert [a["action"] for a in sent.attempts] == ["requeue", "done"]
    assert sent.attempts[0]["checkpointed"]


def test_a_chain_hands_over(slurm: SlurmCluster, tmp_path: Path) -> None:
    sent = Sent(slurm, tmp_path / "run", chain=3, step_s=0.1).at_step(5)
    slurm.run("scancel", "--signal=USR1", "--batch", sent.jobs[0])
    sent.ends().assert_every_step_once()
    assert [(a["job"], a["action"]) for a in sent.attempts] == [(sent.jobs[0], "requeue"), (sent.jobs[1], "done")]
    assert "nothing to do" in Path(sent.run.logs_url, "batch.log").read_text()


def test_a_killed_rank_ends_the_job_at_once_and_it_comes_back(slurm: SlurmCluster, tmp_path: Path) -> None:
    sent = Sent(slurm, tmp_path / "run", step_s=0.2).at_step(3)
    tasks = slurm.task_processes("node2", sent.job)
    victims = [p for p in tasks if b"standin_trainer" in Path(f"/proc/{p}/cmdline").read_bytes()]
    os.kill(victims[0], 9)
    sent.ends().assert_every_step_once()
    assert [a["action"] for a in sent.attempts] == ["requeue", "done"]
    assert sent.attempts[0]["error"] == "a rank was killed by signal 9"


def test_the_same_failure_twice_stops(slurm: SlurmCluster, tmp_path: Path) -> None:
    sent = Sent(slurm, tmp_path / "run", fail_at=15).ends("FAILED")
    assert [a["action"] for a in sent.attempts] == ["requeue", "stop"]
    seen = report(*find_record(sent.job))
    assert "failed twice at step 15" in seen["last_decision"]
    assert "bad sample" in seen["failure"]["error"]
    assert any("ValueError: bad sample" in line for line in seen["failure"]["tail"])


def test_a_cancelled_job_stays_cancelled(slurm: SlurmCluster, tmp_path: Path) -> None:
    sent = Sent(slurm, tmp_path / "run", step_s=0.1, steps=1000).at_step(3)
    slurm.run("scancel", sent.job)
    sent.ends("CANCELLED", "COMPLETING")
    slurm.wait(lambda: not slurm.run("squeue", "--noheader", f"--jobs={sent.job}", check=False).strip(), "gone")
    assert (slurm.job(sent.job)["JobState"], slurm.job(sent.job)["Restarts"]) == ("CANCELLED", "0")


def test_the_time_limit_is_no_end(slurm: SlurmCluster, limited: tuple[Sent, Sent]) -> None:
    hears, _ = limited
    hears.ends(timeout=120).assert_every_step_once(320)
    assert int(slurm.job(hears.job)["Restarts"]) >= 1
    assert hears.attempts[0]["checkpointed"]


def test_a_hanging_run_comes_back_from_its_time_limit(slurm: SlurmCluster, limited: tuple[Sent, Sent]) -> None:
    _, hangs = limited
    hangs.ends(timeout=150).assert_every_step_once()
    assert slurm.job(hangs.job)["Restarts"] == "1"


def test_preemption_by_a_more_urgent_job(slurm: SlurmCluster, tmp_path: Path) -> None:
    sent = Sent(slurm, tmp_path / "run", step_s=0.1, steps=40).at_step(5)
    slurm.run("srun", "--partition=urgent", "--nodes=2", "--exclusive", "true", timeout=60)
    sent.ends().assert_every_step_once(40)
    assert sent.attempts[0]["checkpointed"]


def cluster_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster", *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=120,
        env={**os.environ, **environment}, check=False,
    )  # fmt: skip


def test_an_unreachable_controller_is_one_line(slurm: SlurmCluster, tmp_path: Path) -> None:
    conf = tmp_path / "slurm.conf"
    text = Path(slurm.environment["SLURM_CONF"]).read_text()
    conf.write_text(
        "\n".join("SlurmctldPort=1" if line.startswith("SlurmctldPort") else line for line in text.splitlines())
    )
    done = cluster_command("status", "1", SLURM_CONF=str(conf))
    assert done.returncode == 1
    assert "controller cannot be reached" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_unknown_partition_leaves_nothing(slurm: SlurmCluster, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="partition"):
        Sent(slurm, tmp_path / "run", options={"partition": "nope"})
    assert not (tmp_path / "run").exists()


# crash loops to their end last longer than a test may: `make faults` has them
SHORT = [kind for kind in KINDS if "crash loops" not in kind.name]


@pytest.mark.parametrize("kind", SHORT, ids=[kind.name for kind in SHORT])
def test_one_injection_of_each_fault_of_slurm_itself(slurm: SlurmCluster, tmp_path: Path, kind: Kind) -> None:
    """Nodes and controllers that die, runs submitted or sent twice: the kinds of `make faults`, one of each."""
    result = kind.inject(Case(random.Random(kind.name), tmp_path, SimpleNamespace(slurm=slurm)))
    assert (result.lost, result.doubled, result.wrong) == (0, 0, 0), result
