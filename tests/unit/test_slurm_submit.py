"""`cluster submit` without a SLURM: what it freezes, what it refuses, and that a refusal leaves nothing behind."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.commands import status
from cluster.commands import submit as command
from cluster.commands.plan import figures_of
from cluster.errors import RunFailure, UsageError
from cluster.plan.facts import configured_layout, hardware, model_facts
from cluster.plan.recommend import recommend
from cluster.rundir import RunDir
from cluster.slurm import commands as door
from cluster.slurm import freeze
from cluster.slurm.array import ArraySubmission, ArrayTask, submit_array
from cluster.slurm.resolve import resolve
from cluster.slurm.script import Job
from cluster.slurm.status import find_record, report_array
from cluster.slurm.submit import submit

REPOSITORY = Path(__file__).resolve().parents[2]
BOXES = freeze.BOXES


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`resolve` answers for a run in tmp_path; PATH holds only what a test puts into tmp_path/bin."""
    (tmp_path / "bin").mkdir()
    run = tmp_path / "out" / "my run"

    def resolved(kind: str, config: str, overrides: list[str], extra: Any = ()) -> dict[str, Any]:
        tree = {"run": {"dir": str(run), "name": None}} if kind == "train" else {"output": {"url": str(run)}}
        return {"resolved": tree, "fingerprint": "f" * 16}

    monkeypatch.setattr(command, "resolve", resolved)
    monkeypatch.setattr(
        freeze, "BOXES", ("cluster",)
    )  # a box frozen is as good as four, which `test_a_frozen_copy…` takes
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    return run


def sbatch(tmp_path: Path, body: str) -> None:
    path = tmp_path / "bin" / "sbatch"
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_intermixed_args(arguments)


COUNTING = 'n=$(cat "$0.n" 2>/dev/null || echo 100); echo $((n + 1)) >"$0.n"; echo "$@" >>"$0.calls"; echo "$n;cluster"'


def test_a_submission_keeps_script_config_and_code(run_dir: Path, tmp_path: Path) -> None:
    sbatch(tmp_path, COUNTING)
    sent = submit(command.plan_submission(parse("train", "c.yaml", "--nodes", "2", "--gpus-per-node", "4", "a.b=c")))
    folder = run_dir / "jobs" / "001"
    assert sent == {"jobs": ["100"], "job_dir": str(folder), "run_dir": str(run_dir)}
    assert json.loads((folder / "config.json").read_text())["run"]["dir"] == str(run_dir)
    assert json.loads((folder / "resolved.json").read_text())["fingerprint"] == "f" * 16
    assert json.loads((folder / "job.json").read_text())["jobs"] == ["100"]
    frozen = subprocess.run(["python3", "-c", "import cluster; print(cluster.__file__)"], env={"PYTHONPATH": str(folder / "code")},
                            capture_output=True, text=True, check=True, cwd="/")  # fmt: skip
    assert frozen.stdout.startswith(str(folder / "code"))
    script = (folder / "job.sbatch").read_text()
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=4\n" in script
    assert "#SBATCH --gpus-per-node=4\n" in script
    assert submit(command.plan_submission(parse("train", "c.yaml")))["job_dir"].endswith("002")


def test_a_chain_hands_over_and_its_last_link_requeues(run_dir: Path, tmp_path: Path) -> None:
    sbatch(tmp_path, COUNTING)
    sent = submit(command.plan_submission(parse("train", "c.yaml", "--chain", "3", "--dependency", "afterok:7")))
    assert sent["jobs"] == ["100", "101", "102"]
    folder = sent["job_dir"]
    assert (tmp_path / "bin" / "sbatch.calls").read_text().splitlines() == [
        f"--parsable --dependency=afterok:7 {folder}/link.sbatch",
        f"--parsable --dependency=afterany:100 {folder}/link.sbatch",
        f"--parsable --dependency=afterany:101 {folder}/job.sbatch",
    ]


