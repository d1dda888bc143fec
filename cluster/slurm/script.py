"""Renders batch scripts that a person can read and that no value can change the meaning of.

Two places take values, each with its own quoting: `#SBATCH` lines, which sbatch reads (`option`), and shell assignments,
which bash reads (`quote`). Values stand in assignments at the head only; the body is fixed text that uses `"$NAME"`.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Mapping, Sequence

from cluster.errors import UsageError
from cluster.exit_codes import REQUEUE
from cluster.ranks import FIRST_PORT, NUM_PORTS


@dataclasses.dataclass(frozen=True)
class Job:
    """What a batch script needs to know.

    job_dir: folder of this submission on a file system that all nodes see (script, frozen code, config, attempts);
    logs_dir: where rank logs go; work_dir: where relative paths of the config start; options: sbatch long options
    (None: a flag without value); srun_options: the same for srun; signal_s: how long before the end of the allocation the
    ranks are told to write a checkpoint; python: interpreter of the node, which runs what is outside a container; rank_python:
    that of the ranks inside one (None: the same).
    """

    name: str
    command: str
    job_dir: str
    logs_dir: str
    work_dir: str
    python: str
    rank_python: str | None = None
    nodes: int = 1
    tasks_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_task: int | None = None
    signal_s: int = 120
    chained: bool = False
    options: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    srun_options: Mapping[str, str | None] = dataclasses.field(default_factory=dict)


def train_script(job: Job) -> str:
    """The batch script of a training run: one task per GPU, checkpoint on a signal, back into the queue."""
    settings = _train_settings(job)
    head = _head(job, settings, {"CHAINED": "1" if job.chained else ""})
    return head + 'SELF="$SLURM_JOB_ID"\n' + _train_body(job)


def array_script(job: Job, logs_dirs: Sequence[str], parallel: int | None = None) -> str:
    """Training runs as one job array, each task exactly as `train_script` has it, in the folder `task_folder` of job.job_dir.

    logs_dirs: by task, where its rank logs go; parallel: tasks at a time at most.
    """
    at_a_time = f"%{parallel}" if parallel else ""
    settings = {"array": f"0-{len(logs_dirs) - 1}{at_a_time}", **_train_settings(job)}
    folders = " ".join(quote(path) for path in logs_dirs)
    return _head(job, settings, {"CHAINED": ""}) + ARRAY_HEAD.replace("@LOGS@", folders) + _train_body(job)


def task_folder(job_dir: str, task: int) -> str:
    """Folder of one task of an array: its config, its attempts. `ARRAY_HEAD` says the same in bash."""
    return f"{job_dir}/{task:05d}"


def report_script(job: Job, plan: str) -> str:
    """The job after an array of runs, which compares those that are finished. plan: file that says which runs they are."""
    settings: dict[str, str | None] = {"nodes": "1", "ntasks": "1", "open-mode": "append", "requeue": None}
    head = _head(dataclasses.replace(job, name=job_name(f"{job.name}-report")), settings, {"PLAN": plan})
    return head + REPORT_BODY.replace("@SRUN@", _srun(dataclasses.replace(job, cpus_per_task=None)))


def build_script(job: Job, tasks: int) -> str:
    """The batch script of a shard build: a job array, one builder process per array task."""
    settings: dict[str, str | None] = {
        "array": f"0-{tasks - 1}", "nodes": "1", "ntasks": "1", "open-mode": "append", "requeue": None,
        "signal": f"B:USR1@{job.signal_s}", **_resources(job),
    }  # fmt: skip
    return _head(job, settings, {"TASKS": str(tasks)}) + BUILD_BODY.replace("@SRUN@", _srun(job))


def merge_script(job: Job) -> str:
    """The job that writes index and manifest, submitted with a dependency on the array. (The last array task to finish does
    so too; this job succeeds only if all shards are there.)"""
    settings: dict[str, str | None] = {
        "nodes": "1", "ntasks": "1", "open-mode": "append", "requeue": None, "kill-on-invalid-dep": "yes",
        **_resources(dataclasses.replace(job, gpus_per_node=0)),
    }  # fmt: skip
    head = _head(dataclasses.replace(job, name=f"{job.name}-merge"), settings, {})
    return head + MERGE_BODY.replace("@SRUN@", _srun(job))


def quote(value: str) -> str:
    """`value` as one bash word on one line, whatever it holds. Raises UsageError for a NUL, which no argument can hold."""
    if "\0" in value:
        raise UsageError(f"{value!r} holds a NUL character, which neither paths nor arguments can")
    if all(c.isprintable() for c in value):
        return shlex.quote(value)
    return "$'" + "".join(_ansi_c(c) for c in value) + "'"


def option(name: str, value: str | None) -> str:
    """One `#SBATCH` line. sbatch reads double quotes with backslash escapes, and nothing that spans lines."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name):
        raise UsageError(f"sbatch option {name!r} is not a long option name such as partition or mail-type")
    if value is None:
        return f"#SBATCH --{name}"
    if any(not c.isprintable() for c in value):
        raise UsageError(
            f"sbatch option --{name}={value!r} holds a line break or control character; sbatch cannot take it"
        )
    if re.fullmatch(r"[\w.,:@%+=/\[\]~-]+", value, re.ASCII):
        return f"#SBATCH --{name}={value}"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'#SBATCH --{name}="{escaped}"'


