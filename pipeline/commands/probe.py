"""`python -m pipeline probe CHECKPOINT`: how much the frozen features know of labels, with intervals, beside an untrained twin.

The gain is paired over the test sites: its interval draws the same sites for both networks. What each site got goes into the run
directory (`probes/`), if the checkpoint lies in one, and `compare` pairs runs by it.
Without --data the labels that ride in the run's own shard set are used; --data takes any shard set, a folder of classes
(ROOT/CLASS/*.tif) or image/label pairs (ROOT/images/*.tif, ROOT/labels/*.tif). Train and test are parted by place.
"""

from __future__ import annotations

import argparse

EXAMPLE = """examples:
  python -m pipeline probe demo_out/moe
  python -m pipeline probe moe.safetensors --data s3://bucket/shards --task segment --label landcover"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLE
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="checkpoint folder, run directory or exported .safetensors"
    )
    parser.add_argument("--data", metavar="URL", help="labelled set; default: the shard set the run was trained on")
    parser.add_argument("--task", choices=("knn", "linear", "segment"), default="knn")
    parser.add_argument(
        "--label", help="scalar label (knn, linear) or label raster (segment); default: as the run probed"
    )
    parser.add_argument(
        "--samples", type=int, default=512, help="sites at most, for training and for test (default 512)"
    )
    parser.add_argument("--weights", choices=("teacher", "student"), default="teacher")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="print the scores as a JSON last line")


def main(args: argparse.Namespace) -> int:
    from cluster.cli import print_json
    from cluster.config import from_dict
    from cluster.errors import RunFailure, UsageError
    from pipeline.config import PretrainConfig, ProbeConfig, ViewConfig
    from pipeline.export import load_model
    from pipeline.probes.offline import keep_beside, probe_model

    if args.samples < 1:
        raise UsageError(f"--samples {args.samples}: at least 1")
    model = load_model(args.checkpoint, args.weights)
    trained_on, probe, view = None, ProbeConfig(), ViewConfig()
    if "run_config" in model.facts:
        config = from_dict(PretrainConfig, model.facts["run_config"], args.checkpoint)
        trained_on = config.data.url if isinstance(config.data.url, str) else config.data.url[0]
        probe, view = config.probe, config.data.views_global
    data = args.data or trained_on
    if not data:
        raise UsageError(f"{args.checkpoint} does not say what it was trained on; give --data URL")
    label = args.label if args.task != "segment" else None
    raster = args.label if args.task == "segment" else None
    probe = ProbeConfig(samples=args.samples, label=label or probe.label, raster=raster or probe.raster)
    result = probe_model(model, data, args.task, probe, view, args.device)
    show(result)
    try:
        keep_beside(model, result)
    except (OSError, RunFailure) as error:  # a run that others own may be read-only
        print(f"note: outcomes not kept, compare cannot pair this probe: {error}")
    if args.json:
        print_json(result.to_json())
    return 0


def show(result: object) -> None:
    """The scores as a table."""
    import sys

    from rich.console import Console
    from rich.table import Table

    from pipeline.probes.offline import ProbeResult

    assert isinstance(result, ProbeResult)
    what = "mean IoU" if result.task == "segment" else "accuracy"
    sites = result.trained[result.headline].sites
    table = Table(
        title=f"{result.task}: {what} on {sites} test sites, 95 % intervals (* = excludes 0)", title_justify="left"
    )
    for head in ("features", "trained", "untrained", "gain", "chance"):
        table.add_column(head)
    for name, score in result.trained.items():
        base = result.untrained.get(name)
        own = f"{score.value:.3f} [{score.low:.2f}, {score.high:.2f}]"
        cells = [f"{base.value:.3f}" if base else "-", str(result.gain.get(name, "-"))]
        table.add_row(name, own, *cells, f"{score.chance:.3f}")
    Console(file=sys.stdout, highlight=False).print(table)