def test_a_build_is_an_array_with_a_dependent_merge(run_dir: Path, tmp_path: Path) -> None:
    sbatch(tmp_path, COUNTING)
    sent = submit(command.plan_submission(parse("build", "c.yaml", "--tasks", "4")))
    assert sent["job_dir"] == f"{run_dir}.jobs/001"  # the shard directory itself holds shards only
    calls = (tmp_path / "bin" / "sbatch.calls").read_text().splitlines()
    assert calls[1] == f"--parsable --dependency=afterok:100 {sent['job_dir']}/merge.sbatch"
    assert "#SBATCH --array=0-3\n" in Path(sent["job_dir"], "job.sbatch").read_text()
    assert "#SBATCH --kill-on-invalid-dep=yes\n" in Path(sent["job_dir"], "merge.sbatch").read_text()


def test_dry_run_writes_nothing(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (
        "train",
        "c.yaml",
        "--nodes",
        "2",
        "--partition",
        "gpu",
        "--sbatch",
        "mail-type=END",
        "--sbatch",
        "exclusive",
    )
    assert command.main(parse(*arguments, "--srun", "mpi=none", "--container", "/images/a b", "--dry-run")) == 0
    printed = capsys.readouterr().out
    for line in ("#SBATCH --partition=gpu", "#SBATCH --mail-type=END", "#SBATCH --exclusive"):
        assert f"\n{line}\n" in printed
    assert "'--container=/images/a b' --mpi=none bash -c run_rank" in printed
    assert not run_dir.parent.exists()


REFUSALS = {
    "echo 'sbatch: error: invalid partition specified: nope' >&2\n"
    "echo 'sbatch: error: Batch job submission failed: Invalid partition name specified' >&2; exit 1": "invalid partition",
    "echo 'sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)' >&2; exit 1":
        "controller cannot be reached",
    "echo what": "instead of a job number",
    "sleep 5": "no answer within",
}  # fmt: skip


@pytest.mark.parametrize("body", REFUSALS)
def test_a_refusal_is_one_line_and_leaves_nothing(
    body: str, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door.call, "__defaults__", (0.5,))
    sbatch(tmp_path, body)
    with pytest.raises(RunFailure, match=REFUSALS[body]) as caught:
        submit(command.plan_submission(parse("train", "c.yaml")))
    assert "\n" not in str(caught.value)
    assert not run_dir.parent.exists()


def test_without_slurm(run_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(RunFailure, match="sbatch is not on PATH"):
        submit(command.plan_submission(parse("train", "c.yaml")))
    assert not run_dir.parent.exists()


def test_an_existing_run_directory_survives_a_refusal(run_dir: Path, tmp_path: Path) -> None:
    run_dir.mkdir(parents=True)
    sbatch(tmp_path, "exit 1")
    with pytest.raises(RunFailure):
        submit(command.plan_submission(parse("train", "c.yaml")))
    assert os.listdir(run_dir) == []


def test_a_merge_that_is_refused_takes_its_array_back(run_dir: Path, tmp_path: Path) -> None:
    sbatch(tmp_path, 'case "$*" in *merge.sbatch) exit 1;; esac; echo 55')
    scancel = tmp_path / "bin" / "scancel"
    scancel.write_text('#!/bin/bash\necho "$@" >"$0.calls"\n')
    scancel.chmod(0o755)
    with pytest.raises(RunFailure):
        submit(command.plan_submission(parse("build", "c.yaml", "--tasks", "2")))
    assert (tmp_path / "bin" / "scancel.calls").read_text() == "55\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--nodes", "0"), "--nodes must be at least 1"),
        (("--gpus-per-node", "-1"), "negative"),
        (("--gpus-per-node", "4", "--tasks-per-node", "2"), "one task per GPU"),
        (("--sbatch", "output=x"), "collides"),
        (("--sbatch", "a b=x"), "long option name"),
        (("--sbatch", "comment=a\nb"), "line break"),
        (("--sbatch", "mail-type=A", "--sbatch", "mail-type=B"), "twice"),
    ],
)
def test_bad_arguments_name_themselves(arguments: tuple[str, ...], message: str, run_dir: Path) -> None:
    with pytest.raises(UsageError, match=message):
        command.main(parse("train", "c.yaml", "--dry-run", *arguments))