def job_name(text: str) -> str:
    """A name that every SLURM tool prints plainly."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-")[:80] or "geoloom"


def _train_settings(job: Job) -> dict[str, str | None]:
    return {
        "nodes": str(job.nodes), "ntasks-per-node": str(job.tasks_per_node), "open-mode": "append", "requeue": None,
        "signal": f"B:USR1@{job.signal_s}", **_resources(job),
    }  # fmt: skip


KEPT_S = 6
"""After so many seconds slurmctld has written its state down (it does so at most 5 s after a change)."""


def _train_body(job: Job) -> str:
    values = {"REQUEUE": str(REQUEUE), "SRUN": _srun(job), "FIRST_PORT": str(FIRST_PORT), "NUM_PORTS": str(NUM_PORTS),
              "KEPT": str(KEPT_S)}  # fmt: skip
    return re.sub(r"@([A-Z_]+)@", lambda match: values[match[1]], TRAIN_BODY)


def _ansi_c(character: str) -> str:
    if character in "'\\":
        return "\\" + character
    if character.isprintable():
        return character
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogateescape"))


def _resources(job: Job) -> dict[str, str | None]:
    resources: dict[str, str | None] = {}
    if job.gpus_per_node:
        resources["gpus-per-node"] = str(job.gpus_per_node)
    if job.cpus_per_task:
        resources["cpus-per-task"] = str(job.cpus_per_task)
    return resources


def _head(job: Job, settings: Mapping[str, str | None], variables: Mapping[str, str]) -> str:
    for name in job.options:
        if name in settings or name in ("job-name", "output", "error"):
            raise UsageError(f"--sbatch {name}=… collides with what submit sets itself; use submit's own option for it")
    lines = [option(key, value) for key, value in {"job-name": job.name, "output": "/dev/null", **settings}.items()]
    lines += [option(key, value) for key, value in job.options.items()]
    values = {
        "JOB_DIR": job.job_dir, "CODE": f"{job.job_dir}/code", "LOGS": job.logs_dir, "WORK_DIR": job.work_dir, "PYTHON": job.python,
        "RANK_PYTHON": job.rank_python or job.python, **variables
    }  # fmt: skip
    assignments = [f"{key}={quote(value)}" for key, value in values.items()]
    comment = "".join(c if c.isprintable() else "?" for c in job.command)
    return "\n".join(
        ["#!/bin/bash", f"# {comment}", "# Rendered by that command; sbatch this file to run it again.", *lines, "",
         *assignments, ""]
    )  # fmt: skip


def _srun(job: Job) -> str:
    """srun's further options as bash words, each on the command line once."""
    words: Sequence[str] = [
        f"--{key}" if value is None else quote(f"--{key}={value}") for key, value in job.srun_options.items()
    ]
    for key in job.srun_options:
        option(key, None)  # the name itself must be plain
    if job.cpus_per_task:  # srun no longer takes it over from sbatch (22.05)
        words = [f"--cpus-per-task={job.cpus_per_task}", *words]
    return "".join(f" {word}" for word in words)


