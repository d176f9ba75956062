"""Tables from score records: Markdown, LaTeX (booktabs) and CSV from one set of cells.

Measured and published figures are never mixed silently: every row says which it is, measured cells
carry their interval, and the footnotes say how each number was obtained. A table is all real or
all synthetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from nemf.errors import NemfError
from nemf.predictions import write_text
from nemf.scoring import check_alphas

PUBLISHED = Path(__file__).parent / "published"
_TITLES = {
    "spair": "SPair-71k",
    "pfpascal": "PF-PASCAL",
    "pfwillow": "PF-WILLOW",
    "animalpose": "AnimalPose",
}
_BASES = {"bbox": "bbox", "image": "img", "kps_extent": "bbox-kp", "kps_extent_padded": "bbox-kp"}


@dataclass(frozen=True)
class TableSpec:
    """A table's specification file (``experiments/tables/*.yaml``), see the comments there."""

    name: str
    title: str
    split: str
    alphas: tuple[float, ...]
    averaging: str
    columns: tuple[str, ...]
    extra_columns: tuple[str, ...]
    protocols: tuple[str, ...]
    matchers: dict[str, tuple[str, ...]]
    oracle_grids: tuple[int, ...]
    published: str | None

    @classmethod
    def load(cls, path: Path) -> TableSpec:
        """NemfError naming the file for anything missing, unknown or malformed."""
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as problem:
            raise NemfError(
                f"{path}: cannot be read as a table specification ({problem})"
            ) from None
        if not isinstance(content, dict):
            raise NemfError(f"{path}: must be a mapping")
        try:
            spec = cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in content.items()})
            matchers = {kind: tuple(names) for kind, names in dict(spec.matchers).items()}
        except (TypeError, ValueError) as problem:
            raise NemfError(f"{path}: {problem}") from None
        if spec.averaging not in ("image", "point"):
            raise NemfError(f"{path}: averaging must be image or point, not {spec.averaging!r}")
        object.__setattr__(spec, "matchers", matchers)
        object.__setattr__(spec, "alphas", check_alphas(spec.alphas))
        return spec


@dataclass
class Table:
    """A finished table. ``cells``: one row per number with all that is known of it (this is the
    CSV); ``rows`` and ``datasets`` give the printed order; ``footnotes`` are plain sentences."""

    name: str
    title: str
    alphas: tuple[float, ...]
    datasets: list[str]
    headings: dict[str, str]
    rows: list[dict[str, Any]]
    cells: pd.DataFrame
    footnotes: list[str]
    files: list[Path] = field(default_factory=list)

    def markdown(self) -> str:
        head = ["Method", "Origin", "Protocol", "Eval. reso.", "Flow reso."]
        for dataset in self.datasets:  # the heading once, over the first alpha
            first, *others = (f"@{a:g}" for a in self.alphas)
            head += [f"{self.headings[dataset]} {first}", *others]
        lines = [
            f"# {self.title}",
            "",
            _pipe(head),
            _pipe(["---"] * 5 + ["---:"] * (len(head) - 5)),
        ]
        lines += [_pipe(self._labels(row) + self._values(row, _plain_cell)) for row in self.rows]
        lines += ["", *(f"- {note}" for note in self.footnotes)]
        return "\n".join(lines) + "\n"

    def latex(self) -> str:
        n = len(self.alphas)
        spans = [f"\\multicolumn{{{n}}}{{c}}{{{_tex(self.headings[d])}}}" for d in self.datasets]
        rules = [
            f"\\cmidrule(lr){{{6 + n * i}-{5 + n * (i + 1)}}}" for i in range(len(self.datasets))
        ]
        alphas = [f"{a:g}" for _ in self.datasets for a in self.alphas]
        head = ["Method", "Origin", "Protocol", "Eval. reso.", "Flow reso."]
        lines = [
            "% Needs \\usepackage{booktabs}, \\usepackage{graphicx} and \\usepackage[T1]{fontenc}.",
            "\\begin{table*}",
            f"\\caption{{{_tex(self.title)}}}",
            "\\resizebox{\\textwidth}{!}{%",
            f"\\begin{{tabular}}{{lllll{'r' * (n * len(self.datasets))}}}",
            "\\toprule",
            " & ".join(["", "", "", "", "", *spans]) + " \\\\",
            " ".join(rules),
            " & ".join([*head, *alphas]) + " \\\\",
            "\\midrule",
        ]
        origin = None
        for row in self.rows:
            if origin not in (None, row["origin"]):
                lines.append("\\midrule")
            origin = row["origin"]
            labels = [_tex(text) for text in self._labels(row)]
            lines.append(" & ".join(labels + self._values(row, _tex_cell)) + " \\\\")
        lines += ["\\bottomrule", "\\end{tabular}}", "\\par\\smallskip\\footnotesize"]
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

    def _labels(self, row: dict[str, Any]) -> list[str]:
        keys = ("method", "origin", "protocol", "eval_resolution", "flow_resolution")
        return [str(row[key] or "–") for key in keys]

    def _values(self, row: dict[str, Any], render: Any) -> list[str]:
        return [render(row["values"].get((d, a))) for d in self.datasets for a in self.alphas]