def test_a_run_in_memory_cannot_be_submitted(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = {"resolved": {"run": {"dir": "memory://x"}}, "fingerprint": ""}
    monkeypatch.setattr(command, "resolve", lambda *_: answer)
    with pytest.raises(UsageError, match="memory of one process"):
        command.main(parse("train", "c.yaml", "--dry-run"))


def test_a_run_on_an_object_store_keeps_its_jobs_on_a_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_dir: Path
) -> None:
    sbatch(tmp_path, COUNTING)
    tree = {"resolved": {"run": {"dir": "s3://bucket/runs/a b", "name": "n"}}, "fingerprint": ""}
    monkeypatch.setattr(command, "resolve", lambda *_: tree)
    monkeypatch.chdir(tmp_path)
    sent = submit(command.plan_submission(parse("train", "c.yaml")))
    assert sent["run_dir"] == "s3://bucket/runs/a b"
    assert sent["job_dir"] == str(tmp_path / "runs_out" / "a-b.jobs" / "001")
    assert f"LOGS={tmp_path}/runs_out/a-b.jobs/001/logs\n" in Path(sent["job_dir"], "job.sbatch").read_text()


def test_the_owner_of_a_config_refuses_it() -> None:
    """The real dry run, as a subprocess: its own message and exit code come through."""
    with pytest.raises(UsageError, match=r"unknown key train\.stepz; nearest valid key is train\.steps"):
        resolve("train", "pipeline/runs/demo.yaml", ["train.stepz=1"])
    with pytest.raises(UsageError, match="does not exist"):
        resolve("build", "nowhere.yaml", [])


@pytest.mark.parametrize("name", ["demo_dense", "tiny", "skysense_v2"])
def test_shipped_configs_resolve_and_plan(name: str) -> None:
    answer = resolve("train", str(REPOSITORY / "pipeline" / "runs" / f"{name}.yaml"), [])
    layout = configured_layout(answer["resolved"], 1, 2)
    figures = figures_of(answer, layout, hardware("h200"))
    assert figures["memory_gb"]["total"] > 0
    assert recommend(model_facts(answer), layout, hardware("h200")) is not None


def scontrol(tmp_path: Path, states: dict[str, str]) -> None:
    """`scontrol show job N` answers with a state; other jobs are unknown."""
    cases = "".join(f'{job}) echo "JobId={job} JobState={state}";;' for job, state in states.items())
    path = tmp_path / "bin" / "scontrol"
    path.write_text(f"#!/bin/bash\ncase $3 in {cases} *) echo 'Invalid job id specified' >&2; exit 1;; esac\n")
    path.chmod(0o755)


def test_a_run_that_a_job_works_on_is_refused_or_followed(run_dir: Path, tmp_path: Path) -> None:
    sbatch(tmp_path, COUNTING)
    scontrol(tmp_path, {"100": "RUNNING"})
    submit(command.plan_submission(parse("train", "c.yaml")))
    with pytest.raises(UsageError, match=r"job 100 \(RUNNING\) works on this run already; add --follow"):
        submit(command.plan_submission(parse("train", "c.yaml")))
    assert sorted(os.listdir(run_dir / "jobs")) == ["001"]
    sent = submit(command.plan_submission(parse("train", "c.yaml", "--follow", "--dependency", "afterok:7")))
    assert f"--dependency=afterok:7,afterany:100 {sent['job_dir']}" in (tmp_path / "bin" / "sbatch.calls").read_text()
    scontrol(tmp_path, {"100": "COMPLETED", "101": "FAILED"})
    assert submit(command.plan_submission(parse("train", "c.yaml")))["jobs"] == ["102"]


