"""What is done with the numbers of each date of a cube, and why: claims of the metadata, evidence of the pixels, the policy between.

The record of it rides in the sample and in the index, so that training can leave out what somebody does not trust.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from data_prep.config import QualityConfig
from data_prep.harmonise import (
    Claim,
    Decision,
    Evidence,
    backscatter_unit,
    claim_of,
    corrected,
    decide,
    decision_entry,
)
from data_prep.schema import ModalitySpec
from data_prep.sources.cube import Cube
from data_prep.sources.evidence import Floors, backscatter_sample, pooled, shared_cache
from data_prep.sources.records import Asset, SourceFault


@dataclass(frozen=True)
class Dated:
    """What is done with one date: a decision per layer of the cube, its record, and the contradictions found."""

    layers: tuple[Decision, ...]
    entry: dict[str, Any]
    flags: tuple[str, ...] = ()
    floors: tuple[Floors, ...] = field(default=(), compare=False)


def reflectance_decisions(
    assets: tuple[Asset, ...], cube: Cube, spec: ModalitySpec, dates: Sequence[int], policy: str = "keep"
) -> dict[int, Dated]:
    """Per date what metadata and pixels make of it.

    Args:
        policy: "correct" takes what the pixels say where they contradict the metadata; else the metadata decides, and `flags`
            says what is wrong with that.
    """
    decided: dict[int, list[tuple[Decision, Evidence]]] = {date: [] for date in dates}
    seen: dict[int, list[Floors]] = {date: [] for date in dates}
    of_layer = {date: _claims(cube, spec, date) for date in dates}
    slots: dict[int, list[Decision]] = {date: [Decision(0.0, 1.0, "")] * len(cube.layers) for date in dates}
    for claim, layers, members in _grouped(of_layer):
        evidence, floors = _evidence(assets, cube, spec, claim, layers, members)
        for date in members:
            decision = decide(claim, evidence[date])
            if decision.flags and policy == "correct" and (better := corrected(claim, evidence[date])) is not None:
                decision = better
            elif note := _undecided(claim, evidence, date):
                decision = replace(decision, flags=(*decision.flags, note))
            decided[date].append((decision, evidence[date]))
            seen[date] += [floors[date]] if date in floors else []
            for layer in layers:
                slots[date][layer] = decision
    return {date: _dated(cube, date, tuple(slots[date]), decided[date], tuple(seen[date])) for date in dates}


def _claims(cube: Cube, spec: ModalitySpec, date: int) -> tuple[Claim, ...]:
    info = cube.dates[date]
    return tuple(
        claim_of(cube.speaker(layer), info.baseline, info.offset_dn, spec.has_boa_offset)
        for layer in range(len(cube.layers))
    )


def _grouped(of_layer: dict[int, tuple[Claim, ...]]) -> list[tuple[Claim, tuple[int, ...], list[int]]]:
    """(claim, the layers it is made for, the dates) over all dates: what is declared alike is judged by the same rule."""
    groups: dict[tuple[Claim, tuple[int, ...]], list[int]] = {}
    for date, claims in of_layer.items():
        for claim in dict.fromkeys(claims):
            layers = tuple(layer for layer, own in enumerate(claims) if own == claim)
            groups.setdefault((claim, layers), []).append(date)
    return [(claim, layers, dates) for (claim, layers), dates in groups.items()]


def _evidence(
    assets: tuple[Asset, ...], cube: Cube, spec: ModalitySpec, claim: Claim, layers: tuple[int, ...], dates: list[int]
) -> tuple[dict[int, Evidence], dict[int, Floors]]:
    """Each date's own; where it cannot tell and nothing is declared, what the other dates say with one voice."""
    if not spec.has_boa_offset and claim.scale_said:
        return dict.fromkeys(dates, Evidence("unclear")), {}
    floors = shared_cache().floors(assets, cube, dates, layers, claim)
    own = {date: floors[date].judge() for date in dates}
    unclear = [date for date in dates if own[date].verdict == "unclear"]
    if claim.offset_dn is not None or not spec.has_boa_offset or not unclear:
        return own, floors
    voices = {evidence.verdict for evidence in own.values()} - {"unclear"}
    if not voices:  # too few pixels each, perhaps not all together
        voices = {pooled([floors[date] for date in dates]).verdict} - {"unclear"}
    if len(voices) == 1:
        voice = voices.pop()
        own |= {date: replace(own[date], verdict=voice) for date in unclear}
    return own, floors


def _undecided(claim: Claim, evidence: dict[int, Evidence], date: int) -> str:
    """The flag of a date without metadata whose pixels cannot tell, in a series whose other dates disagree."""
    if claim.offset_dn is not None or evidence[date].verdict != "unclear":
        return ""
    others = {one.verdict for one in evidence.values()}
    return (
        "nothing declared, its pixels cannot tell, and the other dates disagree"
        if {"present", "absent"} <= others
        else ""
    )


def _dated(
    cube: Cube,
    date: int,
    layers: tuple[Decision, ...],
    decided: list[tuple[Decision, Evidence]],
    floors: tuple[Floors, ...],
) -> Dated:
    info = cube.dates[date]
    decision, evidence = decided[0]
    flags = tuple(dict.fromkeys(flag for one, _ in decided for flag in one.flags))
    entry = decision_entry(replace(decision, flags=flags), evidence, baseline=info.baseline or cube.asset.baseline)
    if len(decided) > 1:
        entry["per_band"] = {
            band: [one.gain, one.offset_applied] for layer, one in zip(cube.layers, layers) for band in layer.bands
        }
    resolved = all(one.corrected or not one.flags for one, _ in decided)
    return Dated(layers, entry, () if resolved else flags, floors)


def backscatter_decision(cube: Cube) -> tuple[str, tuple[str, ...]]:
    """(dB or linear, contradictions) of a cube's numbers. Raises SourceFault for uncalibrated amplitudes."""
    return backscatter_unit(backscatter_sample(cube), cube.asset.unit, cube.asset.id)


def judged(flags: Sequence[str], quality: QualityConfig, asset: str, is_corrected: bool = False) -> str:
    """Why a date with these contradictions is left out; "" if it stays. Raises SourceFault where the policy is to fail."""
    if not flags:
        return ""
    if quality.on_contradiction == "fail":
        raise SourceFault(asset, f"{flags[0]} (quality.on_contradiction=fail)")
    if is_corrected:
        return ""
    return f"contradiction: {flags[0]}"
