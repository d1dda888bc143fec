"""Probes between training steps: all ranks call, all get the same scores, the first keeps what each test site got.

Beside every score stand two that cost a user nothing, on the same sites with the same classifier: the untrained network (the run's own,
probed before its first step) and statistics of the same pixels. Both are computed once per run and kept in its directory.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from cluster.errors import UsageError
from cluster.lease import Lease
from data_prep.shards import ShardSet
from pipeline.config import PretrainConfig, ProbeConfig, ViewConfig
from pipeline.parallel.processes import agree_max
from pipeline.probes.exam import Probed, sit
from pipeline.probes.features import Describer, SiteFeatures, extract, network
from pipeline.probes.outcomes import keep_round, stored_pixels
from pipeline.probes.pixels import describe_pixels
from pipeline.probes.plan import ProbePlan, check_tasks, plan_probe

log = logging.getLogger(__name__)


@functools.lru_cache(maxsize=2)
def _opened(url: str) -> ShardSet:
    return ShardSet.open(url)


def probe_set(cfg: PretrainConfig) -> ShardSet:
    """The shard set whose labels are probed: the first one the run reads. Its index is read once per process."""
    return _opened(cfg.data.url if isinstance(cfg.data.url, str) else cfg.data.url[0])


def run_probes(
    skysense: nn.Module, cfg: PretrainConfig, shardset: ShardSet, device: torch.device | str = "cpu",
    rundir_url: str | None = None, step: int = 0, lease: Lease | None = None,
) -> dict[str, float]:  # fmt: skip
    """`probe/<task>/<modality|fused|concat>`, with `…/low` and `…/high`, what untrained network and pixel statistics got and the
    paired differences to both (see `outcomes.against`), collapse figures, `probe/split` (a number that names sites, labels and
    what was seen of them) and `probe/seconds`, the cost of all.

    `cfg.probe` says which tasks, which label and how many sites. rundir_url (the first rank gives it): run directory that
    keeps the outcomes of this step; step 0 is the untrained network.

    Raises:
        UsageError: the set has no such label, or no sites to test on.
    """
    start = time.monotonic()
    plan = plan_probe(shardset, cfg.probe, cfg.data.views_global)
    pixels = stored_pixels(rundir_url, plan.digest, plan.tasks) if rundir_url else None
    is_missing = bool(agree_max(float(bool(rundir_url) and pixels is None), device))
    describers = [network(skysense, cfg.probe.pool, cfg.probe.stage), *([describe_pixels] if is_missing else [])]
    described = describe_sites(describers, plan, shardset, _modalities(skysense), statistics_dict(shardset), device)
    probed = sit(plan, described[0], cfg.probe.pool)
    figures: dict[str, float] = {}
    for task, score in probed.scores.items():
        figures |= {f"probe/{task}": score.value, f"probe/{task}/low": score.low, f"probe/{task}/high": score.high}
    figures |= probed.figures
    if rundir_url:
        if step == 0:
            for note in plan.notes:
                log.warning("probe: %s", note)
        if pixels is None:
            pixels = sit(plan, described[1], "mean").outcomes
        figures |= keep_round(probed.outcomes, pixels, rundir_url, step, lease)
    figures["probe/seconds"] = time.monotonic() - start
    return figures


def obstacle(cfg: PretrainConfig) -> str | None:
    """Why the configured probes cannot run on the run's data, or None. Asked before training: a set without labels is
    no reason not to pretrain on it.

    Raises:
        UsageError: an unknown probe task.
    """
    check_tasks(cfg.probe.tasks)
    try:
        plan_probe(probe_set(cfg), cfg.probe, cfg.data.views_global)
    except UsageError as error:
        return str(error)
    return None


def probe_scores(
    skysense: nn.Module, shardset: ShardSet, probe: ProbeConfig, trained: ViewConfig,
    statistics: Mapping[str, Mapping[str, object]], device: torch.device | str = "cpu",
) -> Probed:  # fmt: skip
    """Every task of `probe.tasks` on the same split, of one network. trained: see `plan_probe`."""
    plan = plan_probe(shardset, probe, trained)
    modalities = _modalities(skysense)
    describers = [network(skysense, probe.pool, probe.stage)]
    return sit(plan, describe_sites(describers, plan, shardset, modalities, statistics, device)[0], probe.pool)


def statistics_dict(shardset: ShardSet) -> dict[str, dict[str, object]]:
    """Per-band statistics as `model.inputs.normalise` takes them."""
    return {name: value.to_dict() for name, value in shardset.statistics.items()}


def describe_sites(
    describers: Sequence[Describer], plan: ProbePlan, shardset: ShardSet, modalities: Sequence[str],
    statistics: Mapping[str, Mapping[str, object]], device: torch.device | str,
) -> list[SiteFeatures]:  # fmt: skip
    """What each describer says of the plan's sites."""
    return extract(
        describers, modalities, shardset.read_sample, plan.rows, plan.view, statistics, plan.raster, device=device
    )


def _modalities(skysense: nn.Module) -> tuple[str, ...]:
    return skysense.cfg.modalities  # type: ignore[union-attr,return-value]
