"""`python -m pipeline probe CHECKPOINT`: how much the frozen features know of labels, beside what costs nothing.

Every score stands beside those of the same network untrained and of plain statistics of the same pixels, put through the same two
classifiers (k-NN, and a linear one whose regularisation is chosen on training sites). Differences are paired over the test sites: their
intervals draw the same sites for both. What each site got goes into the run directory (`probes/`), if the checkpoint lies in one,
and `compare` pairs runs by it. Without --data the labels that ride in the run's own shard set are used; --data takes any shard set,
a folder of classes (ROOT/CLASS/*.{tif,jpg,png}) or image/label pairs (ROOT/images/*.tif, ROOT/labels/*.tif). Train and test are
parted by place. Images that do not say what they hold have it declared: --sensor, --bands, --gsd, --unit.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.config import PretrainConfig, ProbeConfig, ViewConfig
    from pipeline.probes.offline import ProbeResult
    from pipeline.probes.outside import Declared

EXAMPLE = """examples:
  python -m pipeline probe demo_out/moe
  python -m pipeline probe demo_out/moe --supervised                        # the same network trained on the labels, an upper bound
  python -m pipeline probe demo_out/moe --labels-per-class 10 --draws 5 --finetune
  python -m pipeline probe moe.safetensors --data s3://bucket/shards --task segment --label landcover
  python -m pipeline probe demo_out/moe --data UCMerced --sensor hr --bands R,G,B --gsd 0.3 --unit uint8
  python -m pipeline probe demo_out/moe --data EuroSAT_RGB --sensor hr --bands R,G,B --gsd 10 --unit uint8"""
TASKS = ("knn", "linear", "segment")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLE
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="checkpoint folder, run directory or exported .safetensors")
    add("--data", metavar="URL", help="labelled set; default: the shard set the run was trained on")
    add("--task", choices=TASKS, help="only this one (default: knn and linear, both)")
    add("--label", help="scalar label (knn, linear) or label raster (segment); default: as the run probed")
    add("--samples", type=int, help="sites at most, for training and for test (default: as the run probed, else 512)")
    add(
        "--stage",
        choices=("last", "1", "2", "3", "4", "all"),
        help="features after this stage (default: as the run probed)",
    )
    add("--pool", choices=("mean", "mean_std"), help="over tokens and dates (default: as the run probed)")
    few = parser.add_argument_group("labels")
    few.add_argument(
        "--supervised", action="store_true", help="also train the same network on the labels, from scratch"
    )
    few.add_argument(
        "--supervised-samples", type=int, metavar="N", help="for so many samples (default: as the run has seen)"
    )
    few.add_argument("--labels-per-class", type=int, metavar="N", help="probe with N labelled training sites per class")
    few.add_argument("--draws", type=int, default=5, help="so many draws of the labelled sites (default 5)")
    few.add_argument(
        "--finetune", action="store_true", help="with those labels, fine-tune; beside the same from scratch"
    )
    few.add_argument(
        "--finetune-samples", type=int, default=3200, metavar="N", help="for so many samples each (default 3200)"
    )
    outside = parser.add_argument_group("images that do not say what they hold")
    outside.add_argument("--sensor", help="hr, s2 or s1: whose tokenizer reads them")
    outside.add_argument("--bands", metavar="B,B,…", help="names in file order; bands of no use have any other name")
    outside.add_argument("--gsd", type=float, metavar="METRES", help="metres per pixel")
    outside.add_argument(
        "--unit", help="hr: uint8, float01; s2: reflectance10000, reflectance10000+1000, reflectance; s1: db, power"
    )
    add("--weights", choices=("teacher", "student"), default="teacher")
    add("--device", default="cpu")
    add("--json", action="store_true", help="print the scores as a JSON last line")


def main(args: argparse.Namespace) -> int:
    from cluster.cli import print_json
    from cluster.config import from_dict
    from cluster.errors import RunFailure, UsageError
    from pipeline.config import PretrainConfig, ViewConfig
    from pipeline.export import load_model
    from pipeline.probes.few import few_labels, finetune, supervise
    from pipeline.probes.offline import keep_beside, prepare, probe_model

    check(args)
    declared = declaration(args)
    model = load_model(args.checkpoint, args.weights)
    config = None
    if "run_config" in model.facts:
        config = from_dict(PretrainConfig, model.facts["run_config"], args.checkpoint)
    data = args.data or (config.data.urls[0] if config else None)
    if not data:
        raise UsageError(f"{args.checkpoint} does not say what it was trained on; give --data URL")
    samples = int(args.supervised_samples or model.facts.get("samples") or 0)
    if args.supervised and not samples:
        raise UsageError(f"{args.checkpoint} does not say how many samples it has seen; give --supervised-samples N")
    trained: ViewConfig = config.data.views_global if config else ViewConfig()
    prepared = prepare(model, data, settings(args, config), trained, args.device, declared)
    if args.labels_per_class:
        results = few_labels(prepared, args.labels_per_class, args.draws)
        if args.finetune:
            results = finetune(prepared, results, args.labels_per_class, args.draws, args.finetune_samples)
    else:
        results = probe_model(prepared)
        try:
            keep_beside(model, results)
        except (OSError, RunFailure) as error:  # a run that others own may be read-only
            print(f"note: outcomes not kept, compare cannot pair this probe: {error}")
        if args.supervised:
            results = supervise(prepared, results, samples)
    for note in prepared.source.exam.notes:
        print(f"note: {note}")
    show(results)
    if args.json:
        first, *others = results
        print_json(first.to_json() | {other.task: other.to_json() for other in others})
    return 0


def check(args: argparse.Namespace) -> None:
    """Refuses what cannot be meant, before anything is read."""
    from cluster.errors import UsageError

    for name, least in (
        ("samples", 1), ("supervised_samples", 1), ("labels_per_class", 2), ("draws", 1), ("finetune_samples", 1),
    ):  # fmt: skip
        value = getattr(args, name)
        if value is not None and value < least:
            raise UsageError(f"--{name.replace('_', '-')} {value}: at least {least}")
    if args.finetune and not args.labels_per_class:
        raise UsageError("--finetune needs --labels-per-class N: it is measured with few labels")
    if args.supervised and args.labels_per_class:
        raise UsageError("--supervised uses all labels; with --labels-per-class say --finetune")
    if args.task == "segment" and (args.supervised or args.labels_per_class):
        raise UsageError(
            "--supervised and --labels-per-class are for scalar labels (knn, linear), not for --task segment"
        )


def declaration(args: argparse.Namespace) -> Declared | None:
    """What the images are declared to be, if anything is."""
    from cluster.errors import UsageError
    from pipeline.probes.outside import Declared

    said = {name: getattr(args, name) for name in ("bands", "gsd", "unit") if getattr(args, name) is not None}
    if not args.sensor:
        if said:
            raise UsageError(f"--{next(iter(said))} needs --sensor hr, s2 or s1")
        return None
    bands = tuple(name.strip() for name in (args.bands or "").split(",") if name.strip())
    try:
        return Declared(args.sensor, bands, args.gsd, args.unit)
    except ValueError as error:
        raise UsageError(str(error)) from None


def settings(args: argparse.Namespace, config: PretrainConfig | None) -> ProbeConfig:
    """As the run probed, with what the command line says instead."""
    from dataclasses import replace

    from pipeline.config import ProbeConfig

    probe = config.probe if config else ProbeConfig()
    tasks = (args.task,) if args.task else ("knn", "linear")
    label = args.label if args.task != "segment" else None
    raster = args.label if args.task == "segment" else None
    stage: Any = int(args.stage) if args.stage and args.stage.isdigit() else args.stage
    return replace(
        probe, tasks=tasks, samples=args.samples or probe.samples, label=label or probe.label, raster=raster or probe.raster,
        stage=stage or probe.stage, pool=args.pool or probe.pool,
    )  # fmt: skip


def show(results: Sequence[ProbeResult]) -> None:
    """The scores, one table per task."""
    import sys

    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, emoji=False, file=sys.stdout, highlight=False)
    for result in results:
        what = "mean IoU" if result.task == "segment" else "accuracy"
        facts = "".join(f", {key.replace('_', ' ')} {value:,}" for key, value in result.facts.items())
        sites = result.trained[result.headline].sites
        table = Table(
            title=f"{result.task}: {what} on {sites} test sites{facts}; 95 % intervals, paired over sites (* = excludes 0)",
            title_justify="left",
        )
        others = [row for row in result.rows if row != "trained"]
        differences = [key for key in result.over if key in ("untrained", "pixels") or "_over_" in key]
        heads = [key.replace("_over_", " − ") if "_over_" in key else f"trained − {key}" for key in differences]
        for head in ("features", "trained", *others, *heads, "chance"):
            table.add_column(head, overflow="fold")
        for name, score in result.trained.items():
            own = f"{score.value:.3f} [{score.low:.2f}, {score.high:.2f}]{_spread(result, 'trained', name)}"
            cells = [
                f"{result.rows[row][name].value:.3f}{_spread(result, row, name)}" if name in result.rows[row] else "-"
                for row in others
            ]
            cells += [str(result.over[key].get(name, "-")) for key in differences]
            table.add_row(name, own, *cells, f"{score.chance:.3f}")
        console.print(table)


def _spread(result: ProbeResult, row: str, name: str) -> str:
    """`±0.012`: standard deviation over draws of the labels."""
    sd = result.sd.get(row, {}).get(name) if result.facts.get("draws", 1) > 1 else None
    return "" if sd is None else f" ±{sd:.3f}"
