"""Tables from score records: Markdown, LaTeX (booktabs) and CSV from one set of cells.

Measured and published figures are never mixed silently: every row says which it is, measured cells
carry their interval, and the footnotes say how each number was obtained. A table is all real or
all synthetic.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from nemf.datasets import dataset_class
from nemf.errors import NemfError
from nemf.files import write_text
from nemf.scoring import check_alphas, get_protocol

PUBLISHED = Path(__file__).parent / "published"
_UNNUMBERED = re.compile(r"^Table \d+: ")  # LaTeX numbers tables itself
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
        known = {f.name for f in fields(cls)}
        for problem, keys in (("lacks", known - set(content)), ("unknown", set(content) - known)):
            if keys:
                raise NemfError(f"{path}: {problem} {', '.join(sorted(map(str, keys)))}")
        try:
            return cls(**_checked(content))
        except NemfError as problem:
            raise NemfError(f"{path}: {problem}") from None


def _checked(content: dict[str, Any]) -> dict[str, Any]:
    """The entries of a specification in the types of :class:`TableSpec`, or NemfError."""
    checked = dict(content)
    for key in ("name", "title", "split"):
        if not isinstance(content[key], str) or not content[key]:
            raise NemfError(f"{key} must be a text, not {content[key]!r}")
    if content["averaging"] not in ("image", "point"):
        raise NemfError(f"averaging must be image or point, not {content['averaging']!r}")
    for key in ("columns", "extra_columns", "protocols"):
        checked[key] = _texts(key, content[key])
    for dataset in checked["columns"] + checked["extra_columns"]:
        dataset_class(dataset)
    for protocol in checked["protocols"]:
        if protocol != "paper":
            get_protocol(protocol)
    matchers = content["matchers"]
    if not isinstance(matchers, dict) or set(matchers) != {"real", "synthetic"}:
        raise NemfError(f"matchers must list those for real and for synthetic, not {matchers!r}")
    checked["matchers"] = {kind: _texts("matchers", names) for kind, names in matchers.items()}
    grids = content["oracle_grids"]
    if not isinstance(grids, list) or not all(type(g) is int and g > 0 for g in grids):
        raise NemfError(f"oracle_grids must be a list of positive integers, not {grids!r}")
    checked["oracle_grids"] = tuple(grids)
    alphas = content["alphas"]
    if not isinstance(alphas, list):
        raise NemfError(f"alphas must be a list of numbers, not {alphas!r}")
    checked["alphas"] = check_alphas(alphas)
    published = content["published"]
    if published is not None and not (PUBLISHED / str(published)).is_file():
        known = ", ".join(sorted(file.name for file in PUBLISHED.glob("*.yaml")))
        raise NemfError(f"published must be null or one of {known}, not {published!r}")
    return checked


def _texts(key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise NemfError(f"{key} must be a list of names, not {value!r}")
    return tuple(value)


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
        spans = [
            f"\\multicolumn{{{n}}}{{c}}{{{_tex_heading(self.headings[d])}}}" for d in self.datasets
        ]
        rules = [
            f"\\cmidrule(lr){{{6 + n * i}-{5 + n * (i + 1)}}}" for i in range(len(self.datasets))
        ]
        alphas = [f"{a:g}" for _ in self.datasets for a in self.alphas]
        head = ["Method", "Origin", "Protocol", "Eval. reso.", "Flow reso."]
        lines = [
            "% Needs \\usepackage{booktabs}, \\usepackage{graphicx} and \\usepackage[T1]{fontenc}.",
            "\\begin{table*}",
            f"\\caption{{{_tex(_UNNUMBERED.sub('', self.title))}}}",
            "\\setlength{\\tabcolsep}{4pt}",
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
            lines.append(" & ".join(labels + self._values(row, _tex_mean)) + " \\\\")
            intervals = self._values(row, _tex_interval)
            if any(intervals):  # below the means, so that these line up with published ones
                lines.append(" & ".join([""] * 5 + intervals) + " \\\\")
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

    Records under a protocol that the specification does not name are left out, except those of
    predictions made elsewhere, whose protocol the user chose.

    NemfError if no record fits, if two records of a column come from different versions of a
    dataset (their fingerprints differ), if a record lacks an alpha, or if the published figures
    are averaged differently.
    """
    fitting = [
        r
        for r in records
        if r["predictions"]["synthetic"] == synthetic and r["predictions"]["split"] == spec.split
    ]
    shown = [*spec.columns, *spec.extra_columns]
    fitting = [r for r in fitting if r["predictions"]["dataset"] in shown and _belongs(r, spec)]
    if not fitting:
        kind = "synthetic" if synthetic else "real"
        raise NemfError(
            f"no {kind} score record for {spec.name}: run `nemf predict` and `nemf score`"
        )
    _one_fingerprint_per_dataset(fitting)
    _one_method_per_label(fitting)
    _every_alpha(fitting, spec)
    measured = {r["predictions"]["dataset"] for r in fitting}
    datasets = [*spec.columns, *(d for d in spec.extra_columns if d in measured)]
    published = None if synthetic or not spec.published else _load_published(spec)
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
    matchers = [record["predictions"]["matcher"] for record in records]
    matcher, card = matchers[0], matchers[0].get("card", {})
    marks = []
    if any(m.get("random_weights") for m in matchers):
        marks.append("random weights")
    if any(m.get("card", {}).get("oracle_class") for m in matchers):
        marks.append("oracle class")
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
        matcher = meta["matcher"]
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