def build_table(
    spec: TableSpec,
    records: Sequence[dict[str, Any]],
    *,
    synthetic: bool,
    missing: Iterable[str] = (),
) -> Table:
    """The table of a specification from score records of one kind (real or synthetic).

    Rows appear in the order of the labels given by the records' position; published rows (real
    tables only) come first, in the paper's order. ``missing``: sentences on what was not measured.

    NemfError if no record fits, or if two records of a column come from different versions of a
    dataset (their fingerprints differ).
    """
    fitting = [
        r
        for r in records
        if r["predictions"]["synthetic"] == synthetic and r["predictions"]["split"] == spec.split
    ]
    shown = [*spec.columns, *spec.extra_columns]
    fitting = [r for r in fitting if r["predictions"]["dataset"] in shown]
    if not fitting:
        kind = "synthetic" if synthetic else "real"
        raise NemfError(
            f"no {kind} score record for {spec.name}: run `nemf predict` and `nemf score`"
        )
    _one_fingerprint_per_dataset(fitting)
    measured = {r["predictions"]["dataset"] for r in fitting}
    datasets = [*spec.columns, *(d for d in spec.extra_columns if d in measured)]
    published = None if synthetic or not spec.published else _load_published(spec.published)
    rows, cells = _published_rows(published, datasets, spec) if published else ([], [])
    for key, group in _grouped(fitting).items():
        row, row_cells = _measured_row(key, group, spec)
        rows.append(row)
        cells += row_cells
    warning = " — SYNTHETIC stand-ins (rendered objects): says nothing about photographs"
    return Table(
        name=spec.name,
        title=spec.title + (warning if synthetic else ""),
        alphas=spec.alphas,
        datasets=datasets,
        headings={d: _heading(d, fitting, synthetic) for d in datasets},
        rows=rows,
        cells=pd.DataFrame(cells),
        footnotes=_footnotes(fitting, published, rows, spec, missing),
    )


