"""A finished table and its files: Markdown, LaTeX (booktabs) and CSV from one set of cells."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd

from nemf.files import write_text

_UNNUMBERED = re.compile(r"^Table \d+: ")  # LaTeX numbers tables itself


@dataclass(frozen=True)
class Column:
    """A column of figures: the cells of one dataset, group and alpha, or, with ``delta``, what they
    differ by from published figures. ``over``: the heading it shares with its neighbours, if any;
    ``interval``: whether its cells print theirs (the CSV always holds them)."""

    dataset: str
    group: str
    alpha: float
    heading: str
    over: str | None = None
    interval: bool = True
    delta: bool = False

    @property
    def key(self) -> tuple[Any, ...]:
        """Of its cells in the rows' ``values``."""
        return value_key(self.dataset, self.group, self.alpha)


def value_key(dataset: str, group: str, alpha: float) -> tuple[Any, ...]:
    """Of a cell in a row's ``values``, see :class:`Table`."""
    return (dataset, alpha) if group == "all" else (dataset, alpha, group)


@dataclass
class Table:
    """A finished table. ``cells``: one row per number with all that is known of it (this is the
    CSV); ``rows`` and ``columns`` are printed in their order; ``footnotes`` are plain sentences.

    A row's ``values`` hold its cells: ``(dataset, alpha)`` the one over all pairs, ``(dataset,
    alpha, group)`` those of a class or of the class mean. A cell has ``pck``, ``low``, ``high``
    (None: no interval), ``rank`` ("best", "second", None), ``same`` (no difference from the best is
    shown), and ``delta`` (measured minus published, or None); ``published`` marks figures that were
    not measured. ``headings`` are the datasets'.
    """

    name: str
    title: str
    alphas: tuple[float, ...]
    datasets: list[str]
    headings: dict[str, str]
    rows: list[dict[str, Any]]
    cells: pd.DataFrame
    footnotes: list[str]
    files: list[Path] = field(default_factory=list)
    columns: list[Column] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)

    def markdown(self) -> str:
        head = list(self.labels.values())
        for over, columns in groupby(self.columns, lambda column: column.over):
            first, *others = (
                f"{'@' if over and not column.delta else ''}{column.heading}" for column in columns
            )
            head += [f"{over} {first}" if over else first, *others]
        width = len(self.labels)
        lines = [
            f"# {self.title}",
            "",
            _pipe(head),
            _pipe(["---"] * width + ["---:"] * (len(head) - width)),
        ]
        for section, rows in self._sections():
            if section:
                lines.append(_pipe([f"*{section}*"] + [""] * (len(head) - 1)))
            lines += [_pipe(self._labels(row) + self._values(row, _markdown_cell)) for row in rows]
        lines += ["", *(f"- {note}" for note in self.footnotes)]
        return "\n".join(lines) + "\n"

    def latex(self) -> str:
        left, right = len(self.labels), len(self.columns)
        empty = [""] * left
        spans, rules, at = [], [], left + 1
        for over, columns in groupby(self.columns, lambda column: column.over):
            n = len(list(columns))
            if over:
                spans.append(f"\\multicolumn{{{n}}}{{c}}{{{_tex_heading(over)}}}")
                rules.append(f"\\cmidrule(lr){{{at}-{at + n - 1}}}")
            else:
                spans += [""] * n
            at += n
        lines = [
            "% Needs \\usepackage{booktabs}, \\usepackage{graphicx} and \\usepackage[T1]{fontenc}.",
            "\\begin{table*}",
            f"\\caption{{{_tex(_UNNUMBERED.sub('', self.title))}}}",
            "\\setlength{\\tabcolsep}{4pt}",
            "\\resizebox{\\textwidth}{!}{%",
            # room at the right for the mark that hangs out of the last column
            f"\\begin{{tabular}}{{{'l' * left}{'r' * right}@{{\\hspace{{8pt}}}}}}",
            "\\toprule",
        ]
        if rules:
            lines += [" & ".join([*empty, *spans]) + " \\\\", " ".join(rules)]
        headings = [
            f"{{\\scriptsize {_tex(column.heading)}}}" if column.delta else _tex(column.heading)
            for column in self.columns
        ]
        lines.append(" & ".join([*self.labels.values(), *headings]) + " \\\\")
        for section, rows in self._sections():
            lines.append("\\midrule")
            if section:
                text = f"\\textit{{{_tex(section)}}}"
                lines.append(f"\\multicolumn{{{left + right}}}{{l}}{{{text}}} \\\\")
            for row in rows:
                labels = [_tex(text) for text in self._labels(row)]
                lines.append(" & ".join(labels + self._values(row, _tex_cell)) + " \\\\")
                intervals = self._values(row, _tex_interval)
                if any(intervals):  # below the means, so that these line up with published ones
                    lines.append(" & ".join(empty + intervals) + " \\\\")
        lines += ["\\bottomrule", "\\end{tabular}}", "\\par\\smallskip\\footnotesize\\raggedright"]
        lines += [_tex(note) + "\\par" for note in self.footnotes]
        return "\n".join([*lines, "\\end{table*}"]) + "\n"

    def write(self, folder: Path) -> list[Path]:
        """``<name>.md``, ``.tex`` and ``.csv`` in the folder, each whole or not at all."""
        texts = {
            "md": self.markdown(),
            "tex": self.latex(),
            "csv": self.cells.to_csv(index=False, lineterminator="\n"),
        }
        self.files = [folder / f"{self.name}.{ending}" for ending in texts]
        for path, text in zip(self.files, texts.values(), strict=True):
            write_text(path, text)
        return self.files

    def _sections(self) -> Iterator[tuple[str | None, list[dict[str, Any]]]]:
        """Published rows and all others, with a heading each where there are both."""
        kinds = {True: "Published: as printed, not measured here", False: "Measured here"}
        parts = {published: [] for published in kinds}
        for row in self.rows:
            parts[row["origin"] == "published"].append(row)
        for published, rows in parts.items():
            if rows:
                yield kinds[published] if all(parts.values()) else None, rows

    def _labels(self, row: dict[str, Any]) -> list[str]:
        return [str(row[key] or "–") for key in self.labels]

    def _values(self, row: dict[str, Any], render: Any) -> list[str]:
        return [render(row["values"].get(column.key), column) for column in self.columns]


