"""The comparison as one HTML file: no script, no network, plots as inline SVG."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence

import numpy as np

from pipeline.compare.ablation import effect_row, effects, headline_probes, legend
from pipeline.compare.figures import Summary, curve, curve_names, level
from pipeline.compare.groups import Group
from pipeline.compare.load import RunData
from pipeline.compare.paired import Pairs
from pipeline.compare.seed_tables import TextTable
from pipeline.compare.terminal import NAMES, difference_rows, figure_rows, shown
from pipeline.compare.verdict import Verdict

# Okabe and Ito's colours: told apart with any colour vision
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")
MAX_PLOTS = 40
LEVELS = {"untrained": ":", "pixels": "--"}  # horizontal lines of a probe's plot
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:75rem;padding:0 1rem;color:#1b1b1b;background:#fff}
h1{font-size:1.5rem} h2{font-size:1.15rem;margin-top:2rem} table{border-collapse:collapse;margin:.5rem 0}
td,th{border:1px solid #ccc;padding:.25rem .6rem;text-align:left;vertical-align:top;overflow-wrap:anywhere}
td.n{text-align:right;font-variant-numeric:tabular-nums} .bad{border-left:5px solid #b00020;background:#fdecee;padding:.6rem 1rem}
.good{border-left:5px solid #1b7f3b;background:#eaf6ee;padding:.6rem 1rem} .plots{display:flex;flex-wrap:wrap;gap:1rem}
figure{margin:0} figcaption{font-weight:600;font-size:.9rem} .key{display:inline-block;width:.9em;height:.9em;margin-right:.3em}
"""


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
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>Comparison of {html.escape(', '.join(run.name for run in runs))}</title><style>{_STYLE}</style></head><body>",
        f"<h1>Comparison of {len(runs)} runs</h1><p>{names}</p>",
        "<h2>Settings that differ</h2>", _settings(runs, verdict),
        "<h2>Is the comparison fair?</h2>", _verdict(verdict, pairs.notes),
        f"<h2>Figures at {summaries[0].samples:,} samples seen</h2>",
        _table(["figure", *(run.name for run in runs)], [[key, *cells] for key, cells in figure_rows(summaries)]),
    ]  # fmt: skip
    rows = difference_rows(runs, summaries, pairs)
    if rows:
        parts += ["<h2>Differences of probe scores</h2><p>Paired over test sites, 95 % intervals; * = excludes 0.</p>",
                  _table(["probe", *(run.name for run in runs)], [[key, *cells] for key, cells in rows])]  # fmt: skip
    if evaluations:
        parts += ["<h2>Evaluations on published sets</h2><p>95 % intervals over test items; below, the difference from the first run, paired over "
                  "the items; * = excludes 0.</p>",
                  _table(["row", *(run.name for run in runs)], [[key, *cells] for key, cells in evaluations])]  # fmt: skip
    if ablation:
        found = effects(runs, summaries, pairs)
        keys = headline_probes(found)
        head = ["run", "changes", *(key.removeprefix("probe/") for key in keys), "loss", "samples/s"]
        parts += [f"<h2>Ablation</h2><p>{html.escape(legend(found, keys))}</p>",
                  _table(head, [effect_row(effect, keys) for effect in found])]  # fmt: skip
    parts += ["<h2>Curves by samples seen</h2>", _plots(runs), "<h2>Runs</h2>", _runs(runs), "</body></html>"]
    return "\n".join(parts)


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
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>Comparison of {html.escape(', '.join(group.name for group in groups))}</title><style>{_STYLE}</style></head><body>",
        f"<h1>Comparison of {len(groups)} settings, {len(runs)} runs</h1><p>{names}</p>",
        "<h2>Is the comparison fair?</h2>", _verdict(verdict, notes),
    ]  # fmt: skip
    for one in found:
        below = f"<p>{html.escape(one.below)}</p>" if one.below else ""
        parts.append(f"<h2>{html.escape(one.title)}</h2>{below}{_table(one.head, one.rows)}")
    colours = [next(n for n, group in enumerate(groups) if i in group.members) for i in range(len(runs))]
    parts += ["<h2>Curves by samples seen</h2>", _plots(runs, colours), "<h2>Runs</h2>", _runs(runs), "</body></html>"]
    return "\n".join(parts)


def _settings(runs: Sequence[RunData], verdict: Verdict) -> str:
    if not verdict.differs:
        return "<p>None: the runs have the same settings.</p>"
    rows = [[key, *(shown(value) for value in values)] for key, values in verdict.differs.items()]
    return _table(["key", *(run.name for run in runs)], rows, numeric=False)


def _verdict(verdict: Verdict, more: Sequence[str]) -> str:
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
    return _table(["run", "where", "layout", "data (manifest)", "revision"], rows, numeric=False)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numeric: bool = True) -> str:
    cells = "".join(f"<th>{html.escape(text)}</th>" for text in head)
    kind = ' class="n"' if numeric else ""
    body = "".join(
        "<tr>" + "".join(f"<td{kind if i else ''}>{html.escape(cell)}</td>" for i, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"


def _plots(runs: Sequence[RunData], colours: Sequence[int] | None = None) -> str:
    names = curve_names(runs)
    figures = [
        f"<figure><figcaption>{html.escape(key)}</figcaption>{svg_plot(runs, key, colours)}</figure>"
        for key in names[:MAX_PLOTS]
    ]
    cut = f"<p>{len(names) - MAX_PLOTS} more metrics are not drawn: {html.escape(', '.join(names[MAX_PLOTS:]))}</p>"
    more = cut if len(names) > MAX_PLOTS else ""
    return (
        f'<div class="plots">{"".join(figures)}</div>{more}'
        if figures
        else "<p>No metric was logged more than once.</p>"
    )


def svg_plot(runs: Sequence[RunData], key: str, colours: Sequence[int] | None = None) -> str:
    """One metric of all runs over samples seen, as an SVG element; probe scores with their intervals and, as horizontal lines, what
    the same sites give untrained (dotted) and from pixel statistics (dashed). colours: number of each run's colour; runs that share
    one (seeds of a setting) have no legend: the page's head names them."""
    import matplotlib

    colours = range(len(runs)) if colours is None else colours

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": key}):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5.2, 2.8), layout="constrained")
        axes = figure.add_subplot()
        for i, run in enumerate(runs):
            x, y = curve(run, key)
            colour = COLOURS[colours[i] % len(COLOURS)]
            axes.plot(
                x, y, color=colour, linewidth=1.6, marker="o" if len(x) < 12 else None, markersize=3, label=run.name
            )
            for row, style in LEVELS.items():
                height = level(run, key, row)
                if height is not None:
                    axes.axhline(
                        height, color=colour, linestyle=style, linewidth=1, alpha=0.7, label=_level_label(row, i)
                    )
            low, high = (curve(run, f"{key}/{end}")[1] for end in ("low", "high"))
            if len(low) == len(high) == len(x) > 0:
                axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_xlabel("samples seen")
        axes.grid(alpha=0.3)
        axes.ticklabel_format(axis="x", style="plain" if _max_samples(runs) < 1e6 else "sci")
        if len(runs) <= len(COLOURS) and len(set(colours)) == len(runs):
            axes.legend(fontsize=7, frameon=False)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def _level_label(row: str, run: int) -> str:
    """One entry of the legend for the lines of all runs."""
    return NAMES[row] if run == 0 else "_"


def _max_samples(runs: Sequence[RunData]) -> float:
    return float(np.max([run.lines[-1].get("samples", 0) for run in runs]))