def _load_published(spec: TableSpec) -> dict[str, Any]:
    published = yaml.safe_load((PUBLISHED / str(spec.published)).read_text(encoding="utf-8"))
    if published["averaging"] != spec.averaging:
        raise NemfError(
            f"{spec.published}: its figures are per-{published['averaging']} means, {spec.name} "
            f"shows per-{spec.averaging} means: set published: null"
        )
    return published


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


def _belongs(record: dict[str, Any], spec: TableSpec) -> bool:
    """Whether the specification asks for the record's protocol."""
    matcher, protocol = record["predictions"]["matcher"], record["protocol"]["id"]
    if matcher.get("external"):
        return True
    official = matcher.get("card", {}).get("official_protocol")
    return protocol in spec.protocols or ("paper" in spec.protocols and protocol == official)


def _every_alpha(records: Sequence[dict[str, Any]], spec: TableSpec) -> None:
    for record in records:
        absent = [f"{alpha:g}" for alpha in spec.alphas if alpha not in record["alphas"]]
        if absent:
            meta = record["predictions"]
            raise NemfError(
                f"{meta['matcher']['label']!r} on {meta['title']} is not scored at alpha "
                f"{', '.join(absent)}: run `nemf score --table` with the table's name"
            )


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


def _one_method_per_label(records: Sequence[dict[str, Any]]) -> None:
    """NemfError if a label stands for two methods: ours and one made elsewhere, or two configs."""
    seen: dict[str, dict[str, Any]] = {}
    for record in records:
        meta = record["predictions"]
        first = seen.setdefault(meta["matcher"]["label"], meta)
        for key in ("external", "name", "config"):
            if first["matcher"].get(key) != meta["matcher"].get(key):
                raise NemfError(
                    f"{meta['matcher']['label']!r} stands for two methods ({key} differs between "
                    f"{first['title']} and {meta['title']}): give one another --label or --name"
                )


def _heading(dataset: str, records: Sequence[dict[str, Any]], synthetic: bool) -> str:
    title = dataset_class(dataset).title
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
        text += f", measured on {meta['n_pairs']} of {official} pairs"
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
        protocol = record["protocol"]
        text = protocol["description"].replace(
            f"per-{protocol['averaging']} mean", f"per-{spec.averaging} mean"
        )
        protocols.setdefault(text, set()).add(record["predictions"]["title"])
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
    weights: dict[str, list[str]] = {}
    unanswered: dict[str, None] = {}
    for record in records:
        matcher = record["predictions"]["matcher"]
        if matcher.get("config", {}).get("backbone"):
            weights.setdefault(matcher["label"], []).append(matcher["weights_sha256"][:12])
        if record["n_unanswered"]:
            where = f"{matcher['label']} on {record['predictions']['title']}"
            count = f"{record['n_unanswered']} of {record['n_keypoints']}"
            unanswered[f"{where}: {count} unanswered (wrong)."] = None
    notes += [f"{m}: weights {', '.join(dict.fromkeys(of))}." for m, of in weights.items()]
    notes += unanswered
    external = {
        f"{m['label']}: predictions made elsewhere, file SHA-256 {m['file_sha256'][:12]}."
        for m in (record["predictions"]["matcher"] for record in records)
        if m.get("external")
    }
    notes += sorted(external)
    own = {_code(r) for r in records if not r["predictions"]["matcher"].get("external")}
    if own:
        notes.append(f"Code: {', '.join(sorted(own))}.")
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


def _tex_heading(text: str) -> str:
    """What follows the first comma goes below in small type: a wide heading would stretch its last
    column."""
    first, comma, rest = map(_tex, text.partition(", "))
    return f"\\shortstack{{{first}\\\\{{\\scriptsize {rest}}}}}" if comma else first


def _tex_mean(entry: dict[str, Any] | None) -> str:
    return "--" if entry is None else _plain_cell(entry).partition(" ")[0]


def _tex_interval(entry: dict[str, Any] | None) -> str:
    interval = _plain_cell(entry).partition(" ")[2]
    return f"{{\\tiny {interval}}}" if interval else ""


def _pipe(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "[": "{[}", "*": "{*}",  # after a line's end they would be its options
    "≤": r"$\leq$", "→": r"$\rightarrow$", "–": "--", "—": "---", "<": r"\textless{}",
    ">": r"\textgreater{}", "×": r"$\times$",
}  # fmt: skip


def _tex(text: str) -> str:
    return "".join(_TEX.get(char, char) for char in text)