# -- one cell --------------------------------------------------------------------------------------


def _mean(entry: dict[str, Any]) -> str:
    return f"{entry['pck'] * 100:.1f}"


def _interval(entry: dict[str, Any] | None, column: Column, form: str) -> str:
    """The interval's bounds in a ``form`` with room for two, or empty where none is printed."""
    if entry is None or entry.get("published") or column.delta or not column.interval:
        return ""
    if entry["low"] is None:
        return "[no interval]"
    return form % (entry["low"] * 100, entry["high"] * 100)


def _delta(entry: dict[str, Any] | None) -> str:
    if entry is None or entry.get("delta") is None:
        return ""
    points = round(entry["delta"] * 100, 1)
    return "0.0" if points == 0 else f"{points:+.1f}".replace("-", "−")


def _markdown_cell(entry: dict[str, Any] | None, column: Column) -> str:
    if column.delta:
        return _delta(entry)
    if entry is None:
        return "–"
    # <ins>: of HTML's ways to underline the one that GitHub and MLflow let through
    mean = {"best": "**{}**", "second": "<ins>{}</ins>", None: "{}"}[entry["rank"]]
    text = mean.format(_mean(entry)) + (" ≈" if entry.get("same") else "")
    return f"{text} {_interval(entry, column, '[%.1f, %.1f]')}".rstrip()


def _tex_cell(entry: dict[str, Any] | None, column: Column) -> str:
    if column.delta:
        return _tex(_delta(entry))
    if entry is None:
        return "--"
    mean = {"best": "\\textbf{%s}", "second": "\\underline{%s}", None: "%s"}[entry["rank"]]
    # \rlap: the digits of a column stay in line
    return mean % _mean(entry) + ("\\rlap{$^\\approx$}" if entry.get("same") else "")


def _tex_interval(entry: dict[str, Any] | None, column: Column) -> str:
    # narrower than brackets, so that it can be larger
    interval = _interval(entry, column, "%.1f--%.1f")
    return f"{{\\scriptsize {interval}}}" if interval else ""


def _tex_heading(text: str) -> str:
    """What follows the first comma goes below in small type: a wide heading would stretch its last
    column."""
    first, comma, rest = map(_tex, text.partition(", "))
    return f"\\shortstack{{{first}\\\\{{\\scriptsize {rest}}}}}" if comma else first


def _pipe(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "[": "{[}", "*": "{*}",  # after a line's end they would be its options
    "≤": r"$\leq$", "≥": r"$\geq$", "≈": r"$\approx$", "→": r"$\rightarrow$", "–": "--",
    "—": "---", "<": r"\textless{}", ">": r"\textgreater{}", "×": r"$\times$", "−": "$-$",
    "Δ": r"$\Delta$",
}  # fmt: skip


def _tex(text: str) -> str:
    return "".join(_TEX.get(char, char) for char in text)