def _grouped(records: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Records by (matcher label, protocol): floors, then matchers, then ceilings; a matcher's own
    paper protocol before the others."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        key = (record["predictions"]["matcher"]["label"], record["protocol"]["id"])
        groups.setdefault(key, []).append(record)
    order = list(dict.fromkeys(label for label, _ in groups))

    def rank(key: tuple[str, str]) -> tuple[bool, int, bool, str]:
        matcher = groups[key][0]["predictions"]["matcher"]
        own = matcher.get("card", {}).get("official_protocol") == key[1]
        return matcher["name"] == "oracle-grid", order.index(key[0]), not own, key[1]

    return {key: groups[key] for key in sorted(groups, key=rank)}


def _measured_row(
    key: tuple[str, str], records: list[dict[str, Any]], spec: TableSpec
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    label, protocol = key
    matcher = records[0]["predictions"]["matcher"]
    card = matcher.get("card", {})
    marks = [
        text
        for flag, text in (
            (matcher.get("random_weights"), "random weights"),
            (card.get("oracle_class"), "oracle class"),
        )
        if flag
    ]
    row = {
        "method": label + (f" [{', '.join(marks)}]" if marks else ""),
        "origin": "external" if matcher.get("external") else "measured",
        "protocol": protocol,
        "eval_resolution": _eval_resolution(records[0]["protocol"]["frame"]),
        "flow_resolution": matcher.get("flow_resolution") or card.get("flow_resolution"),
        "values": {},
    }
    cells = []
    for record in records:
        meta = record["predictions"]
        for entry in record["metrics"]:
            if (entry["group"], entry["averaging"]) != ("all", spec.averaging):
                continue
            if entry["alpha"] not in spec.alphas:
                continue
            row["values"][meta["dataset"], entry["alpha"]] = entry
            code = meta.get("code") or {}
            cells.append(
                {
                    k: row[k]
                    for k in ("method", "origin", "protocol", "eval_resolution", "flow_resolution")
                }
                | {
                    "dataset": meta["dataset"],
                    "split": meta["split"],
                    "synthetic": meta["synthetic"],
                }
                | {k: entry[k] for k in ("alpha", "averaging", "pck", "low", "high")}
                | {"level": record["level"]}
                | {k: entry[k] for k in ("n_pairs", "n_keypoints", "n_images")}
                | {"official_pairs": meta["official_pairs"], "fingerprint": meta["fingerprint"]}
                | {"weights_sha256": matcher.get("weights_sha256"), "commit": code.get("commit")}
                | {"dirty": code.get("dirty"), "scored_by": record["scored_by"].get("commit")}
                | {"predictions_sha256": record["predictions_sha256"], "source": "this run"}
            )
    return row, cells


def _load_published(name: str) -> dict[str, Any]:
    return yaml.safe_load((PUBLISHED / name).read_text(encoding="utf-8"))


def _published_rows(
    published: dict[str, Any], datasets: Sequence[str], spec: TableSpec
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rows, cells = [], []
    for method in published["methods"]:
        row = {
            "method": f"{method['method']} ({method['venue']} {method['year']})",
            "origin": "published",
            "protocol": "its paper's",
            "eval_resolution": method["eval_resolution"],
            "flow_resolution": method["flow_resolution"],
            "values": {},
        }
        for dataset in datasets:
            for alpha, value in method["pck"].get(dataset, {}).items():
                if alpha not in spec.alphas:
                    continue
                row["values"][dataset, alpha] = {"pck": value / 100, "published": True}
                labels = {k: row[k] for k in row if k != "values"}
                cells.append(
                    labels
                    | {"dataset": dataset, "split": "test", "synthetic": False, "alpha": alpha}
                    | {"averaging": published["averaging"], "pck": value / 100}
                    | {"source": published["source"]}
                )
        rows.append(row)
    return rows, cells


def _one_fingerprint_per_dataset(records: Sequence[dict[str, Any]]) -> None:
    seen: dict[str, dict[str, Any]] = {}
    for record in records:
        meta = record["predictions"]
        first = seen.setdefault(meta["dataset"], meta)
        if first["fingerprint"] != meta["fingerprint"]:
            raise NemfError(
                f"{meta['title']}: {first['matcher']['label']!r} was predicted on "
                f"{first['fingerprint'][:12]} ({first['n_pairs']} pairs) but "
                f"{meta['matcher']['label']!r} on {meta['fingerprint'][:12]} ({meta['n_pairs']} "
                "pairs): predict both on one version of the dataset, or use another OUT="
            )


def _heading(dataset: str, records: Sequence[dict[str, Any]], synthetic: bool) -> str:
    title = _TITLES.get(dataset, dataset)
    mine = [r for r in records if r["predictions"]["dataset"] == dataset]
    if not mine:
        base = {"spair": "bbox", "pfpascal": "img", "pfwillow": "bbox-kp"}.get(dataset, "")
        return f"{title} ({base}), not measured"
    meta, protocol = mine[0]["predictions"], mine[0]["protocol"]
    text = f"{title} ({_BASES[protocol['bases'][meta['layout']]]})"
    if synthetic:
        return f"synthetic {text}"
    official = meta["official_pairs"]
    if official is not None and meta["n_pairs"] != official:
        text += f", {meta['n_pairs']} of {official} pairs"
    return text


def _eval_resolution(frame: dict[str, Any]) -> str:
    kinds = {"original": "ori", "squash": f"{frame['side']}", "fit": f"max {frame['side']}"}
    return kinds[frame["kind"]]


def _footnotes(
    records: Sequence[dict[str, Any]],
    published: dict[str, Any] | None,
    rows: Sequence[dict[str, Any]],
    spec: TableSpec,
    missing: Iterable[str],
) -> list[str]:
    notes = [f"PCK in percent, per-{spec.averaging} mean, at the given alphas."]
    notes.append(
        f"Measured cells: mean [{records[0]['level']:.0%} interval]; the interval counts images, "
        "not pairs, as independent (docs/statistics.md) and is a claim about these weights."
    )
    if published:
        notes.append(
            f"Published rows are figures as printed in {published['source']}; not measured here."
        )
        notes += [
            f"{m['method']}: {m['note'].strip()}." for m in published["methods"] if m.get("note")
        ]
    protocols = {}
    for record in records:
        protocols.setdefault(record["protocol"]["description"], set()).add(
            record["predictions"]["title"]
        )
    notes += [f"{text} ({', '.join(sorted(on))})." for text, on in sorted(protocols.items())]
    if any(row["values"] and "oracle-grid" in row["method"] for row in rows):
        notes.append(
            "oracle-grid GxG is no method: the truth snapped to the centres of a GxG grid over the "
            "reference image, the ceiling of predictions of that resolution."
        )
    seen = {}
    for record in records:
        meta = record["predictions"]
        seen[meta["dataset"]] = (
            f"{'synthetic ' if meta['synthetic'] else ''}{meta['title']} {meta['split']}: "
            f"{record['n_pairs']} pairs of {record['n_images']} distinct images, "
            f"{record['n_keypoints']} keypoints, fingerprint {meta['fingerprint'][:12]}."
        )
    notes += list(seen.values())
    weights = {}
    for record in records:
        matcher = record["predictions"]["matcher"]
        if matcher.get("config", {}).get("backbone"):
            weights[matcher["label"]] = matcher["weights_sha256"][:12]
        if record["n_unanswered"]:
            where = f"{matcher['label']} on {record['predictions']['title']}"
            weights[where] = (
                f"{record['n_unanswered']} of {record['n_keypoints']} unanswered (wrong)"
            )
    notes += [
        f"{label}: weights {text}." if "unanswered" not in text else f"{label}: {text}."
        for label, text in weights.items()
    ]
    notes.append(f"Code: {', '.join(sorted({_code(r) for r in records}))}.")
    return notes + [f"Not measured: {sentence}" for sentence in missing]


def _code(record: dict[str, Any]) -> str:
    code = record["predictions"].get("code") or {}
    if not code.get("commit"):
        return "predictions from outside a git checkout"
    return f"commit {code['commit'][:12]}" + (" with uncommitted changes" if code["dirty"] else "")


def _plain_cell(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "–"
    if entry.get("published"):
        return f"{entry['pck'] * 100:.1f}"
    if entry["low"] is None:
        return f"{entry['pck'] * 100:.1f} [no interval]"
    return f"{entry['pck'] * 100:.1f} [{entry['low'] * 100:.1f}, {entry['high'] * 100:.1f}]"


def _tex_cell(entry: dict[str, Any] | None) -> str:
    mean, _, interval = _plain_cell(entry).partition(" ")
    if entry is None:
        return "--"
    return f"{mean} {{\\tiny {interval}}}" if interval else mean


def _pipe(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "≤": r"$\leq$", "→": r"$\rightarrow$", "–": "--", "—": "---", "<": r"\textless{}",
    ">": r"\textgreater{}", "×": r"$\times$",
}  # fmt: skip


def _tex(text: str) -> str:
    return "".join(_TEX.get(char, char) for char in text)
