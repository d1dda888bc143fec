"""Where a run continues: the newest checkpoint that proves whole, on every rank the same one."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch.distributed as dist

from cluster import storage
from cluster.config import flatten, to_dict
from cluster.errors import RunFailure, UsageError
from cluster.lease import Lease
from cluster.ranks import Ranks
from cluster.rundir import RunDir
from pipeline.checkpoint import store
from pipeline.checkpoint.load import check_fits, open_files, restore, restore_buffers, wanted_parts
from pipeline.checkpoint.store import Checkpoint
from pipeline.config import PretrainConfig
from pipeline.health import AgreedFailure
from pipeline.parallel.processes import agree_max
from pipeline.tracking.writer import fate, runs

log = logging.getLogger(__name__)


def take_over(rundir: RunDir, ranks: Ranks) -> None:
    """The first rank takes the run directory for this start; every rank then holds its lease. Collective."""
    box: list[Any] = [None]
    if ranks.is_first:
        rundir.claim()
        assert rundir.lease is not None
        box = [rundir.lease.record]
    if ranks.world > 1:
        dist.broadcast_object_list(box, src=0)
    if rundir.lease is None:
        rundir.lease = Lease.of(rundir.url, box[0])
    else:
        rundir.lease.watch()


def candidates(resume: str, rundir: RunDir, rank: int, copies: str = "") -> list[str]:
    """Checkpoint URLs to try, in order; the same on all ranks. Empty: start at step 0. copies: the second place, or empty.

    Raises:
        UsageError: `never` where checkpoints stand, a PATH that is none, or a run that another process is writing.
    """
    box: list[Any] = [None]
    if rank == 0:
        try:
            box = [_candidates(resume, rundir, copies)]
        except UsageError as error:
            box = [str(error)]
    dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], str):
        raise UsageError(box[0])
    return list(box[0])


def _candidates(resume: str, rundir: RunDir, copies: str) -> list[str]:
    _refuse_while_written(rundir)
    own = [*store.committed(rundir.checkpoints_url), *_copied(copies)]
    own.sort(
        key=lambda url: int(storage.name(url).rpartition("-")[2]), reverse=True
    )  # stable: of one step, the run's own first
    if resume == "auto":
        return own
    if resume == "never":
        if own:
            raise UsageError(
                f"{rundir.url} holds checkpoints up to {storage.name(own[0])} ({own[0]}); use --resume auto to continue it, or another run.dir"
            )
        return []
    chosen = store.resolve(resume)
    later = [url for url in own if storage.name(url) > storage.name(chosen)]
    if later:
        raise UsageError(
            f"{rundir.url} holds {later[0]}, later than {resume}; remove it to go back, or use another run.dir"
        )
    return [chosen]


def _copied(copies: str) -> list[str]:
    """Checkpoints of the second place; one that is away holds up no start."""
    try:
        return store.committed(copies) if copies else []
    except (OSError, RunFailure) as error:
        log.warning("copies of checkpoints at %s cannot be looked at: %s", copies, " ".join(str(error).split()))
        return []


def _refuse_while_written(rundir: RunDir) -> None:
    """Two starts of a run on one machine, or of two jobs, are a mistake: the second would throw the first out. (A requeued job on
    another node may meet a predecessor that nobody can reach: that one is fenced.)"""
    writer = rundir.read_writer() or {}
    same_job = writer.get("job") is not None and writer.get("job") == os.environ.get("SLURM_JOB_ID")
    if writer.get("pid") != os.getpid() and not same_job and fate(writer) == "alive":
        raise UsageError(
            f"{rundir.url} is being written by process {writer['pid']} of this machine; wait for it, stop it (kill {writer['pid']}), "
            "or choose another run.dir"
        )
    if writer.get("job") and not same_job and runs(str(writer["job"])):
        raise UsageError(
            f"{rundir.url} is being written by job {writer['job']}, which is running; wait for it, scancel {writer['job']}, "
            "or choose another run.dir"
        )


def continue_run(engine: Any, urls: list[str], strict: bool, rank: int) -> Checkpoint | None:
    """Loads the first of `urls` that is whole into the engine. Collective; nothing is loaded before all ranks agree.

    strict: a bad first one is an error (the user named it); otherwise the one before is used, and said.

    Raises:
        AgreedFailure: checkpoints stand here but none is whole; starting over silently would hide that.
    """
    fault = ""
    for url in urls:
        checkpoint, fault = _look(url, rank)
        if checkpoint is not None:
            check_fits(checkpoint, engine)
            found = _load(engine, checkpoint, rank)
            fault = found or ""
            if found is None:
                return checkpoint
        if strict:
            raise AgreedFailure(f"{fault}; name another checkpoint")
        if rank == 0:
            log.warning("%s; the checkpoint before it is used", fault)
    if urls:
        raise AgreedFailure(
            f"none of the {len(urls)} checkpoints could be loaded, the newest being {urls[0]} ({fault}); start again if its storage "
            "was away, or remove them to start over"
        )
    return None


def _look(url: str, rank: int) -> tuple[Checkpoint | None, str]:
    """The checkpoint at `url` as the first rank sees it (manifest, and one listing for the sizes), or what is wrong with it:
    the others are told. Collective."""
    box: list[Any] = [None, ""]
    if rank == 0:
        try:
            checkpoint = store.open_checkpoint(url)
            store.check_sizes(checkpoint)
            box[0] = dict(checkpoint.manifest)
        except RunFailure as error:
            box[1] = str(error)
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return (None if box[0] is None else Checkpoint(url, box[0])), str(box[1])


def _load(engine: Any, checkpoint: Checkpoint, rank: int) -> str | None:
    """Loads a checkpoint, every rank its own pieces and the first one the buffers; collective. None, or what was damaged: then
    nothing has been touched."""
    fault, world = "", dist.get_world_size()
    try:
        with open_files(checkpoint, wanted_parts(checkpoint, engine.state.pieces, rank == 0)) as files:
            buffers = {owner: files.buffers(owner) for owner in ("student", "teacher")} if rank == 0 else None
            if agree_max(0.0, engine.device) == 0:
                restore(engine, checkpoint, files)
                box = [buffers]
                if world > 1:
                    dist.broadcast_object_list(box, src=0)
                restore_buffers(engine, box[0] or {})
                return None
    except RunFailure as error:
        fault = str(error)
        agree_max(1.0, engine.device)
    return _everyones(fault)[0]


def _everyones(fault: str) -> list[str]:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, fault)
    return sorted({text for text in gathered if text})


def check_data(checkpoint: Checkpoint, manifest_sha256: str, allowed: bool) -> bool:
    """Refuses other data than the checkpoint's: the position in it would mean nothing. Returns whether it is other data."""
    before = checkpoint.manifest.get("data", {}).get("manifest_sha256")
    if before != manifest_sha256 and not allowed:
        raise UsageError(
            f"{checkpoint.url} was trained on a shard set with manifest {str(before)[:12]}…, data.url now holds "
            f"{manifest_sha256[:12]}…; use the same data, or set checkpoint.allow_changed_data=true"
        )
    return before != manifest_sha256


def changed_settings(checkpoint: Checkpoint, config: PretrainConfig) -> list[str]:
    """`key: before → now` for every setting that differs from the checkpoint's run."""
    before, now = flatten(checkpoint.manifest["config"]), flatten(to_dict(config))
    return [
        f"{key}: {before.get(key)} → {now.get(key)}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
