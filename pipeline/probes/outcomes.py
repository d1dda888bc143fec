"""What each test site got, kept in the run directory, so that `compare` can pair two runs site by site. No torch.

```
probes/step-00000000.npz                       in-loop probes of the untrained network
probes/step-00000200.npz                       in-loop probes after step 200
probes/pixels-0123456789abcdef.npz             pixel statistics of the same views, same classifiers, under a split
probes/step-00000200.knn-0123456789abcdef.npz  `pipeline probe`: its task and split
probes/step-00000200.eurosat_rgb-0123456789abcdef.npz  in-loop probe of a row of `probe.outside`
```

A file holds plain arrays (`numpy.savez_compressed`, never pickled): the split's digest, the keys of its S test sites, the names
`<task>/<modality>`, one bool per name and site (tested), and per name one byte per site, or K x K counts for `segment`. At 512
sites of random outcomes: 5 kB with four scores of k-NN, 0.3 MB with four of a segmentation of 10 classes.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cluster import storage
from cluster.errors import RunFailure, UsageError
from cluster.lease import Lease
from pipeline.probes.scores import Difference, Outcome, difference, total_score

log = logging.getLogger(__name__)

FOLDER = "probes"
TASKS = ("knn", "linear", "segment")
UNTRAINED_STEP = 0  # the probe before the first step
UNTRAINED, PIXELS = "untrained", "pixels"  # rows that every score is measured against
_NAME = re.compile(r"step-(\d{8,})(?:\.([a-z0-9_]+-[0-9a-f]+))?\.npz$")


@dataclass(frozen=True)
class Outcomes:
    """One round of probes. split: digest, equal ones mean the same sites, labels and views; keys: its S test sites; by_name: `<task>/<modality>`."""

    split: str
    keys: tuple[str, ...]
    by_name: Mapping[str, Outcome]


def split_number(digest: str) -> float:
    """The digest's first 48 bits, which a metric can hold: `probe/split`."""
    return float(int(digest[:12], 16))


def url_of(rundir_url: str, step: int, kind: str = "") -> str:
    """Where the outcomes of a step lie. kind: `<task>-<split>` of an offline probe, `<row>-<split>` of an outside data set, empty for
    the run's own labels."""
    return storage.join(rundir_url, FOLDER, f"step-{step:08d}{'.' if kind else ''}{kind}.npz")


def pixels_url(rundir_url: str, split: str) -> str:
    """Where the outcomes of pixel statistics under a split lie."""
    return storage.join(rundir_url, FOLDER, f"pixels-{split}.npz")


def is_outside(kind: str) -> bool:
    """Whether outcomes are of a row of `probe.outside`, not of `pipeline probe`."""
    return bool(kind) and kind.partition("-")[0] not in TASKS


def list_offline(rundir_url: str) -> list[tuple[int, str]]:
    """(step, kind) of every offline probe, and of every probe of an outside data set, that the run directory keeps, ascending."""
    found = [_NAME.match(name) for name in storage.list_names(storage.join(rundir_url, FOLDER))]
    return sorted((int(match[1]), match[2]) for match in found if match and match[2])


def write_outcomes(url: str, outcomes: Outcomes, lease: Lease | None = None) -> None:
    """Writes the file whole or not at all; one that is there (a step done again) is replaced. lease: of the run that trains."""
    arrays = {
        "split": np.array(outcomes.split), "keys": np.array(outcomes.keys, np.str_),
        "names": np.array(list(outcomes.by_name), np.str_),
        "tested": np.array([o.tested for o in outcomes.by_name.values()], bool).reshape(len(outcomes.by_name), len(outcomes.keys)),
    }  # fmt: skip
    for i, outcome in enumerate(outcomes.by_name.values()):
        arrays[f"counts_{i}"] = outcome.counts.astype(np.min_scalar_type(int(outcome.counts.max(initial=0))))
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    (storage.write_atomic if lease is None else lease.write)(url, buffer.getvalue())


