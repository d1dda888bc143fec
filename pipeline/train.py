"""A pretraining run: built in one straight list, looped on one screen."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from cluster import logs
from cluster.config import fingerprint, to_dict
from cluster.errors import Fenced, UsageError
from cluster.exit_codes import DONE, REQUEUE
from cluster.ranks import Ranks
from cluster.rundir import RunDir
from model.batch import Batch
from model.counts import table
from model.losses.reduce import DistributedReduce
from pipeline import resume
from pipeline.checkpoint import Saver, store
from pipeline.config import PretrainConfig
from pipeline.engine import Engine
from pipeline.evaluate.in_loop import Watched, plan_watched, watch
from pipeline.first_weights import first_networks
from pipeline.health import Heartbeat, SpikeWatch, check_step, collective_timeout_s
from pipeline.parallel.layout import Layout
from pipeline.parallel.processes import start
from pipeline.probes.in_loop import obstacle, probe_set, run_probes
from pipeline.probes.picture import feature_sheet
from pipeline.profiling import Profile
from pipeline.reader.reader import Reader
from pipeline.steplog import StepLog
from pipeline.stop import StopFlag
from pipeline.tracking import RunFacts, Tracker, datasets_of, open_tracker
from pipeline.warm_start import start_warm

log = logging.getLogger(__name__)


@dataclass
class Run:
    """Everything one rank of a run holds. `step` and `samples` are what is done so far."""

    config: PretrainConfig
    ranks: Ranks
    layout: Layout
    device: torch.device
    rundir: RunDir
    reader: Reader
    engine: Engine
    saver: Saver
    tracker: Tracker | None
    log: StepLog
    beat: Heartbeat
    step: int
    samples: int
    probing: bool
    watched: tuple[Watched, ...]
    profile: Profile


def train(config: PretrainConfig, ranks: Ranks, resume_from: str, stop: StopFlag) -> int:
    """Runs, or continues, one rank of a pretraining run to its last step. Returns its exit code (`cluster.exit_codes`)."""
    run = None
    try:
        run = build(config, ranks, resume_from)
        code = loop(run, stop)
    except BaseException as error:
        if not isinstance(error, UsageError):  # bad input leaves nothing behind
            rundir = run.rundir if run else RunDir(config.run.dir)
            logs.record_failure(rundir.logs_url, ranks.rank, run.step if run else 0, error, rundir.lease)
        if run is not None:
            close(run, "FAILED")
        raise
    close(run, "FINISHED" if code == DONE else "SCHEDULED")
    return code


def loop(run: Run, stop: StopFlag) -> int:
    """The loop. Everything that happens between two steps stands here, in order."""
    config, spikes, batches = run.config, SpikeWatch(), iter(run.reader)
    last, stopping = config.train.steps, False
    if (
        run.probing or run.watched
    ) and run.step == 0:  # the untrained network: what every later score is measured against
        run.beat.at("probe")
        probe(run)
    while run.step < last and not stopping:
        run.profile.at(run.step + 1)
        run.beat.at("data", run.step + 1)
        began = time.monotonic()
        micro_batches, keys = next_batches(run, batches)
        waited = time.monotonic() - began

        number = run.step + 1
        probing = (run.probing or bool(run.watched)) and due(number, config.probe.every, last)
        logging_step = probing or number == 1 or due(number, config.train.log_every, last)
        result = run.engine.step(micro_batches, run.samples, run.beat, diagnose=logging_step)
        run.step, run.samples = run.step + 1, run.samples + run.layout.batch
        check_step(run.step, result, keys, run.ranks)
        run.log.count(waited, result)
        height = spikes.spike(result.loss)
        if height is not None and run.ranks.is_first:
            log.warning(
                "step %d: loss %.4f is a spike, %.0f deviations above; rank 0 saw %s",
                run.step,
                result.loss,
                height,
                keys,
            )

        run.beat.at("probe")
        scores = probe(run) if probing else {}
        run.beat.at("log")
        if logging_step:
            bad = run.reader.faults.quarantined
            run.log.write(run.step, run.samples, result, {**run.reader.metrics(), **scores}, bad)
        stopping = stop.agreed(run.device, run.rundir.lease)
        run.beat.at("save")
        with suppress(Fenced):  # one rank's writer may notice first: all end together, after the next step
            run.saver.check()
            if stopping or due(run.step, config.checkpoint.every, last):
                save(run)
    with suppress(Fenced):
        run.saver.wait()
    stop.agreed(run.device, run.rundir.lease)
    if stopping and run.step < last:
        if run.ranks.is_first:
            log.warning("stopped by signal after step %d, checkpoint committed; the same command continues", run.step)
        return REQUEUE
    return DONE


def build(config: PretrainConfig, ranks: Ranks, resume_from: str) -> Run:
    """All parts of a run, in the order they need one another. Nothing is written before everything could be built."""
    layout = Layout.of(config, ranks)
    rundir = RunDir(config.run.dir)
    device = start(ranks, collective_timeout_s(config.train.stall_timeout_s))
    logs.start_logging(None, ranks.rank)
    beat = Heartbeat(ranks, config.train.stall_timeout_s, rundir)

    reader = Reader(
        config.data, config.model, seed=config.train.seed, rank=ranks.rank, world=ranks.world,
        batch_per_rank=layout.batch_per_rank, device=device,
    )  # fmt: skip
    if reader.epoch_samples < ranks.world:
        raise UsageError(
            f"data.url holds {reader.epoch_samples} usable samples for {ranks.world} processes; use fewer processes"
        )
    statistics = {name: bands.to_dict() for name, bands in reader.statistics.items()}
    watched = plan_watched(config, ranks.is_first, device)
    torch.manual_seed(config.train.seed)  # equal on all ranks, should anything draw from this generator
    student, teacher = first_networks(config, layout, statistics, reader.classes, device)
    copies = store.copies_url(config.checkpoint.copy_to, rundir.url)
    urls = resume.candidates(resume_from, rundir, ranks.rank, copies)
    lineage = None if urls else start_warm(student, config, ranks, device)
    engine = Engine(student, teacher, config, layout, device, DistributedReduce())

    found = resume.continue_run(engine, urls, strict=resume_from != "auto", rank=ranks.rank)
    step, samples, device_hours = 0, 0, 0.0
    if found is not None:
        changed = resume.check_data(found, reader.manifest_sha256, config.checkpoint.allow_changed_data)
        reader.load_state_dict(found.manifest["reader"], changed_data=changed)
        step, samples, device_hours = found.step, found.samples, float(found.manifest["device_hours"])

    resume.take_over(
        rundir, ranks
    )  # from here on the run directory is written to, and an earlier start writes nothing more
    logs.start_logging(rundir.logs_url, ranks.rank, lease=rundir.lease)
    tracker = None
    if ranks.is_first:
        tracker = open_run(config, rundir, layout, reader, step)
        describe(found, config, layout)
        if lineage is not None:
            rundir.write("artifacts/init.json", json.dumps(lineage, indent=1).encode())
            tracker.tag("init.weights", json.dumps(lineage))

    def before_commit() -> None:
        rundir.check_claim()
        rundir.sync()

    def after_commit(url: str, at_step: int) -> None:
        if tracker is not None:
            tracker.checkpoint(url, at_step)

    saver = Saver(
        rundir.checkpoints_url,
        config.checkpoint,
        ranks.rank,
        ranks.world,
        before_commit,
        after_commit,
        rundir.lease,
        copies,
    )
    flops = float(table(config)["flops_per_sample"]["train"])
    step_log = StepLog(rundir, tracker, layout, device, flops, step, config.train.steps, device_hours)
    return Run(
        config,
        ranks,
        layout,
        device,
        rundir,
        reader,
        engine,
        saver,
        tracker,
        step_log,
        beat,
        step,
        samples,
        can_probe(config, ranks),
        watched,
        Profile(config.run.profile, rundir, ranks),
    )


def open_run(config: PretrainConfig, rundir: RunDir, layout: Layout, reader: Reader, step: int) -> Tracker:
    """First rank: the run directory's files and the tracker, continued where the run continues."""
    rundir.check_claim()
    logs.clear_failures(rundir.logs_url)
    rundir.write_resolved(config)
    rundir.start_metrics(step)
    return open_tracker(config, rundir, RunFacts(layout.world, str(layout), datasets_of(config.data)))


