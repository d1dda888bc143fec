"""`python -m pipeline evaluate CHECKPOINT --task ROW --data ROOT`: what a pretrained backbone is worth for other people's labels.

A row is a published data set with its layout, bands, unit, task, metric and split (`--list` shows them all). Beside every score stand
chance, pixel statistics (mean, standard deviation, 10th and 90th percentile per band of the very pixels the network sees), the same
network untrained, and with --mode finetune the same network trained from scratch; gains are paired over the test items. Features are
computed once and kept; results go to OUT/results.jsonl with what every test item got, for `compare`.

--task folders takes images of your own in folders named by class; --sensor, --bands, --unit and --gsd say what their numbers mean.

A suite is a YAML file: a list of {task, data} and any of mode, labels, seeds, head, layer, pool, sensors, epochs, lr, sensor, bands, unit,
gsd; `~` and variables are not expanded.
"""

from __future__ import annotations

import argparse
import shutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.evaluate.registry import Row
    from pipeline.evaluate.results import Result

EXAMPLE = """examples:
  python -m pipeline evaluate --list
  python -m pipeline evaluate demo_out/moe --task eurosat_rgb --data eurosat/2750
  python -m pipeline evaluate moe.safetensors --task benv2 --data geobench --sensors s1 --out results
  python -m pipeline evaluate demo_out/moe --task folders --data mine --sensor hr --bands R,G,B --unit uint8 --gsd 0.3
  python -m pipeline evaluate demo_out/moe --suite suite.yaml --json"""

SUITE_KEYS = (
    "task",
    "data",
    "mode",
    "labels",
    "seeds",
    "head",
    "layer",
    "pool",
    "sensors",
    "epochs",
    "lr",
    "sensor",
    "bands",
    "unit",
    "gsd",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLE
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", nargs="?", help="checkpoint folder, run directory or exported .safetensors"
    )
    parser.add_argument(
        "--list", action="store_true", help="all rows: task, what it needs on disk, split, metric, head"
    )
    parser.add_argument("--task", metavar="ROW", help="row name, see --list")
    parser.add_argument("--data", metavar="ROOT", help="the data set's folder, as published")
    parser.add_argument("--suite", metavar="FILE", help="several rows, one table")
    parser.add_argument("--mode", choices=("frozen", "finetune"), default="frozen")
    parser.add_argument(
        "--labels", type=float, default=1.0, metavar="SHARE", help="share of the training labels (default 1.0)"
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="repetitions of everything drawn (default 1)")
    parser.add_argument("--head", help="knn, logistic, linear, upernet, faster_rcnn; default: the row's")
    parser.add_argument("--sensors", metavar="A,B", help="some of the row's sensors only")
    parser.add_argument("--sensor", help="--task folders: hr, s2 or s1")
    parser.add_argument("--bands", metavar="A,B", help="--task folders: every band of a file, in file order")
    parser.add_argument("--unit", help="--task folders: uint8; reflectance x 10000, reflectance; dB, linear")
    parser.add_argument("--gsd", type=float, metavar="M", help="--task folders: metres per pixel")
    parser.add_argument(
        "--layer", help="last, stage1 … stage4, concat, fused; default: concat, fused for series and several sensors"
    )
    parser.add_argument("--pool", help="mean or mean+std (default) over the tokens of an image")
    parser.add_argument(
        "--keep-tokens", action="store_true", help="switch Adaptive Patch Merging off for hr: every token is kept"
    )
    parser.add_argument("--epochs", type=int, default=10, help="fine-tuning (default 10)")
    parser.add_argument("--lr", type=float, default=1e-3, help="fine-tuning: rate of the head (default 1e-3)")
    parser.add_argument("--out", metavar="DIR", help="results (default: evaluate/ in the run directory, else eval_out)")
    parser.add_argument("--cache", metavar="DIR", help="features (default: OUT/features; a local folder)")
    parser.add_argument("--weights", choices=("teacher", "student"), default="teacher")
    parser.add_argument(
        "--json", action="store_true", help="print the result (of a suite: all of them) as a JSON last line"
    )


def main(args: argparse.Namespace) -> int:
    from cluster.cli import print_json
    from cluster.errors import UsageError

    if args.list:
        list_rows(args.json)
        return 0
    if not args.checkpoint or bool(args.suite) == bool(args.task) or (args.task and not args.data):
        raise UsageError(
            "evaluate takes CHECKPOINT and either --task ROW --data ROOT or --suite FILE (--list shows the rows)"
        )
    jobs = read_suite(args.suite, vars(args)) if args.suite else [vars(args)]
    results: list[Result] = []

    for job in jobs:
        row_of(job)  # a misspelt row is refused before the first hour of work
    from pipeline.export import load_model

    model = load_model(args.checkpoint, args.weights)
    for job in jobs:
        results += evaluate(model, job)
        show(results[-2 if len(results) > 1 and results[-2].task == results[-1].task else -1 :])
    if args.suite:
        show(results)
    if args.json:
        print_json({"results": [r.to_json() for r in results]} if args.suite else _headline(results))
    return 0


def evaluate(model: Any, job: dict[str, Any]) -> list[Result]:
    """One row by the keys of a suite entry."""
    from cluster import storage
    from pipeline.evaluate.run import Settings, default_out, evaluate_row

    row = row_of(job)
    out = job.get("out") or default_out(model, job["checkpoint"])
    cache = job.get("cache") or (storage.join(out, "features") if storage.is_local(out) else "eval_out/features")
    settings = Settings(
        job["mode"], float(job["labels"]), int(job["seeds"]), (job["head"],) if job.get("head") else None, job.get("layer"),
        job.get("pool"), (False, False, False) if job.get("keep_tokens") else None, out, cache, int(job["epochs"]), float(job["lr"]),
    )  # fmt: skip
    return evaluate_row(model, row, job["data"], settings)


