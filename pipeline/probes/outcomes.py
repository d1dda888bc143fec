"""What each test site got, kept in the run directory, so that `compare` can pair two runs site by site. No torch.

```
probes/step-00000200.npz                       in-loop probes after step 200
probes/step-00000200.knn-0123456789abcdef.npz  `pipeline probe`: its task and split
```

A file holds plain arrays (`numpy.savez_compressed`, never pickled): the split's digest, the keys of its S test sites, the names
`<task>/<modality>`, one bool per name and site (tested), and per name one byte per site, or K x K counts for `segment`. At 512
sites of random outcomes: 5 kB with four scores of k-NN, 0.3 MB with four of a segmentation of 10 classes.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cluster import storage
from cluster.errors import RunFailure, UsageError
from pipeline.probes.scores import Difference, Outcome, difference

log = logging.getLogger(__name__)

FOLDER = "probes"
BASELINE_STEP = 1  # the probe after the first step: all but untrained
_NAME = re.compile(r"step-(\d{8,})(?:\.([a-z]+-[0-9a-f]+))?\.npz$")


@dataclass(frozen=True)
class Outcomes:
    """One round of probes. split: digest, equal ones mean the same sites and labels; keys: its S test sites; by_name: `<task>/<modality>`."""

    split: str
    keys: tuple[str, ...]
    by_name: Mapping[str, Outcome]


def split_number(digest: str) -> float:
    """The digest's first 48 bits, which a metric can hold: `probe/split`."""
    return float(int(digest[:12], 16))


def url_of(rundir_url: str, step: int, kind: str = "") -> str:
    """Where the outcomes of a step lie. kind: `<task>-<split>` of an offline probe, empty for the in-loop ones."""
    return storage.join(rundir_url, FOLDER, f"step-{step:08d}{'.' if kind else ''}{kind}.npz")


def list_offline(rundir_url: str) -> list[tuple[int, str]]:
    """(step, kind) of every offline probe that the run directory keeps, ascending."""
    found = [_NAME.match(name) for name in storage.list_names(storage.join(rundir_url, FOLDER))]
    return sorted((int(match[1]), match[2]) for match in found if match and match[2])


def write_outcomes(url: str, outcomes: Outcomes) -> None:
    """Writes the file whole or not at all; one that is there (a step done again) is replaced."""
    arrays = {
        "split": np.array(outcomes.split), "keys": np.array(outcomes.keys, np.str_),
        "names": np.array(list(outcomes.by_name), np.str_),
        "tested": np.array([o.tested for o in outcomes.by_name.values()], bool).reshape(len(outcomes.by_name), len(outcomes.keys)),
    }  # fmt: skip
    for i, outcome in enumerate(outcomes.by_name.values()):
        arrays[f"counts_{i}"] = outcome.counts.astype(np.min_scalar_type(int(outcome.counts.max(initial=0))))
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    storage.write_atomic(url, buffer.getvalue())


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


def keep(outcomes: Outcomes, rundir_url: str, step: int) -> dict[str, float]:
    """Writes the outcomes of an in-loop probe, and returns what it gained since step 1 as `probe/<task>/<modality>/gain`,
    with `…/gain/low` and `…/gain/high`. A store that fails costs the comparison, not the run: it is a warning."""
    try:
        write_outcomes(url_of(rundir_url, step), outcomes)
        if step == BASELINE_STEP:
            return {}
        base = read_outcomes(url_of(rundir_url, BASELINE_STEP))
    except FileNotFoundError:  # a run that began before outcomes were kept
        return {}
    except (OSError, RunFailure, UsageError) as error:
        log.warning("step %d: probe outcomes: %s", step, error)
        return {}
    figures: dict[str, float] = {}
    for name, gain in differences(outcomes, base).items():
        key = f"probe/{name}/gain"
        figures |= {key: gain.value, f"{key}/low": gain.low, f"{key}/high": gain.high}
    return figures