def describe(found: Any, config: PretrainConfig, layout: Layout) -> None:
    """First rank: one line of what starts."""
    log.info("%s", layout)
    if found is not None:
        log.info("continuing from %s (step %d, written by %s)", found.url, found.step, found.manifest["layout"])
        for change in resume.changed_settings(found, config):
            log.info("setting changed since: %s", change)


def next_batches(run: Run, batches: Iterator[Batch]) -> tuple[list[Batch], list[str]]:
    """This rank's micro-batches of the next step, on its device, and the keys of their samples."""
    whole = next(batches)
    moved, size = whole.to(run.device), run.layout.micro_batch
    return [moved.part(i, i + size) for i in range(0, run.layout.batch_per_rank, size)], whole.keys


def can_probe(config: PretrainConfig, ranks: Ranks) -> bool:
    """Whether in-loop probes are wanted and the data has what they need; the first rank says why not."""
    why_not = obstacle(config) if config.probe.every else None
    if why_not and ranks.is_first:
        log.warning("no in-loop probes: %s (set probe.label or probe.raster, or probe.every=0)", why_not)
    return bool(config.probe.every) and why_not is None


def probe(run: Run) -> dict[str, float]:
    """Scores of the teacher's features; all ranks take part (experts may live on any of them)."""
    skysense, kept_in = run.engine.teacher.module.skysense, run.rundir.url if run.ranks.is_first else None
    figures: dict[str, float] = {}
    for one in run.watched:
        statistics = run.engine.student.statistics
        figures |= watch(skysense, run.config, one, statistics, run.device, kept_in, run.step, run.rundir.lease)
    if not run.probing:
        return figures
    shardset = probe_set(run.config)
    figures |= run_probes(skysense, run.config, shardset, run.device, kept_in, run.step, run.rundir.lease)
    if run.step == run.config.train.steps:
        picture = feature_sheet(skysense, run.config, shardset, run.device)
        if run.ranks.is_first:
            with suppress(Fenced):
                run.rundir.write("artifacts/features.png", picture)
    return figures


def save(run: Run) -> None:
    """Starts a checkpoint of the step just finished: with it, another start continues as if nothing had happened."""
    state = {
        "config": to_dict(run.config), "fingerprint": fingerprint(run.config), "reader": run.reader.state_dict(),
        "data": {"url": run.config.data.url, "manifest_sha256": run.reader.manifest_sha256},
        "statistics": run.engine.student.statistics, "classes": run.reader.classes, "device_hours": run.log.device_hours,
        "run_id": run.tracker.run_id if run.tracker else None,
        "rng": {"seed": run.config.train.seed, "how": "every draw is keyed by (seed, epoch, sample key); no generator state"},
    }  # fmt: skip
    run.saver.save(run.engine, run.step, run.samples, state)


def close(run: Run, status: str) -> None:
    """Lets go of files and threads; also on the way out of a failure."""
    run.beat.at("end")
    run.profile.close()
    run.log.close()
    run.reader.close()
    if run.tracker is not None:
        run.tracker.close(status)
    run.beat.close()


def due(step: int, every: int, last: int) -> bool:
    """Every `every` steps and after the last one; never with 0."""
    return bool(every) and (step % every == 0 or step == last)