def row_of(job: dict[str, Any]) -> Row:
    """The row of a suite entry, with those of its sensors that were asked for.

    Raises:
        UsageError: no such row or sensor; images of one's own that are not declared whole, or a declaration for a published set.
    """
    from cluster.errors import UsageError
    from pipeline.evaluate.registry import OWN, own_row, row_named

    said = {key: job.get(key) for key in ("sensor", "bands", "unit", "gsd")}
    if job["task"] == OWN:
        missing = [key for key, value in said.items() if not value]
        if missing:
            raise UsageError(f"--task {OWN} needs --{missing[0]}: what the images' numbers mean is never guessed")
        return own_row(str(said["sensor"]), tuple(str(said["bands"]).split(",")), str(said["unit"]), float(said["gsd"]))  # type: ignore[arg-type]
    row = row_named(job["task"])
    given = [key for key, value in said.items() if value]
    if given:
        raise UsageError(f"--{given[0]} goes with --task {OWN}; {row.name} has its bands and unit declared")
    return row.only(tuple(job["sensors"].split(","))) if job.get("sensors") else row


def read_suite(path: str, defaults: dict[str, Any]) -> list[dict[str, Any]]:
    """Entries of a suite over the command line's values. Raises UsageError naming the entry and key."""
    import yaml

    from cluster import storage
    from cluster.errors import UsageError

    try:
        entries = yaml.safe_load(storage.read_bytes(path))
    except FileNotFoundError:
        raise UsageError(f"--suite {path} does not exist") from None
    except yaml.YAMLError as error:
        raise UsageError(f"--suite {path} is no YAML: {' '.join(str(error).split())[:160]}") from None
    if not isinstance(entries, list) or not entries:
        raise UsageError(f"--suite {path} must be a list of entries like {{task: eurosat_rgb, data: eurosat/2750}}")
    jobs = []
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or not {"task", "data"} <= set(entry):
            raise UsageError(f"--suite {path}: entry {number} needs task and data")
        unknown = sorted(set(entry) - set(SUITE_KEYS))
        if unknown:
            raise UsageError(f"--suite {path}: entry {number} has {unknown[0]}; known are {', '.join(SUITE_KEYS)}")
        jobs.append({**defaults, **entry})
    return jobs


def list_rows(as_json: bool) -> None:
    """Every row: task, what it needs on disk, split, metric, heads."""
    import sys

    from rich.console import Console
    from rich.table import Table

    from cluster.cli import print_json
    from pipeline.evaluate.metrics import WORDS
    from pipeline.evaluate.registry import ROWS

    if as_json:
        print_json({"rows": [
            {"task": row.name, "data_set": row.data_set, "paper": row.paper, "kind": row.kind, "metric": row.metric, "heads": row.heads,
             "needs": row.needs, "bands": [bands.describe() for bands in row.bands]} for row in ROWS
        ]})  # fmt: skip
        return
    table = Table(
        title="rows of --task (a set without published lists is split by hashed names, train / validation / test)",
        title_justify="left",
    )
    for head in ("task", "data set", "paper's row", "task and metric", "heads", "bands", "needs on disk"):
        table.add_column(head, overflow="fold")
    for row in ROWS:
        bands = "; ".join(f"{b.sensor} {b.unit} {b.gsd_m:g} m" for b in row.bands)
        table.add_row(
            row.name,
            row.data_set,
            row.paper,
            f"{row.kind}: {WORDS[row.metric]}",
            ", ".join(row.heads),
            bands,
            row.needs,
        )
    width = _width()
    Console(file=sys.stdout, width=width, highlight=False, markup=False, emoji=False).print(table)


def _width() -> int:
    """Columns: wide tables are not folded where the output is no terminal."""
    return max(160, shutil.get_terminal_size().columns)


def show(results: list[Result]) -> None:
    """Scores as a table, notes below it."""
    import sys

    from rich.console import Console
    from rich.table import Table

    from pipeline.evaluate.metrics import WORDS

    table = Table(
        title="score with 95 % interval over test items; gains are paired (* = excludes 0)", title_justify="left"
    )
    names = list(dict.fromkeys(name for result in results for name in result.baselines))
    heads = [
        "task",
        "head",
        "metric",
        "score",
        *names,
        *(f"gain over {name}" for name in names),
        "chance",
        "test",
        "split",
        "s",
    ]
    for head in heads:
        table.add_column(head, overflow="fold")
    for result in results:
        score = f"{result.score.value:.3f} [{result.score.low:.2f}, {result.score.high:.2f}]"
        base = [f"{result.baselines[name].value:.3f}" if name in result.baselines else "-" for name in names]
        gains = [str(result.gains.get(name, "-")) for name in names]
        table.add_row(
            result.task, f"{result.mode} {result.head}", WORDS[result.metric], score, *base, *gains, f"{result.score.chance:.3f}",
            str(result.items["test"]), result.split[:8], f"{result.seconds:.0f}",
        )  # fmt: skip
    width = _width()
    console = Console(file=sys.stdout, width=width, highlight=False, markup=False, emoji=False)
    console.print(table)
    for note in dict.fromkeys(
        f"{result.task}: {note}" for result in results for note in [f"split {result.how}", *result.notes]
    ):
        console.print(f"note: {note}", soft_wrap=True)


def _headline(results: list[Result]) -> dict[str, Any]:
    """The row's first head; the others under `heads`."""
    return {**results[0].to_json(), "heads": {result.head: result.to_json() for result in results}}
