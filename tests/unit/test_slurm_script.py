"""Batch scripts: whatever stands in a path, name or option, the script does the same and hands the value on unchanged.

The scripts are run by the real bash, with small stand-ins for srun, scontrol and python that write down how they were called.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cluster.errors import UsageError
from cluster.exit_codes import REQUEUE
from cluster.slurm.script import (
    Job,
    array_script,
    build_script,
    job_name,
    merge_script,
    option,
    quote,
    report_script,
    task_folder,
    train_script,
)

HOSTILE = ["$(touch PWNED)", "`touch PWNED`", "a b", "'; touch PWNED; '", '"; touch PWNED; "', "\n#SBATCH --uid=0\n", "-rf",
           "\\", "%j", "ü→é", "*", "~", "a\tb", "${HOME}", "!x", "#", "&& touch PWNED"]  # fmt: skip
text = st.one_of(
    st.sampled_from(HOSTILE),
    st.text(st.characters(blacklist_characters="\0/", blacklist_categories=["Cs"]), min_size=1, max_size=12),
    st.lists(st.sampled_from(HOSTILE), min_size=2, max_size=3).map("".join),
).filter(lambda name: name not in (".", "..") and len(name.encode()) < 120)


def bash(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    (folder / "script").write_text(script)
    return subprocess.run(
        ["bash", str(folder / "script")], env={"PATH": f"{folder}/bin:/usr/bin:/bin", **environment}, cwd=folder,
        capture_output=True, timeout=20, check=False,
    )  # fmt: skip


def stand_in(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


RECORD = 'printf "%s\\0" "$PWD" "$PYTHONPATH" "$@" "--end--" >>"$RECORD"\n'
SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "SLURM_PROCID": "0", "SLURM_ARRAY_TASK_ID": "2",
         "SLURM_ARRAY_JOB_ID": "7"}  # fmt: skip


def stage(folder: Path, python: Path, code: int = 0) -> None:
    """Stand-ins on PATH: srun runs its command once, scontrol answers with one host, python ends with `code`."""
    shift = 'while [[ "$1" == --* ]]; do printf "%s\\0" "$1" >>"$RECORD.srun"; shift; done\n'
    stand_in(folder / "bin" / "srun", shift + '"$@"')
    stand_in(
        folder / "bin" / "scontrol", 'if [ "$1" = show ]; then echo node1; else echo "$@" >>"$RECORD.scontrol"; fi'
    )
    stand_in(python, RECORD + f'[ "$2" = pipeline ] && exit {code}\nexit 0')


def calls(record: Path) -> list[list[str]]:
    words = record.read_bytes().decode("utf-8", "surrogateescape").split("\0")[:-1]
    found: list[list[str]] = [[]]
    for word in words:
        if word == "--end--":
            found.append([])
        else:
            found[-1].append(word)
    return found[:-1]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text, text, text, text, text)
@example(*HOSTILE[:5])
@example("\n#SBATCH --uid=0\n", "\n", "a\nb", "$(touch PWNED)\n", "`touch PWNED`")
def test_no_value_changes_what_the_script_does(run: str, work: str, name: str, typed: str, srun_value: str) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        job_dir, work_dir, python = folder / "r" / run, folder / "w" / work, folder / "p" / name / "python"
        job_dir.mkdir(parents=True)
        work_dir.mkdir(parents=True)
        stage(folder, python)
        job = Job(job_name(name), typed, str(job_dir), str(job_dir / "logs"), str(work_dir), str(python),
                  srun_options={"comment": srun_value})  # fmt: skip
        record = folder / "record"
        for script, box in (
            (train_script(job), "pipeline"),
            (build_script(job, 4), "data_prep"),
            (merge_script(job), ""),
        ):
            record.unlink(missing_ok=True)
            (folder / "record.srun").unlink(missing_ok=True)
            done = bash(script, folder, RECORD=str(record), **SLURM)
            assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
            called = calls(record)
            assert {call[0] for call in called} == {str(work_dir)}
            assert {call[1] for call in called} == {f"{job_dir}/code"}
            config = f"{job_dir}/config.json"
            if box == "pipeline":
                assert called[0][2:] == ["-m", "pipeline", "train", config, "--resume", "auto"]
                assert called[1][2:] == ["-m", "cluster", "requeue", str(job_dir), "--job", "7", "--code", "0"]
            elif box == "data_prep":
                assert called[0][2:] == ["-m", "data_prep", "build", config, "--task", "2", "--tasks", "4"]
            else:
                assert called[0][2:] == ["-m", "data_prep", "merge", config]
            assert f"--comment={srun_value}".encode() in (folder / "record.srun").read_bytes().split(b"\0")
        assert not list(folder.rglob("PWNED"))


@given(text)
def test_sbatch_sees_only_our_directives(value: str) -> None:
    """Every line of the head that sbatch would read is one we rendered, whatever the values hold."""
    job = Job("x", value, f"/r/{value}", f"/l/{value}", f"/w/{value}", f"/p/{value}", options={"account": "eo"})
    for line in train_script(job).splitlines():
        assert not line.startswith("#SBATCH") or line.split("=")[0].split()[1].lstrip("-") in (
            "job-name", "output", "nodes", "ntasks-per-node", "open-mode", "requeue", "signal", "account",
        )  # fmt: skip
    body = train_script(job).splitlines()
    first_shell_line = next(i for i, line in enumerate(body) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in body[first_shell_line:])


@given(
    st.lists(st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=30), min_size=10)
)
@settings(max_examples=10, deadline=None)
def test_quote_is_one_word_on_one_line(values: list[str]) -> None:
    words = [quote(value) for value in values]
    assert all(len(word.splitlines()) <= 1 for word in words)
    echoed = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {' '.join(words)}"], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"}
    )
    assert echoed.stdout.decode().split("\0")[:-1] == values


def test_values_no_option_can_hold_are_refused() -> None:
    with pytest.raises(UsageError, match="NUL"):
        quote("a\0b")
    with pytest.raises(UsageError, match="line break"):
        option("comment", "a\nb")
    with pytest.raises(UsageError, match="long option name"):
        option("wrap=x --uid", "0")
    with pytest.raises(UsageError, match="collides"):
        train_script(Job("x", "", "/j", "/l", "/w", "/p", options={"nodes": "9"}))


@pytest.mark.parametrize(
    ("trainer", "marked", "seen"), [(0, False, 0), (REQUEUE, True, 0), (1, False, 1), (2, False, 2)]
)
def test_the_trainers_exit_code_reaches_the_decision(trainer: int, marked: bool, seen: int, tmp_path: Path) -> None:
    """ "Checkpointed, requeue me" becomes a mark and code 0, so that srun ends no rank that still closes its files."""
    python, record = tmp_path / "python", tmp_path / "record"
    stage(tmp_path, python, trainer)
    job = Job("x", "", str(tmp_path), str(tmp_path / "logs"), str(tmp_path), str(python))
    bash(train_script(job), tmp_path, RECORD=str(record), **SLURM)
    assert calls(record)[1][2:] == ["-m", "cluster", "requeue", str(tmp_path), "--job", "7", "--code", str(seen)]
    assert (tmp_path / "checkpointed-7").exists() == marked


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_signal_to_the_script_reaches_the_ranks_and_is_waited_for(name: str, tmp_path: Path) -> None:
    python, record = tmp_path / "python", tmp_path / "record"
    stage(tmp_path, python)
    stand_in(python, RECORD + f'[ "$2" = cluster ] && exit 0\ntrap "exit {REQUEUE}" USR1\nkill -{name} $BATCH\n'
                              'while :; do sleep 0.01; done')  # fmt: skip
    # srun hands signals on to its tasks, and answers with the tasks' code: a `wait` that a signal ended (138) is asked again,
    # even where the task has ended by then.
    stand_in(tmp_path / "bin" / "srun", 'trap \'s=1; kill -USR1 -- -$!\' USR1\nset -m\n'
             'while [[ "$1" == --* ]]; do shift; done\nexport BATCH=$PPID\n"$@" & t=$!\nc=1\n'
             'while :; do s=; wait $t; a=$?; [ $a -ne 127 ] && c=$a; [ -z "$s" ] && break; done\nexit $c')  # fmt: skip
    job = Job("x", "", str(tmp_path), str(tmp_path / "logs"), str(tmp_path), str(python))
    bash(train_script(job), tmp_path, RECORD=str(record), **SLURM)
    assert calls(record)[1][2:] == [
        "-m",
        "cluster",
        "requeue",
        str(tmp_path),
        "--job",
        "7",
        "--code",
        "0",
        "--asked-to-stop",
    ]
    assert (tmp_path / "checkpointed-7").exists()
    assert f"{name}: asking the ranks" in (tmp_path / "logs" / "batch.log").read_text()


@pytest.mark.parametrize(
    ("reason", "before", "requeued"), [("TimeLimit", 0, True), ("None", 0, False), ("TimeLimit", 10, False)]
)
def test_a_job_cut_off_at_its_time_limit_comes_back(reason: str, before: int, requeued: bool, tmp_path: Path) -> None:
    """The checkpoint did not come in time and SIGTERM has: the script requeues at once, but not for ever, and not when cancelled."""
    python, record = tmp_path / "python", tmp_path / "record"
    stage(tmp_path, python)
    stand_in(
        tmp_path / "bin" / "scontrol",
        f'if [ "$1" = show ]; then echo "node1 Reason={reason}"; else echo "$@" >>"$RECORD.q"; fi',
    )
    stand_in(tmp_path / "bin" / "srun", "kill -TERM $PPID; sleep 0.1; exit 0")
    if before:
        (tmp_path / "cut_off").write_text("cut off\n" * before)
    job = Job("x", "", str(tmp_path), str(tmp_path / "logs"), str(tmp_path), str(python))
    bash(train_script(job), tmp_path, RECORD=str(record), **SLURM)
    assert (tmp_path / "record.q").exists() == requeued


def test_a_stopped_or_finished_run_is_not_started_again(tmp_path: Path) -> None:
    stage(tmp_path, tmp_path / "python")
    job = Job("x", "", str(tmp_path), str(tmp_path / "logs"), str(tmp_path), str(tmp_path / "python"))
    for mark, code in (("finished", 0), ("stopped", 1)):
        (tmp_path / mark).write_text("why\n")
        assert bash(train_script(job), tmp_path, RECORD=str(tmp_path / "record"), **SLURM).returncode == code
    assert not (tmp_path / "record").exists()
    assert os.listdir(tmp_path / "logs") == ["batch.log"]


@pytest.mark.parametrize(
    ("marks", "starts"),
    [
        ({"stopped": "why", "successor": "7"}, True),  # this job is the one that took the run over
        ({"stopped": "why", "successor": "17"}, False),
        ({"stopped-7": "why"}, False),
        ({"stopped-8": "why", "checkpointed-8": ""}, True),  # the same script, sent a second time, was refused
        ({"stopped": "why", "stopped-7": "why", "successor": "7"}, False),
    ],
)
def test_a_mark_stops_whom_it_is_meant_for(marks: dict[str, str], starts: bool, tmp_path: Path) -> None:
    stage(tmp_path, tmp_path / "python")
    job = Job("x", "", str(tmp_path), str(tmp_path / "logs"), str(tmp_path), str(tmp_path / "python"))
    for name, line in marks.items():
        (tmp_path / name).write_text(f"{line}\n")
    done = bash(train_script(job), tmp_path, RECORD=str(tmp_path / "record"), **SLURM)
    assert (done.returncode, (tmp_path / "record").exists()) == ((0, True) if starts else (1, False))
    assert ("and send this script again" in (tmp_path / "logs" / "batch.log").read_text()) == (not starts)
    assert {path.name for path in tmp_path.iterdir()} >= set(marks)  # another job's marks are left alone


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text, text)
@example("$(touch PWNED)", "a b")
def test_a_task_of_an_array_is_a_training_job_in_its_own_folder(run: str, other: str) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        job_dir, python = folder / "r" / run, folder / "python"
        logs = [str(folder / "logs" / str(i) / name) for i, name in enumerate((other, "b", run, "d"))]
        for task in range(4):
            Path(task_folder(str(job_dir), task)).mkdir(parents=True)
        stage(folder, python, code=1)
        job = Job("n", "c", str(job_dir), "unused", str(folder), str(python), nodes=1)
        script = array_script(job, logs, parallel=3)
        assert "#SBATCH --array=0-3%3\n" in script
        bash(script, folder, RECORD=str(folder / "record"), **SLURM)
        trained, asked = calls(folder / "record")
        mine = task_folder(str(job_dir), 2)
        assert trained[1:] == [f"{job_dir}/code", "-m", "pipeline", "train", f"{mine}/config.json", "--resume", "auto"]
        assert asked[2:] == ["-m", "cluster", "requeue", mine, "--job", "7_2", "--code", "1"]
        assert (Path(logs[2]) / "batch.log").exists()
        assert not list(folder.rglob("PWNED"))


def test_the_report_reads_the_plan_with_the_frozen_code(tmp_path: Path) -> None:
    stage(tmp_path, tmp_path / "python")
    job = Job("n", "c", str(tmp_path / "j"), str(tmp_path / "logs"), str(tmp_path), str(tmp_path / "python"), nodes=4)
    script = report_script(job, f"{tmp_path}/j/plan.json")
    assert "#SBATCH --nodes=1\n" in script
    assert bash(script, tmp_path, RECORD=str(tmp_path / "record"), **SLURM).returncode == 0
    [compared] = calls(tmp_path / "record")
    assert compared[1:] == [f"{tmp_path}/j/code", "-m", "pipeline", "ablate", f"{tmp_path}/j/plan.json", "--compare"]


@pytest.mark.parametrize(("code", "chained"), [(REQUEUE, False), (REQUEUE, True), (1, False)])
def test_a_requeue_that_the_controller_forgets_is_asked_for_again(code: int, chained: bool, tmp_path: Path) -> None:
    """It is killed right after it has taken the request (its SIGTERM comes first), is away, and comes back with the job as running.
    The script ends once it must have written the request down; at once where nothing was to be requeued."""
    python, record = tmp_path / "python", tmp_path / "record"
    stage(tmp_path, python)
    stand_in(python, RECORD + f'[ "$2" = cluster ] && {{ kill -TERM $PPID; exit {code}; }}\nexit 0')
    stand_in(tmp_path / "bin" / "sleep", "exit 0")
    stand_in(
        tmp_path / "bin" / "scontrol",
        '[ "$2" = hostnames ] && { echo node1; exit; }\n[ "$1" = requeue ] && { echo "$2" >>"$RECORD.q"; exit; }\n'
        'echo x >>"$RECORD.show"; n=$(wc -l <"$RECORD.show")\n'
        '[ $n -eq 3 ] && exit 1\n[ $n -eq 4 ] && { echo "JobId=7 JobState=RUNNING"; exit; }\necho "JobId=7 JobState=COMPLETING"',
    )
    job = Job("x", "", str(tmp_path), str(tmp_path / "logs"), str(tmp_path), str(python), chained=chained)
    assert bash(train_script(job), tmp_path, RECORD=str(record), **SLURM).returncode == code
    asked = (tmp_path / "record.show").read_text().count("x") if (tmp_path / "record.show").exists() else 0
    again = (tmp_path / "record.q").read_text() if (tmp_path / "record.q").exists() else ""
    assert (asked, again) == ((10, "7\n") if code == REQUEUE and not chained else (0, ""))
