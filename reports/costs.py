"""What matchers cost: the table, and accuracy drawn against cost. Torch-free.

``content`` is what :func:`experiments.matcher_costs.measure` returns, with the accuracies that
:func:`add_published` or :func:`add_measured` give its rows. docs/benchmarks.md shows a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemf.errors import NemfError
from nemf.files import write_text
from reports.figure_files import MARKERS, PAGE_IN, palette, write_figure
from reports.published_figures import PublishedTable
from reports.published_lookup import published_figures
from reports.wording import code_text, dataset_title, is_part

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = {  # key of a row: heading, format
    "parameters": ("parameters (M)", lambda v: f"{v / 1e6:.1f}"),
    "image_gflop": ("GFLOP an image", lambda v: f"{v:.1f}"),
    "pair_gflop": ("GFLOP a pair", lambda v: f"{v:.1f}"),
    "image_ms": ("ms an image", lambda v: f"{v:,.0f}"),
    "pair_ms": ("ms a pair", lambda v: f"{v:,.0f}"),
    "peak_mib": ("peak MiB", lambda v: f"{v:,.0f}"),
}


def add_published(content: dict[str, Any], table: str, dataset: str, alpha: float) -> None:
    """Gives each row the figure that a published table has for it, else the one that most sources
    print (the first of equals), or None: ``pck`` as a fraction, without an interval. They were
    obtained on other machines, by the papers' own protocols."""
    published = PublishedTable.load(table)
    figures = {m.name: m.figures.get((dataset, "all", alpha)) for m in published.methods}
    elsewhere = []
    for row in content["rows"]:
        figure = figures.get(row["published_as"])
        if figure is None and (found := _most_printed(row["label"], dataset, alpha)):
            figure, source = found
            elsewhere.append(f"{row['label']} as in {source}")
        row["accuracy"] = None if figure is None else {"pck": figure / 100}
    content["accuracy"] = {
        "origin": "published",
        "alpha": alpha,
        "text": f"PCK@{alpha:g} on {dataset} as printed in {published.source}"
        + (f" ({'; '.join(elsewhere)})" if elsewhere else "")
        + "; not measured here, each by its paper's protocol, with trained weights",
    }


def _most_printed(method: str, dataset: str, alpha: float) -> tuple[float, str] | None:
    """PCK (%) and its first source."""
    printed = published_figures()
    fits = printed[["method", "dataset", "class", "alpha"]] == [method, dataset, "all", alpha]
    counted = printed[fits.all(axis=1)].groupby("pck_percent", sort=False)["source"]
    if not len(counted):
        return None
    percent = counted.size().idxmax()
    return float(percent), counted.first()[percent]


def add_measured(
    content: dict[str, Any],
    records: Sequence[dict[str, Any]],
    protocol: str,
    alpha: float,
    dataset: str | None = None,
) -> None:
    """Gives each row ``pck``, ``low`` and ``high`` of the score record with its label under
    ``protocol``, or None. ``dataset``: its name; by default the one that the records are about.

    NemfError if there is no such record, if they are about several datasets or versions of one, or
    if ``alpha`` was not scored.
    """
    labels = {row["label"] for row in content["rows"]}
    fitting = [
        r
        for r in records
        if r["protocol"]["id"] == protocol
        and r["predictions"]["matcher"]["label"] in labels
        and dataset in (None, r["predictions"]["dataset"])
    ]
    about = {(r["predictions"]["dataset"], r["predictions"]["fingerprint"]) for r in fitting}
    if not about:
        raise NemfError(
            f"no score of {', '.join(sorted(labels))} under {protocol}: run `nemf predict` and "
            "`nemf score`"
        )
    if len(about) > 1:
        names = sorted({name for name, _ in about})
        raise NemfError(
            f"scores on {len(about)} datasets or versions ({', '.join(names)}): choose --dataset, "
            "or another --out"
        )
    found = {}
    for record in fitting:
        averaging = record["protocol"]["averaging"]
        entry = next(
            (
                e
                for e in record["metrics"]
                if (e["group"], e["averaging"], e["alpha"]) == ("all", averaging, alpha)
            ),
            None,
        )
        if entry is None:
            raise NemfError(f"alpha {alpha:g} was not scored: run `nemf score --alphas {alpha:g}`")
        label = record["predictions"]["matcher"]["label"]
        found[label] = {key: entry[key] for key in ("pck", "low", "high")}
    for row in content["rows"]:
        row["accuracy"] = found.get(row["label"])
    meta = fitting[0]["predictions"]
    pairs = f"{meta['n_pairs']:,} pairs"
    if is_part(meta):
        pairs = f"{meta['n_pairs']:,} of {meta['official_pairs']:,} pairs"
    content["accuracy"] = {
        "origin": "measured",
        "alpha": alpha,
        "text": f"PCK@{alpha:g} on {dataset_title(meta)} ({pairs}), {protocol}, with "
        f"{fitting[0]['level']:.0%} intervals",
        "fingerprint": meta["fingerprint"],
    }


