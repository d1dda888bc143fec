"""`cluster status` and rank logs: from job number or folder to what a person needs to know, also when things are missing."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import pytest

from cluster import logs, storage
from cluster.commands import requeue, status
from cluster.commands.status import describe
from cluster.errors import UsageError
from cluster.rundir import RunDir
from cluster.slurm.commands import explain, job_fields
from cluster.slurm.status import find_record, list_jobs, report

SHOWN = """JobId=7 JobName=geoloom-train-x
   Priority=1 Nice=0 Account=(null) QOS=(null)
   JobState=RUNNING Reason=None Dependency=(null)
   Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode=0:0
   NodeList=node[1-2]
   Command={command}
   WorkDir=/w
   Comment=a JobState=FAILED b
"""


@pytest.fixture
def job_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A submitted training run with two logged steps and a checkpoint; `scontrol` and `squeue` know its job 7."""
    run = RunDir(str(tmp_path / "a run"))
    run.write_resolved({"train": {"steps": 100}})
    run.append_metrics({"step": 10, "loss": 2.0, "samples_per_s": 3.0})
    run.append_metrics({"step": 20, "loss": 1.5, "samples_per_s": 4.0})
    run.run_id = "abc"
    storage.write_atomic(f"{run.checkpoints_url}/step-00000020/manifest.json", b"{}")
    storage.write_atomic(f"{run.checkpoints_url}/LATEST", b"step-00000020\n")
    folder = Path(run.url) / "jobs" / "001"
    folder.mkdir(parents=True)
    record = {"kind": "train", "run_dir": run.url, "logs_dir": run.logs_url, "jobs": ["7"], "code": {"revision": "r"}}
    (folder / "job.json").write_text(json.dumps(record))
    programs = tmp_path / "bin"
    programs.mkdir()
    shown = SHOWN.format(command=folder / "job.sbatch")
    unknown = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
    (programs / "scontrol").write_text(
        f"#!/bin/bash\nif [ \"$3\" = 7 ]; then cat <<'END'\n{shown}END\nelse {unknown}; fi\n"
    )
    (programs / "squeue").write_text("#!/bin/bash\necho 7; echo 7; echo 8\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    return folder


def test_fields_of_a_job_survive_values_with_spaces(job_dir: Path) -> None:
    fields = job_fields("7")
    assert (fields["JobState"], fields["Restarts"], fields["Command"]) == ("RUNNING", "2", str(job_dir / "job.sbatch"))
    assert fields["Comment"] == "a JobState=FAILED b"
    assert job_fields("8") == {}


def test_a_running_job_is_found_by_number_run_directory_and_queue(job_dir: Path) -> None:
    for name in ("7", str(job_dir), str(job_dir.parents[1]), str(job_dir.parents[1]) + "/"):
        assert Path(find_record(name)[0]) == job_dir
    assert list_jobs() == ["7"]
    seen = report(*find_record("7"))
    assert (seen["step"], seen["steps"], seen["last_checkpoint"], seen["mlflow_run"]) == (
        20,
        100,
        "step-00000020",
        "abc",
    )
    assert seen["jobs"] == [{"job": "7", "state": "RUNNING", "reason": None, "nodes": "node[1-2]", "restarts": 2}]
    text = "\n".join(describe(seen))
    assert "job 7: RUNNING on node[1-2], restarted 2 times" in text
    assert "step        20 of 100, loss 1.5, 4 samples/s" in text


def test_a_failure_shows_the_rank_that_failed_first(job_dir: Path) -> None:
    logs_url = str(job_dir.parents[1] / "logs")
    logs.record_failure(logs_url, 3, 21, ValueError("cause"))
    storage.write_atomic(f"{logs_url}/{logs.rank_log_name(3)}", b"before\nTraceback\nValueError: cause\n")
    text = "\n".join(describe(report(*find_record("7"))))
    assert "failing     rank 3: ValueError: cause\n    | before\n    | Traceback" in text


def test_nothing_logged_yet(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "jobs" / "001"
    folder.mkdir(parents=True)
    record = {"kind": "train", "run_dir": str(tmp_path / "run"), "logs_dir": "", "jobs": [], "code": {}}
    (folder / "job.json").write_text(json.dumps(record))
    assert "  step        none yet" in describe(report(*find_record(str(tmp_path / "run"))))


def test_a_build_shows_its_shards(tmp_path: Path) -> None:
    folder = tmp_path / "shards.jobs" / "001"
    folder.mkdir(parents=True)
    shards = tmp_path / "shards"
    record = {"kind": "build", "run_dir": str(shards), "logs_dir": "", "jobs": [], "code": {}}
    (folder / "job.json").write_text(json.dumps(record))
    storage.write_atomic(str(shards / "train-000000.tar"), b"")
    assert "  shards      1, not merged yet" in describe(report(*find_record(str(shards))))


@pytest.mark.parametrize(("name", "message"), [("/nowhere", "neither a job number"), ("8", "does not know job 8")])
def test_unknown_jobs_are_said(name: str, message: str, job_dir: Path) -> None:
    with pytest.raises(UsageError, match=message):
        find_record(name)


def test_status_prints_json(job_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    status.add_arguments(parser)
    status.main(parser.parse_args(["--json"]))
    assert [one["step"] for one in json.loads(capsys.readouterr().out)["jobs"]] == [20]


def test_a_folder_of_runs_is_a_table_with_what_is_left_and_what_it_cost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, step in (("base/seed-0", 100), ("base/seed-1", 50), ("other/seed-0", None)):
        run = RunDir(str(tmp_path / name))
        run.write_resolved({"train": {"steps": 100}})
        if step:
            figures = {"loss": 2.0, "samples_per_s": 4.0, "eta_s": 3725.0, "gpu_hours": 0.5, "probe/knn/fused": 0.25}
            run.append_metrics({"step": step, **figures, "probe/knn/fused/low": 0.1, "time": 0.0})
    parser = argparse.ArgumentParser()
    status.add_arguments(parser)
    status.main(parser.parse_args([str(tmp_path), "--price-per-gpu-hour", "3"]))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "  base/seed-0   100 of 100, loss 2, 4 samples/s, 0.5 GPU-hours, cost 1.50, knn/fused 0.250"
    assert lines[2].startswith("  base/seed-1   50 of 100, loss 2, 4 samples/s, 1:02:05 left, 0.5 GPU-hours, cost 1.50")
    assert lines[3] == "  other/seed-0  none yet"
    assert lines[4] == "  1 of 3 runs at their last step, 1 GPU-hours, cost 3.00"
    status.main(parser.parse_args([str(tmp_path), "--json"]))
    kept = json.loads(capsys.readouterr().out)
    assert [run["eta_s"] for run in kept["tasks"]] == [3725.0, 3725.0, None]
    with pytest.raises(UsageError, match="--watch"):
        status.main(parser.parse_args([str(tmp_path), "--watch", "5", "--json"]))


def test_watching_ends_when_nothing_goes_on() -> None:
    run = {"jobs": [], "step": 5, "steps": 10}
    assert status.goes_on(run)
    assert not status.goes_on({**run, "step": 10})
    assert status.goes_on({"jobs": [{"state": "3 COMPLETED, 1 PENDING"}]})
    assert not status.goes_on({"jobs": [{"state": "COMPLETED"}], "step": 5, "steps": 10})


def test_slurms_messages_become_one_line() -> None:
    text = (
        "sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed: Invalid partition\n"
    )
    assert explain(text) == "invalid partition specified: x; Batch job submission failed: Invalid partition"
    assert "cannot be reached" in explain("scontrol: error: Unable to contact slurm controller (connect failure)")
    assert explain("") == "failed without a message"


def test_logs_of_a_run_on_an_object_store_are_copied_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir(f"memory://{tmp_path.name}-{id(tmp_path)}")
    job, logs_dir = tmp_path / "job", tmp_path / "job" / "logs"
    logs_dir.mkdir(parents=True)
    (logs_dir / "rank-00000.log").write_text("hello\n")
    (job / "job.json").write_text(json.dumps({"run_dir": run.url, "logs_dir": str(logs_dir)}))
    parser = argparse.ArgumentParser()
    requeue.add_arguments(parser)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SLURM_JOB_ID", raising=False)
        assert requeue.main(parser.parse_args([str(job), "--code", "0"])) == 0
    assert logs.tail(f"{run.logs_url}/rank-00000.log") == ["hello"]
    assert (job / "finished").exists()
    assert "done: finished at step 0" in capsys.readouterr().out


def test_rank_logs_go_to_the_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GEOLOOM_RANK_LOG", raising=False)
    handlers, level = list(logging.getLogger().handlers), logging.getLogger().level
    try:
        logs.start_logging(str(tmp_path), 2)
        logging.getLogger("part").info("said")
        assert "rank 00002 part: said" in (tmp_path / "rank-00002.log").read_text()
        monkeypatch.setenv("GEOLOOM_RANK_LOG", "elsewhere")  # the batch script captures it already
        logs.start_logging(str(tmp_path), 3)
        assert not (tmp_path / "rank-00003.log").exists()
    finally:
        logging.getLogger().handlers[:] = handlers
        logging.getLogger().setLevel(level)


def test_recording_a_failure_never_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    logs.record_failure(str(tmp_path / "file" / "logs"), 0, 1, ValueError("x"))
    storage.write_atomic(str(tmp_path / "logs" / "failure-00001.json"), b"{torn")
    assert logs.read_failures(str(tmp_path / "logs")) == []
    logs.clear_failures(str(tmp_path / "logs"))
    assert storage.list_names(str(tmp_path / "logs")) == []


def test_tail_reads_only_the_end(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("".join(f"line {i}\n" for i in range(100_000)))
    assert logs.tail(str(tmp_path / "log"), 2) == ["line 99998", "line 99999"]
    assert logs.tail(str(tmp_path / "absent")) == []


ARRAY = """JobId=20 ArrayJobId=20 ArrayTaskId=4-9%2 JobState=PENDING Reason=Resources NodeList=(null)

JobId=22 ArrayJobId=20 ArrayTaskId=2 JobState=RUNNING Reason=None NodeList=node1 Restarts=1

JobId=21 ArrayJobId=20 ArrayTaskId=1 JobState=FAILED Reason=NonZeroExitCode NodeList=node2

JobId=23 ArrayJobId=20 ArrayTaskId=0 JobState=COMPLETED Reason=None NodeList=node2
"""


def test_an_array_is_shown_with_all_its_tasks(job_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "bin" / "scontrol").write_text(f"#!/bin/bash\ncat <<'END'\n{ARRAY}END\n")
    record = {"kind": "build", "run_dir": str(tmp_path / "s"), "logs_dir": "", "jobs": ["20"], "code": {}}
    [row] = report(str(tmp_path), record)["jobs"]
    assert row["state"] == "1 COMPLETED, 1 FAILED, 6 PENDING, 1 RUNNING"
    assert (row["reason"], row["nodes"], row["restarts"]) == ("tasks 1 failed", "node1", 1)


def test_a_run_directory_without_a_submission_is_shown(
    job_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one on an object store, started by hand; with one that was submitted from another folder, its job is found."""
    url = f"memory://{tmp_path.name}/run"
    run = RunDir(url)
    run.write_resolved({"train": {"steps": 9}})
    run.append_metrics({"step": 3, "loss": 1.0, "samples_per_s": 1.0})
    run.sync()
    folder, record = find_record(url)
    assert (folder, record["jobs"]) == (url, [])
    assert report(folder, record)["step"] == 3
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    run.claim()
    assert find_record(url)[0] == str(job_dir)
