"""The comparison as one HTML file: tables, and interactive curves; everything inside, no network."""

from __future__ import annotations

import html
from collections.abc import Sequence

from pipeline.compare.ablation import effect_row, effects, headline_probes, legend
from pipeline.compare.curves import curves_part
from pipeline.compare.figures import Summary
from pipeline.compare.groups import Group
from pipeline.compare.load import RunData
from pipeline.compare.page import COLOURS, page, table
from pipeline.compare.paired import Pairs
from pipeline.compare.seed_tables import TextTable
from pipeline.compare.terminal import difference_rows, figure_rows, shown
from pipeline.compare.verdict import Verdict


def html_report(
    runs: Sequence[RunData], verdict: Verdict, summaries: Sequence[Summary], pairs: Pairs, ablation: bool = False,
    evaluations: Sequence[tuple[str, list[str]]] = (),
) -> str:  # fmt: skip
    """The whole page."""
    names = " · ".join(
        f'<span><span class="key" style="background:{COLOURS[i % len(COLOURS)]}"></span>{html.escape(run.name)}</span>'
        for i, run in enumerate(runs)
    )
    parts = [
        f"<h1>Comparison of {len(runs)} runs</h1><p>{names}</p>",
        "<h2>Settings that differ</h2>", settings_part(runs, verdict),
        "<h2>Is the comparison fair?</h2>", verdict_part(verdict, pairs.notes),
        f"<h2>Figures at {summaries[0].samples:,} samples seen</h2>",
        table(["figure", *(run.name for run in runs)], [[key, *cells] for key, cells in figure_rows(summaries)]),
    ]  # fmt: skip
    rows = difference_rows(runs, summaries, pairs)
    if rows:
        parts += ["<h2>Differences of probe scores</h2><p>Paired over test sites, 95 % intervals; * = excludes 0.</p>",
                  table(["probe", *(run.name for run in runs)], [[key, *cells] for key, cells in rows])]  # fmt: skip
    if evaluations:
        parts += ["<h2>Evaluations on published sets</h2><p>95 % intervals over test items; below, the difference from the first run, paired over "
                  "the items; * = excludes 0.</p>",
                  table(["row", *(run.name for run in runs)], [[key, *cells] for key, cells in evaluations])]  # fmt: skip
    if ablation:
        found = effects(runs, summaries, pairs)
        keys = headline_probes(found)
        head = ["run", "changes", *(key.removeprefix("probe/") for key in keys), "loss", "samples/s"]
        parts += [f"<h2>Ablation</h2><p>{html.escape(legend(found, keys))}</p>",
                  table(head, [effect_row(effect, keys) for effect in found])]  # fmt: skip
    curves, scripts = curves_part(runs)
    parts += ["<h2>Curves</h2>", *curves, "<h2>Runs</h2>", _runs(runs)]
    return page(f"Comparison of {', '.join(run.name for run in runs)}", parts, scripts)


def html_groups(
    runs: Sequence[RunData], groups: Sequence[Group], verdict: Verdict, notes: Sequence[str], found: Sequence[TextTable]
) -> str:
    """The page of runs that differ in seeds: the tables of groups, curves coloured by group, the runs."""
    names = " · ".join(
        f'<span><span class="key" style="background:{COLOURS[i % len(COLOURS)]}"></span>{html.escape(group.name)} '
        f"({len(group.members)})</span>"
        for i, group in enumerate(groups)
    )
    parts = [
        f"<h1>Comparison of {len(groups)} settings, {len(runs)} runs</h1><p>{names}</p>",
        "<h2>Is the comparison fair?</h2>", verdict_part(verdict, notes),
    ]  # fmt: skip
    for one in found:
        below = f"<p>{html.escape(one.below)}</p>" if one.below else ""
        parts.append(f"<h2>{html.escape(one.title)}</h2>{below}{table(one.head, one.rows)}")
    colours = [next(n for n, group in enumerate(groups) if i in group.members) for i in range(len(runs))]
    curves, scripts = curves_part(runs, colours)
    parts += ["<h2>Curves</h2>", *curves, "<h2>Runs</h2>", _runs(runs)]
    return page(f"Comparison of {', '.join(group.name for group in groups)}", parts, scripts)


def settings_part(runs: Sequence[RunData], verdict: Verdict) -> str:
    """The table of settings that differ."""
    if not verdict.differs:
        return "<p>None: the runs have the same settings.</p>"
    rows = [[key, *(shown(value) for value in values)] for key, values in verdict.differs.items()]
    return table(["key", *(run.name for run in runs)], rows, numeric=False)


def verdict_part(verdict: Verdict, more: Sequence[str]) -> str:
    """Whether the comparison is fair, why not, and what to keep in mind."""
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in (*verdict.notes, *more))
    notes = f"<p>To keep in mind:</p><ul>{notes}</ul>" if notes else ""
    if verdict.comparable:
        return f'<p class="good">Comparable: same data, same statistics, same probe split.</p>{notes}'
    reasons = "".join(f"<li>{html.escape(reason)}</li>" for reason in verdict.reasons)
    return f'<div class="bad"><strong>Not comparable.</strong><ul>{reasons}</ul></div>{notes}'


def _runs(runs: Sequence[RunData]) -> str:
    rows = []
    for run in runs:
        data = (
            ", ".join(f"{dataset.url} ({dataset.manifest_sha256[:12]})" for dataset in run.facts.datasets) or "unknown"
        )
        revision = run.tags.get("mlflow.source.git.commit", "unknown")[:12]
        rows.append([run.name, run.where, run.facts.layout or "unknown", data, revision])
    return table(["run", "where", "layout", "data (manifest)", "revision"], rows, numeric=False)
