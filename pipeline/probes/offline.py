"""Probes of a finished model: on a shard set or an outside labelled set, beside the same network untrained and pixel statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from cluster.errors import UsageError
from cluster.progress import progress
from cluster.rundir import RunDir
from model.initial import draw_all, on_meta
from model.pretrained import Pretrained
from pipeline.config import ProbeConfig, ViewConfig
from pipeline.probes.exam import sit
from pipeline.probes.features import FUSED, SiteFeatures, network
from pipeline.probes.outcomes import TASKS, Outcomes, differences, url_of, write_outcomes
from pipeline.probes.outside import Declared
from pipeline.probes.pixels import describe_pixels
from pipeline.probes.scores import Difference, Outcome, Score
from pipeline.probes.source import Source, open_source

T = TypeVar("T")
Round = dict[str, Outcome]  # by modality
ROWS = ("trained", "untrained", "pixels")


@dataclass(frozen=True)
class ProbeResult:
    """One task: scores by modality of every row of the table; `headline` names the modality to quote.

    rows: `trained`, `untrained` and `pixels`, and what else was asked for (`supervised`, `finetuned`, `scratch`).
    over: trained − another row, paired over the test sites, by that row's name.
    outcomes: what each test site got from the trained network.
    sd: of a few-label probe, the standard deviation over draws of the labels, by row and modality.
    facts: of a few-label or supervised probe, its numbers (`labels_per_class`, `draws`, `supervised_samples`, …).
    by_row: what each test site got, by row and modality.
    """

    task: str
    rows: dict[str, dict[str, Score]]
    over: dict[str, dict[str, Difference]]
    outcomes: Outcomes
    sd: dict[str, dict[str, float]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    by_row: dict[str, Round] = field(default_factory=dict)

    @property
    def trained(self) -> dict[str, Score]:
        return self.rows["trained"]

    @property
    def headline(self) -> str:
        return FUSED if FUSED in self.trained else max(self.trained, key=lambda name: self.trained[name].value)

    def to_json(self) -> dict[str, Any]:
        """Headline figures flat, every row by modality under its name (`baseline` is the untrained network)."""
        name = self.headline
        best, base, pixels = (self.rows[row].get(name) for row in ROWS)
        assert best is not None
        told: dict[str, Any] = {
            "task": self.task, "modality": name, "score": best.value, "low": best.low, "high": best.high, "chance": best.chance,
            "untrained": base.value if base else None, "untrained_low": base.low if base else None,
            "untrained_high": base.high if base else None, "pixels": pixels.value if pixels else None,
            "pixels_low": pixels.low if pixels else None, "pixels_high": pixels.high if pixels else None,
            "sites": best.sites, "split": self.outcomes.split,
        }  # fmt: skip
        for row, key in (("untrained", "gain"), ("pixels", "over_pixels")):
            difference = self.over.get(row, {}).get(name)
            if difference is not None:
                told |= {key: difference.value, f"{key}_low": difference.low, f"{key}_high": difference.high}
        for row, scores in self.rows.items():
            if row in ("untrained", "pixels"):
                continue
            told[row] = {n: asdict(s) for n, s in scores.items()}
        told["baseline"] = {n: asdict(s) for n, s in self.rows["untrained"].items()}
        told["pixels_by_modality"] = {n: asdict(s) for n, s in self.rows["pixels"].items()}
        told["differences"] = {row: {n: asdict(d) for n, d in found.items()} for row, found in self.over.items()}
        return told | ({"sd": self.sd} if self.sd else {}) | self.facts


@dataclass(frozen=True)
class Prepared:
    """Networks and features that every offline probe of one model and data set starts from."""

    model: Pretrained
    twin: Pretrained
    source: Source
    features: dict[str, SiteFeatures]
    probe: ProbeConfig
    device: str


def untrained_twin(model: Pretrained, seed: int | None = None) -> Pretrained:
    """The same architecture and statistics with the very weights that a run of `train.seed` = seed starts from; None: the run that
    the model is of (0 where it does not say)."""
    if seed is None:
        seed = int(model.facts.get("run_config", {}).get("train", {}).get("seed", 0))
    with on_meta():
        twin = Pretrained(model.cfg, model.statistics)
    draw_all(twin, seed)  # by name and place: its network has the name that it has in a student
    return twin.eval()


def prepare(
    model: Pretrained, url: str, probe: ProbeConfig, trained: ViewConfig, device: str = "cpu", declared: Declared | None = None
) -> Prepared:  # fmt: skip
    """Features of the trained and the untrained network, and pixel statistics, of every site; each site is read once.

    Raises:
        UsageError: unknown task, or a set without what the tasks need.
    """
    unknown = [task for task in probe.tasks if task not in TASKS]
    if unknown:
        raise UsageError(f"--task {unknown[0]}: known ones are {', '.join(TASKS)}")
    twin = untrained_twin(model)
    source = open_source(model, url, probe, trained, declared)
    exam = source.exam
    describers = [network(one.to(device).skysense, probe.pool, probe.stage) for one in (model, twin)]
    with progress(exam.num_train + len(exam.keys), "features") as bar:
        described = source.describe([*describers, describe_pixels], device, bar.advance)
    return Prepared(model, twin, source, dict(zip(ROWS, described)), probe, device)


def probe_model(prepared: Prepared) -> list[ProbeResult]:
    """One result per task.

    Raises:
        UsageError: too few sites for any modality.
    """
    rounds = {
        row: sit(prepared.source.exam, features, prepared.probe.pool) for row, features in prepared.features.items()
    }
    results = []
    for task in prepared.source.exam.tasks:
        rows = {row: of_task(probed.scores, task) for row, probed in rounds.items()}
        if not rows["trained"]:
            raise UsageError(f"too few labelled sites with a modality this model reads for a {task} probe")
        own = rounds["trained"].outcomes
        over = {row: of_task(differences(own, rounds[row].outcomes), task) for row in ROWS[1:]}
        by_name = {name: value for name, value in own.by_name.items() if name.startswith(f"{task}/")}
        by_row = {row: of_task(probed.outcomes.by_name, task) for row, probed in rounds.items()}
        results.append(ProbeResult(task, rows, over, replace(own, by_name=by_name), by_row=by_row))
    return results


def keep_beside(model: Pretrained, results: Sequence[ProbeResult]) -> list[str]:
    """Writes the outcomes into the run directory that the weights come from, if it is there and they are the teacher's, which
    in-loop probes score too. Returns the URLs, none where there is nothing to write to.

    Raises:
        OSError, RunFailure: the run directory cannot be written.
    """
    folder = str(model.facts.get("checkpoint", ""))
    rundir_url, _, _ = folder.rpartition("/checkpoints/")
    if not rundir_url or model.facts.get("weights") != "teacher" or RunDir(rundir_url).read_resolved() is None:
        return []
    urls = []
    for result in results:
        urls.append(url_of(rundir_url, int(model.facts["step"]), f"{result.task}-{result.outcomes.split}"))
        write_outcomes(urls[-1], result.outcomes)
    return urls


def of_task(found: Mapping[str, T], task: str) -> dict[str, T]:
    """`<task>/<modality>` → `<modality>`."""
    return {name.partition("/")[2]: value for name, value in found.items() if name.startswith(f"{task}/")}