def test_the_writer_of_a_run_counts_too_wherever_it_was_submitted(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sbatch(tmp_path, COUNTING)
    scontrol(tmp_path, {"55": "PENDING"})
    with monkeypatch.context() as patch:
        patch.setenv("SLURM_JOB_ID", "55")
        RunDir(str(run_dir)).claim()
    with pytest.raises(UsageError, match=r"job 55 \(PENDING\)"):
        submit(command.plan_submission(parse("train", "c.yaml")))


def test_inside_a_container_another_interpreter_and_what_was_on_the_path(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(parse("train", "c.yaml", "--dry-run", "--container", "i", "--python", "/outside/python")) == 0
    text = capsys.readouterr().out
    assert "\nPYTHON=/outside/python\nRANK_PYTHON=python3\n" in text
    assert '"$RANK_PYTHON" -m pipeline train' in text
    assert '"$PYTHON" -m cluster requeue' in text
    assert 'PYTHONPATH="$CODE${PYTHONPATH:+:$PYTHONPATH}"' in text
    command.main(parse("train", "c.yaml", "--dry-run", "--container", "i", "--container-python", "/inside/python"))
    assert "\nRANK_PYTHON=/inside/python\n" in capsys.readouterr().out


def test_a_frozen_copy_still_knows_its_revision(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freeze, "BOXES", BOXES)
    sbatch(tmp_path, COUNTING)
    folder = Path(submit(command.plan_submission(parse("train", "c.yaml")))["job_dir"])
    (folder / "code.diff").write_text("the difference")
    asked = "from pipeline.tracking import facts; print(facts.git_revision(), facts.git_diff())"
    told = subprocess.run(
        [sys.executable, "-c", asked], env={"PYTHONPATH": f"{folder / 'code'}"}, capture_output=True, text=True, check=True, cwd="/",
    )  # fmt: skip
    assert told.stdout == f"{json.loads((folder / 'job.json').read_text())['code']['revision']} the difference\n"


def array_of(root: Path, **more: Any) -> ArraySubmission:
    tasks = [
        ArrayTask(f"a/seed-{i}", str(root / f"a/seed-{i}"), {"run": {"dir": f"d{i}"}}, str(i) * 16) for i in (0, 1)
    ]
    job = Job("n", "c", "", "", str(root), sys.executable)
    return ArraySubmission(job, str(root), tasks, {"runs": "all"}, **more)


def test_an_array_keeps_each_run_a_folder_of_its_own(run_dir: Path, tmp_path: Path) -> None:
    sbatch(tmp_path, COUNTING)
    sent = submit_array(array_of(run_dir, dependency="afterok:5", max_requeues=3))
    folder = run_dir / "jobs" / "001"
    assert (sent["jobs"], sent["job_dir"]) == (["100", "101"], str(folder))
    first, last = (tmp_path / "bin" / "sbatch.calls").read_text().splitlines()
    assert first == f"--parsable --dependency=afterok:5 {folder}/job.sbatch"
    assert last == f"--parsable --dependency=afterany:100 {folder}/report.sbatch"
    assert json.loads((folder / "plan.json").read_text()) == {"runs": "all"}
    for number in (0, 1):
        task = folder / f"{number:05d}"
        assert json.loads((task / "config.json").read_text()) == {"run": {"dir": f"d{number}"}}
        record = json.loads((task / "job.json").read_text())
        assert (record["jobs"], record["kind"], record["max_requeues"]) == ([f"100_{number}"], "train", 3)
        assert record["run_dir"] == str(run_dir / f"a/seed-{number}")
    shown = report_array(*find_record(str(run_dir)))
    assert [task["name"] for task in shown["tasks"]] == ["a/seed-0", "a/seed-1"]
    assert "  0 of 2 runs at their last step, 0 GPU-hours" in status.describe_many(shown)


def test_a_refused_array_leaves_nothing(run_dir: Path, tmp_path: Path) -> None:
    sbatch(tmp_path, 'echo "$@" | grep -q report && { echo no >&2; exit 1; }; echo 100')
    (tmp_path / "bin" / "scancel").write_text('#!/bin/bash\necho "$@" >>"$0.calls"\n')
    (tmp_path / "bin" / "scancel").chmod(0o755)
    with pytest.raises(RunFailure, match="no"):
        submit_array(array_of(run_dir))
    assert (tmp_path / "bin" / "scancel.calls").read_text() == "100\n"
    assert not run_dir.exists()


def test_an_array_waits_for_the_job_that_works_on_one_of_its_runs(run_dir: Path, tmp_path: Path) -> None:
    sbatch(tmp_path, COUNTING)
    RunDir(str(run_dir / "a/seed-1")).claim()
    writer = run_dir / "a/seed-1" / "writer.json"
    writer.write_text(json.dumps({**json.loads(writer.read_text()), "job": "77"}))
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/bash\necho 'JobId=77 JobState=RUNNING'\n")
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    with pytest.raises(UsageError, match=r"seed-1: job 77 \(RUNNING\) works on this run already"):
        submit_array(array_of(run_dir))
    submit_array(array_of(run_dir, follow=True))
    first = (tmp_path / "bin" / "sbatch.calls").read_text().splitlines()[0]
    assert first.startswith("--parsable --dependency=afterany:77 ")