ARRAY_HEAD = """LOGS_OF=(@LOGS@)
JOB_DIR="$JOB_DIR/$(printf %05d "$SLURM_ARRAY_TASK_ID")"
LOGS="${LOGS_OF[$SLURM_ARRAY_TASK_ID]}"
SELF="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"   # its plain number may be that of the whole array

"""

COMMON_BODY = """
set -u
mkdir -p -- "$LOGS" && exec >>"$LOGS/$LOG_NAME" 2>&1
cd -- "$WORK_DIR" || exit 1
export PYTHONPATH="$CODE${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1   # the frozen code, not the checkout's
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
echo "--- $(date -Is) job ${SLURM_JOB_ID}, start ${SLURM_RESTART_COUNT:-0}, on ${SLURM_JOB_NODELIST}"
"""

TRAIN_BODY = (
    r"""LOG_NAME=batch.log
umask "${GEOLOOM_UMASK:-077}"

# Preemption, time limit (USR1, ahead of the end) and SIGTERM: tell the ranks, then go on waiting for them.
asked_to_stop= signalled= srun_pid=
stop() {
    asked_to_stop=1 signalled=1
    echo "$(date -Is) $1: asking the ranks for a checkpoint"
    [ -n "$srun_pid" ] && kill -USR1 "$srun_pid" 2>/dev/null
    # SIGTERM at the time limit: what was asked for ahead of it has not come in time, and the end is seconds away. Back into the
    # queue now, to go on from the last checkpoint; ten times in a row at most.
    if [ "$1" = TERM ] && scontrol show job "$SELF" | grep -q Reason=TimeLimit; then
        echo "cut off" >>"$JOB_DIR/cut_off"
        [ "$(wc -l <"$JOB_DIR/cut_off")" -le 10 ] && scontrol requeue "$SELF"
    fi
}
trap 'stop USR1' USR1
trap 'stop TERM' TERM
"""
    + COMMON_BODY
    + r"""
# `stopped` holds for every job of this folder but the one that took the run over, `stopped-JOB` for that job alone.
stopped="$JOB_DIR/stopped-$SLURM_JOB_ID"
[ -e "$JOB_DIR/stopped" ] && ! grep -qsx -- "$SLURM_JOB_ID" "$JOB_DIR/successor" && stopped="$JOB_DIR/stopped"
if [ -e "$stopped" ]; then
    echo "not started: an earlier start decided that trying again is of no use:"; cat -- "$stopped"
    echo "when what it names is mended, submit again, or remove $stopped and send this script again"; exit 1
fi
if [ -e "$JOB_DIR/finished" ]; then echo "nothing to do: the run is finished"; exit 0; fi
checkpointed="$JOB_DIR/checkpointed-$SLURM_JOB_ID"   # this job's own: the script may have been sent twice
rm -f -- "$checkpointed"

# Where the ranks meet.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((@FIRST_PORT@ + SLURM_JOB_ID % @NUM_PORTS@))   # below the ports that Linux hands out to connections
export MASTER_ADDR MASTER_PORT JOB_DIR LOGS RANK_PYTHON checkpointed

# What each task does. srun signals its whole process group, so the shell ignores what is meant for the trainer.
# "Checkpointed, requeue me" must not look like a crash to --kill-on-bad-exit, which would end ranks that still close files.
run_rank() {
    trap : USR1 TERM
    GEOLOOM_RANK_LOG="$LOGS/rank-$(printf %05d "$SLURM_PROCID").log"
    export GEOLOOM_RANK_LOG
    exec >>"$GEOLOOM_RANK_LOG" 2>&1
    echo "--- job $SLURM_JOB_ID start ${SLURM_RESTART_COUNT:-0} rank $SLURM_PROCID on $(uname -n)"
    "$RANK_PYTHON" -m pipeline train "$JOB_DIR/config.json" --resume auto
    code=$?
    case $code in
        @REQUEUE@ | 138 | 143) : >"$checkpointed"; exit 0 ;;   # 138, 143: the signal came before the trainer was up
    esac
    exit $code
}
export -f run_rank

srun --export=ALL --kill-on-bad-exit=1 --wait=120@SRUN@ bash -c run_rank &
srun_pid=$!
[ -n "$asked_to_stop" ] && kill -USR1 "$srun_pid"
code=1
while :; do   # `wait` also returns when a trap ran: then ask again; 127: the wait before had its answer already
    signalled=
    wait "$srun_pid"; answer=$?
    [ $answer -ne 127 ] && code=$answer
    [ -z "$signalled" ] && break
done
echo "$(date -Is) ranks ended with code $code"

# Finished, back into the queue, or no use to try again: one place decides, and says why in attempts.json. The requeue itself ends
# this script (SIGTERM, and SIGKILL after KillWait): ignored from here on, by what is called here too.
trap '' TERM USR1
"$PYTHON" -m cluster requeue "$JOB_DIR" --job "$SELF" --code "$code" ${asked_to_stop:+--asked-to-stop} ${CHAINED:+--chained}
code=$?
# A controller writes down what it has been told some seconds later. One that dies before comes back with this job as running, and
# would take the end of this script for the run's: so it is asked until it must have written, and told again if it has forgotten.
kept=0
for (( i = 0; i < 90 && kept < @KEPT@; i++ )); do
    [ $code -eq @REQUEUE@ ] && [ -z "${CHAINED:-}" ] || break
    sleep 1
    answer=$(scontrol show job "$SELF" 2>/dev/null) || { kept=0; continue; }   # it is away
    case $answer in
        *JobState=RUNNING*) kept=0; echo "$(date -Is) the controller has forgotten the requeue"; scontrol requeue "$SELF" ;;
        *) kept=$((kept + 1)) ;;
    esac
done
exit $code
"""
)

