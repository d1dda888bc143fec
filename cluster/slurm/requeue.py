"""After the ranks have ended: is the run done, does it go back into the queue, or is trying again of no use?

`decide` is a pure function over the history of a run's starts; the batch script asks through `python -m cluster requeue`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from cluster import storage
from cluster.exit_codes import DONE, FENCED, USAGE

NO_PROGRESS_LIMIT = 10
"""Starts in a row that came no further than the one before them: a time limit too short for start-up looks like this."""

LOOP, LOOP_SHARE, LOOP_STEPS = 20, 0.01, 20
"""So many failures in a row with the same error are a loop, if all of them together came less far than LOOP_SHARE of the run
(LOOP_STEPS steps, where its length is not known)."""


UNDECIDED = "undecided"


@dataclasses.dataclass(frozen=True)
class Attempt:
    """How one start of a run ended. code: srun's; step: last step logged; error: the first failing rank's, or the code's;
    saved: step of the newest checkpoint then (None: not known)."""

    job: str
    restart: int
    code: int
    step: int
    error: str
    checkpointed: bool
    asked_to_stop: bool = False
    saved: int | None = None

    @property
    def reached(self) -> int:
        """How far the run has come for good: what a further start does not have to do again."""
        return self.step if self.saved is None else self.saved

    @property
    def failed(self) -> bool:
        return self.code != DONE and not self.checkpointed


@dataclasses.dataclass(frozen=True)
class Decision:
    """action: `done`, `requeue`, `stop` (for good), `leave` (SLURM itself ends or requeues the job); why: one line."""

    action: Literal["done", "requeue", "stop", "leave"]
    why: str


def decide(
    attempt: Attempt,
    earlier: Sequence[Attempt],
    ended_by_slurm: bool = False,
    max_requeues: int | None = None,
    total_steps: int | None = None,
    fenced_by: str | None = None,
) -> Decision:
    """What to do after `attempt`, given the attempts before it (oldest first).

    A failure is forgotten as soon as the run has come further: only starts since then are compared with it. total_steps: length
    of the run. fenced_by: who has taken the run directory over, if anybody has.
    """
    if attempt.code == DONE and not attempt.checkpointed:
        return Decision("done", f"finished at step {attempt.step}")
    if attempt.code == FENCED or fenced_by:
        return Decision(
            "stop", f"{fenced_by or 'another start'} has taken over this run's directory; it goes on there, not here"
        )
    if attempt.code == USAGE:
        return Decision("stop", f"bad configuration, starting again cannot help: {attempt.error}")
    if ended_by_slurm:
        return Decision(
            "leave", "SLURM is ending this start itself: cancelled, or put back into the queue by someone else"
        )
    if max_requeues is not None and len(earlier) >= max_requeues:
        return Decision("stop", f"the limit of {max_requeues} requeues is reached")
    recent = since_progress(attempt, earlier)
    if attempt.failed and any(same_failure(attempt, other) for other in recent):
        return Decision("stop", f"failed twice at step {attempt.step} with the same error: {attempt.error}")
    if len(recent) >= NO_PROGRESS_LIMIT - 1:
        hint = attempt.error if attempt.failed else "the time limit may be too short to start up"
        return Decision(
            "stop", f"{NO_PROGRESS_LIMIT} starts in a row came no further than step {attempt.reached}; {hint}"
        )
    if not attempt.failed:
        return Decision("requeue", f"checkpointed after a signal at step {attempt.step}")
    advance = loop_advance(attempt, earlier)
    if advance is not None and advance < (LOOP_SHARE * total_steps if total_steps else LOOP_STEPS):
        return Decision(
            "stop", f"{LOOP} failures in a row with the same error, and {advance} steps between them: {attempt.error}"
        )
    return Decision("requeue", f"failed at step {attempt.step} for the first time like this: {attempt.error}")


def since_progress(attempt: Attempt, earlier: Sequence[Attempt]) -> Sequence[Attempt]:
    """The earlier attempts from the one on that first came as far as any did; none if `attempt` came further."""
    best = max((other.reached for other in earlier), default=-1)
    if attempt.reached > best:
        return ()
    return earlier[next(i for i, other in enumerate(earlier) if other.reached == best) :]


def loop_advance(attempt: Attempt, earlier: Sequence[Attempt]) -> int | None:
    """Steps that the last LOOP starts came forward together, if all of them failed with the same error; else None."""
    last = [*earlier[-LOOP + 1 :], attempt]
    if len(last) < LOOP or any(not one.failed or signature(one.error) != signature(attempt.error) for one in last):
        return None
    return attempt.reached - last[0].reached


def is_ended_by_slurm(fields: Mapping[str, str]) -> bool:
    """Whether a job (as `scontrol show job` has it) was cancelled or requeued from outside while its script still runs.

    SLURM shows both as COMPLETING; requeueing again would bring a cancelled job back. A job at its time limit looks the
    same but for the reason, and does want to come back.
    """
    state = fields.get("JobState", "")
    return state.startswith("CANCELLED") or (state == "COMPLETING" and fields.get("Reason") != "TimeLimit")


def same_failure(a: Attempt, b: Attempt) -> bool:
    """Same step, same error, where addresses, process ids and the like do not count."""
    return a.failed and b.failed and a.step == b.step and signature(a.error) == signature(b.error)


def signature(error: str) -> str:
    """An error message without what differs from start to start: hex numbers, times, host names' and ids' digits."""
    return re.sub(r"0x[0-9a-fA-F]+|\d+(?:[.:]\d+)*", "#", error)[:500]


def read_attempts(job_dir: str) -> list[Attempt]:
    """Attempts recorded under a job directory, oldest first."""
    try:
        records: list[dict[str, Any]] = json.loads(storage.read_bytes(storage.join(job_dir, "attempts.json")))
    except FileNotFoundError:
        return []
    names = {field.name for field in dataclasses.fields(Attempt)}
    return [Attempt(**{key: value for key, value in record.items() if key in names}) for record in records]


def record_attempt(
    job_dir: str, attempt: Attempt, decision: Decision | None, successor: str | None = None, again: bool = False
) -> None:
    """Adds to `attempts.json` (again: replaces this start's record), decision None meaning that it is still open; marks tell later
    starts that nothing is left to do.

    `finished` and `stopped` speak to every job of the folder (links of a chain, and the same script sent a second time), a bad
    configuration only of the job that met it: it may be that another job of the folder is at work, and must not be ended by the
    mark. successor: the job that took the run over; the mark is not meant for it.
    """
    url = storage.join(job_dir, "attempts.json")
    records = json.loads(storage.read_bytes(url)) if storage.exists(url) else []
    if again:
        own = [i for i, one in enumerate(records) if (one["job"], one["restart"]) == (attempt.job, attempt.restart)]
        del records[own[-1]]
    told = (
        dataclasses.asdict(decision)
        if decision
        else {"action": UNDECIDED, "why": "the SLURM controller is being asked"}
    )
    records.append({**dataclasses.asdict(attempt), **told})
    storage.write_atomic(url, json.dumps(records, indent=1).encode())
    if decision is None:
        return
    storage.remove(storage.join(job_dir, "cut_off"))  # this start came to an orderly end: the script counts anew
    mark = {"stop": "stopped", "done": "finished"}.get(decision.action)
    if mark == "stopped" and attempt.code == USAGE:
        mark = f"stopped-{attempt.job}"
    if mark:
        if successor:
            storage.write_atomic(storage.join(job_dir, "successor"), f"{successor}\n".encode())
        storage.write_atomic(storage.join(job_dir, mark), f"{decision.why}\n".encode())