def markdown(content: dict[str, Any]) -> str:
    """The table of costs, and how they were measured."""
    accuracy = content["accuracy"]
    heads = ["matcher", *(head for head, _ in _COLUMNS.values()), f"PCK@{accuracy['alpha']:g}"]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|--:" * (len(heads) - 1) + "|"]
    for row in content["rows"]:
        cells = [form(row[key]) for key, (_, form) in _COLUMNS.items()]
        lines.append("| " + " | ".join([row["label"], *cells, _accuracy_text(row)]) + " |")
    return "\n".join(["# What the matchers cost", "", *lines, "", *_notes(content)]) + "\n"


def write(content: dict[str, Any], folder: Path) -> list[Path]:
    """``costs.md`` and ``costs.{png,pdf,json}`` in ``folder``; each file whole or not at all."""
    write_text(folder / "costs.md", markdown(content))
    caption = " ".join(note.removeprefix("- ") for note in _notes(content))
    whole = {"figure": "costs", "caption": caption, **content}
    rows = [row for row in content["rows"] if row["accuracy"]]
    times = [row["image_ms"] + row["pair_ms"] for row in rows]
    accuracy = content["accuracy"]
    filled = accuracy["origin"] == "measured"

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        _scatter(left, rows, times, filled=filled)
        _scatter(right, rows, [row["peak_mib"] for row in rows], filled=filled)
        left.set(xlabel="one new image and one pair (ms)")
        right.set(xlabel="peak memory (MiB)")
        left.set(ylabel=f"PCK@{accuracy['alpha']:g} (%), {accuracy['origin']}")
        right.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)

    return [folder / "costs.md", *write_figure(folder / "costs", whole, (PAGE_IN, 2.6), draw)]


def _scatter(
    axes: Axes, rows: Sequence[dict[str, Any]], costs: Sequence[float], *, filled: bool
) -> None:
    """Accuracy over cost, with the interval where there is one; published figures are hollow."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    colours = palette()
    for number, (row, cost) in enumerate(zip(rows, costs, strict=True)):
        colour, found = colours[number % len(colours)], row["accuracy"]
        if found.get("low") is not None:
            axes.vlines(cost, 100 * found["low"], 100 * found["high"], lw=1, color=colour)
        axes.plot(
            cost, 100 * found["pck"], MARKERS[number % len(MARKERS)], ms=6, ls="none",
            label=row["label"], color=colour, mfc=colour if filled else "none",
        )  # fmt: skip
    axes.set(xscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(which="minor", lw=0.2)


def _accuracy_text(row: dict[str, Any]) -> str:
    found = row["accuracy"]
    if found is None:
        return "–"
    text = f"{100 * found['pck']:.1f}"
    if found.get("low") is not None:
        text += f" [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"
    return text


def _notes(content: dict[str, Any]) -> list[str]:
    height, width = content["size"]
    machine, accuracy = content["machine"], content["accuracy"]
    random = [row["label"] for row in content["rows"] if row["random_weights"]]
    notes = [
        f"Two pictures of {width}x{height} px, {content['n_points']} points.",
        f"{machine['device']}, {machine['threads']} threads, {machine['platform']}.",
        f"{code_text(content['code'])}.".capitalize(),
        "Time: the shortest of up to three runs, after one that does not count.",
        (
            "GFLOP: as torch counts matrix products, convolutions and attention, multiply and add "
            "as two; fused kernels that it does not know, as of NeMF's search on a CPU, are not in."
        ),
        "Peak memory: while two images are encoded and matched, weights included.",
        f"{accuracy['text']}.",
    ]
    if random:
        notes.append(
            f"Random weights in {', '.join(random)}: the costs are those of trained ones, except "
            "where a search depends on them (NeMF)."
        )
    return [f"- {note}" for note in notes]