BUILD_BODY = (
    """LOG_NAME=build-$(printf %05d "$SLURM_ARRAY_TASK_ID").log
"""
    + COMMON_BODY
    + r"""
# Time limit: builders write whole shards or nothing, so end this one and take its task up again. (A preempted task is
# requeued by SLURM itself, a cancelled one must not be: SIGTERM only ends.)
srun_pid=
stop() {
    echo "$(date -Is) $1: ending task $SLURM_ARRAY_TASK_ID"
    [ -n "$srun_pid" ] && kill -TERM "$srun_pid" 2>/dev/null && wait "$srun_pid"
    if [ "$1" = USR1 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 10 ]; then
        scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
    fi
    exit 1
}
trap 'stop USR1' USR1
trap 'stop TERM' TERM

srun --export=ALL --ntasks=1@SRUN@ "$RANK_PYTHON" -m data_prep build "$JOB_DIR/config.json" --task "$SLURM_ARRAY_TASK_ID" --tasks "$TASKS" &
srun_pid=$!
wait "$srun_pid"
exit $?
"""
)

MERGE_BODY = (
    """LOG_NAME=merge.log
"""
    + COMMON_BODY
    + r"""
srun --export=ALL --ntasks=1@SRUN@ "$RANK_PYTHON" -m data_prep merge "$JOB_DIR/config.json"
exit $?
"""
)

REPORT_BODY = (
    """LOG_NAME=report.log
"""
    + COMMON_BODY
    + r"""
srun --export=ALL --ntasks=1@SRUN@ "$RANK_PYTHON" -m pipeline ablate "$PLAN" --compare
exit $?
"""
)