def read_outcomes(url: str) -> Outcomes:
    """The outcomes that `write_outcomes` wrote.

    Raises:
        FileNotFoundError: nothing there.
        UsageError: cut short, pickled, or not what `write_outcomes` writes.
    """
    data = storage.read_bytes(url)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            split, keys, names, tested = (file[name] for name in ("split", "keys", "names", "tested"))
            counts = [file[f"counts_{i}"] for i in range(len(names))]
        if {array.dtype.kind for array in (split, keys, names)} != {"U"} or tested.shape != (len(names), len(keys)):
            raise ValueError("names, keys and sites do not match")
        for array in counts:
            sites, *classes = array.shape
            if array.dtype.kind != "u" or sites != len(keys) or (classes and classes != classes[:1] * 2):
                raise ValueError(f"counts {array.dtype}{array.shape} of {len(keys)} sites")
        by_name = {str(names[i]): Outcome(tested[i].astype(bool), counts[i]) for i in range(len(names))}
        return Outcomes(str(split), tuple(keys.tolist()), by_name)
    except Exception as error:  # numpy, zipfile and zlib each have their own for broken bytes
        text = " ".join(str(error).split())
        raise UsageError(f"{url} holds no readable probe outcomes ({text[:120]}); probe again, or remove it") from None


def differences(outcomes: Outcomes, base: Outcomes) -> dict[str, Difference]:
    """By `<task>/<modality>`: outcomes − base over the same sites. Empty where the splits differ: those are never paired."""
    if outcomes.split != base.split or outcomes.keys != base.keys:
        return {}
    found = {
        name: difference(outcome, base.by_name[name])
        for name, outcome in outcomes.by_name.items() if name in base.by_name
    }  # fmt: skip
    return {name: value for name, value in found.items() if value is not None}


def against(outcomes: Outcomes, base: Outcomes, name: str) -> dict[str, float]:
    """Metrics of the same sites under another row, `untrained` or `pixels`: its score as `probe/<task>/<modality>/<name>`, and the
    paired difference to it as `…/over_<name>`, with `…/low` and `…/high`."""
    figures: dict[str, float] = {}
    for key, over in differences(outcomes, base).items():
        row = base.by_name[key]
        figures[f"probe/{key}/{name}"] = total_score(row)
        figures |= {
            f"probe/{key}/over_{name}": over.value,
            f"probe/{key}/over_{name}/low": over.low,
            f"probe/{key}/over_{name}/high": over.high,
        }
    return figures


def stored_pixels(rundir_url: str, split: str, tasks: Sequence[str]) -> Outcomes | None:
    """What pixel statistics got under this split, if the run directory has it for all of the tasks."""
    try:
        outcomes = read_outcomes(pixels_url(rundir_url, split))
    except (OSError, RunFailure, UsageError):  # not there, or broken: it is computed, and written, again
        return None
    is_whole = outcomes.split == split and {name.partition("/")[0] for name in outcomes.by_name} >= set(tasks)
    return outcomes if is_whole else None


def keep_round(
    outcomes: Outcomes, pixels: Outcomes, rundir_url: str, step: int, lease: Lease | None = None, kind: str = ""
) -> dict[str, float]:
    """Writes the outcomes of an in-loop probe, and returns how they stand `against` pixel statistics and the untrained network (the
    round of step 0, of the same kind). A store that fails costs the comparison, not the run: it is a warning."""
    figures = against(outcomes, pixels, PIXELS)
    try:
        url = pixels_url(rundir_url, pixels.split)
        if not storage.exists(url) or step == UNTRAINED_STEP:
            write_outcomes(url, pixels, lease)
        write_outcomes(url_of(rundir_url, step, kind), outcomes, lease)
        base = outcomes if step == UNTRAINED_STEP else read_outcomes(url_of(rundir_url, UNTRAINED_STEP, kind))
    except FileNotFoundError:
        log.warning("step %d: the run kept no probe of its untrained network; python -m pipeline probe shows it", step)
        return figures
    except (OSError, RunFailure, UsageError) as error:
        log.warning("step %d: probe outcomes: %s", step, error)
        return figures
    if base.split != outcomes.split:
        log.warning("step %d: the untrained network was probed on other sites or views than now, it is left out", step)
    return figures | against(outcomes, base, UNTRAINED)
