"""Tables: golden renderings, ranks, differences from published figures, classes, what is marked,
what is never mixed, and broken specifications."""

from __future__ import annotations

import csv
import dataclasses
import io
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import yaml

import reports.published_figures
from experiments.jobs import TABLES, find_datasets, predict_table, rescorer, score_table
from nemf.errors import NemfError
from nemf.scoring import get_protocol
from reports.published_figures import PublishedTable
from reports.ranking import CLASS_MEAN, Contender, class_mean, places, rank_columns
from reports.records import PairScores, alpha_name, current_records
from reports.tables import Table, TableSpec, build_table

TITLES = {"spair": "SPair-71k", "pfpascal": "PF-PASCAL", "pfwillow": "PF-WILLOW"}
OFFICIAL = {"spair": 12234, "pfpascal": 299, "pfwillow": 900}
SPEC: dict[str, Any] = {
    "name": "small",
    "kind": "datasets",
    "title": "Table 9: PCK (%)",
    "split": "test",
    "alphas": [0.05, 0.1],
    "averaging": "image",
    "columns": ["pfwillow"],
    "extra_columns": [],
    "protocols": ["paper", "canonical@1"],
    "matchers": {"real": ["copy"], "synthetic": ["copy"]},
    "oracle_grids": [],
    "published": None,
}


def spec_of(folder: Path, **changes: Any) -> TableSpec:
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(SPEC | changes))
    return TableSpec.load(path)


@pytest.fixture
def spec(tmp_path: Path) -> TableSpec:
    return spec_of(tmp_path)


def record(
    label: str = "mine",
    protocol: str = "canonical@1",
    dataset: str = "pfwillow",
    pck: tuple[float, ...] = (0.25, 0.5),
    *,
    low: float | None = 0.125,
    synthetic: bool = False,
    n_pairs: int | None = None,
    split: str = "test",
    fingerprint: str = "0123456789abcdef",
    alphas: tuple[float, ...] = (0.05, 0.1),
    official: str | None = "canonical@1",
    unanswered: int = 0,
    commit: str | None = "c" * 40,
    **matcher: Any,
) -> dict[str, Any]:
    """A score record with what tables read of it; the per-point mean is 0.01 less."""
    rule = get_protocol(protocol)
    card = {"official_protocol": official, "oracle_class": False, "flow_resolution": None}
    metrics = [
        {"group": group, "value": group, "averaging": averaging, "alpha": alpha,
         "pck": value - (averaging == "point") * 0.01 - (group != "all") * 0.2,
         "low": low, "high": None if low is None else 0.75, "se": 0.1,
         "n_pairs": 900, "n_keypoints": 9000, "n_images": 70}
        for group in ("all", "class")
        for averaging in ("image", "point")
        for alpha, value in zip(alphas, pck, strict=True)
    ]  # fmt: skip
    return {
        "format": 1,
        "predictions": {
            "dataset": dataset, "title": TITLES[dataset], "split": split, "layout": dataset,
            "fingerprint": fingerprint, "synthetic": synthetic,
            "n_pairs": OFFICIAL[dataset] if n_pairs is None else n_pairs,
            "official_pairs": None if synthetic else OFFICIAL[dataset],
            "matcher": {"name": "mine", "label": label, "card": card} | matcher,
            "code": {"commit": commit, "dirty": False},
            "plan": "src2trg-own", "key": "k" * 24, "facts": {"seed": 2022},
        },
        "predictions_sha256": "d" * 64,
        "protocol": {
            "id": protocol, "averaging": rule.averaging, "bases": rule.bases,
            "frame": dataclasses.asdict(rule.frame),
            "description": rule.describe(dataset),
        },
        "alphas": list(alphas), "level": 0.95,
        "n_pairs": 900, "n_images": 70, "n_keypoints": 9000, "n_unanswered": unanswered,
        "scored_by": {"commit": "e" * 40, "dirty": False},
        "metrics": metrics,
    }  # fmt: skip


def external(label: str, **changes: Any) -> dict[str, Any]:
    made = record(label, **changes)
    made["predictions"]["matcher"] = {
        "name": label, "label": label, "external": True, "file_sha256": "a" * 64,
    }  # fmt: skip
    made["predictions"]["code"] = None
    return made


def methods(table: Table) -> list[tuple[str, str, str]]:
    return [(row["method"], row["origin"], row["protocol"]) for row in table.rows]


def by_class(label: str, fractions: dict[str, list[float]], **changes: Any) -> dict[str, Any]:
    """A record on SPair-71k at alpha 0.1 from the fraction correct of each pair of each class."""
    made = record(label, dataset="spair", alphas=(0.1,), pck=(0.0,), **changes)
    every = [value for values in fractions.values() for value in values]
    made["metrics"] = [
        {"group": group, "value": value, "averaging": "image", "alpha": 0.1,
         "pck": sum(of) / len(of), "low": 0.0, "high": 1.0, "se": 0.1,
         "n_pairs": len(of), "n_keypoints": 10 * len(of), "n_images": 2 * len(of)}
        for group, value, of in [
            ("all", "all", every), *(("class", name, of) for name, of in fractions.items())
        ]
    ]  # fmt: skip
    return made


def pair_scores(
    fractions: dict[str, list[float]], n: int | list[int] = 10, alpha: float = 0.1
) -> PairScores:
    """Per-pair scores of the same kind; no two pairs share an image."""
    values = np.array([value for of in fractions.values() for value in of])
    names = [name for name, of in fractions.items() for _ in of]
    counts = np.broadcast_to(n, values.shape)
    number = np.arange(len(values))
    frame = pd.DataFrame(
        {
            "pair": pd.Categorical([f"pair {i}" for i in number]),
            "category": pd.Categorical(names),
            "image_a": 2 * number, "image_b": 2 * number + 1,
            "n": counts, alpha_name(alpha): np.rint(values * counts).astype(int),
        }
    )  # fmt: skip
    return PairScores(frame, (alpha,), get_protocol("canonical@1"), {})


# -- golden renderings ----------------------------------------------------------------------------


@pytest.fixture
def small(spec: TableSpec) -> Table:
    """Two measured rows, one without an interval at the second alpha."""
    lone = record("lone", pck=(0.0, 1.0))
    lone["metrics"][1] |= {"low": None, "high": None}
    return build_table(spec, [record("a|b_c"), lone], synthetic=False)


MARKDOWN = r"""# Table 9: PCK (%)

| Method | Origin | Protocol | Eval. reso. | Flow reso. | PF-WILLOW (bbox-kp) @0.05 | @0.1 |
| --- | --- | --- | --- | --- | ---: | ---: |
| a\|b_c | measured | canonical@1 | ori | – | **25.0** [12.5, 75.0] | <ins>50.0</ins> ≈ [12.5, 75.0] |
| lone | measured | canonical@1 | ori | – | <ins>0.0</ins> ≈ [12.5, 75.0] | **100.0** [no interval] |

- PCK in percent, per-image mean, at the given alphas.
- Measured cells: mean and 95% interval, which counts images, not pairs, as independent (docs/statistics.md) and is a claim about these weights.
- Measured rows are ranked within each column and protocol: best bold, second underlined, equal means alike.
- ≈: no difference from the best is shown, the 95% intervals overlap (no paired test: the scores of each pair were not at hand).
- canonical@1: src→trg; error ≤ alpha x trg kps extent; original pixels; per-image mean (PF-WILLOW).
- PF-WILLOW test: 900 pairs of 70 distinct images, 9000 keypoints, fingerprint 0123456789ab.
- Code: predictions by commit cccccccccccc; scores by commit eeeeeeeeeeee.
"""  # noqa: E501

LATEX = r"""% Needs \usepackage{booktabs}, \usepackage{graphicx} and \usepackage[T1]{fontenc}.
\begin{table*}
\caption{PCK (\%)}
\setlength{\tabcolsep}{4pt}
\resizebox{\textwidth}{!}{%
\begin{tabular}{lllllrr@{\hspace{8pt}}}
\toprule
 &  &  &  &  & \multicolumn{2}{c}{PF-WILLOW (bbox-kp)} \\
\cmidrule(lr){6-7}
Method & Origin & Protocol & Eval. reso. & Flow reso. & 0.05 & 0.1 \\
\midrule
a|b\_c & measured & canonical@1 & ori & -- & \textbf{25.0} & \underline{50.0}\rlap{$^\approx$} \\
 &  &  &  &  & {\scriptsize 12.5--75.0} & {\scriptsize 12.5--75.0} \\
lone & measured & canonical@1 & ori & -- & \underline{0.0}\rlap{$^\approx$} & \textbf{100.0} \\
 &  &  &  &  & {\scriptsize 12.5--75.0} & {\scriptsize [no interval]} \\
\bottomrule
\end{tabular}}
\par\smallskip\footnotesize\raggedright
PCK in percent, per-image mean, at the given alphas.\par
Measured cells: mean and 95\% interval, which counts images, not pairs, as independent (docs/statistics.md) and is a claim about these weights.\par
Measured rows are ranked within each column and protocol: best bold, second underlined, equal means alike.\par
$\approx$: no difference from the best is shown, the 95\% intervals overlap (no paired test: the scores of each pair were not at hand).\par
canonical@1: src$\rightarrow$trg; error $\leq$ alpha x trg kps extent; original pixels; per-image mean (PF-WILLOW).\par
PF-WILLOW test: 900 pairs of 70 distinct images, 9000 keypoints, fingerprint 0123456789ab.\par
Code: predictions by commit cccccccccccc; scores by commit eeeeeeeeeeee.\par
\end{table*}
"""  # noqa: E501

CSV_HEADER = (
    "method,origin,protocol,eval_resolution,flow_resolution,dataset,split,synthetic,group,alpha,"
    "averaging,pck,low,high,level,rank,same_as_best,p_best,published,delta_published,n_pairs,"
    "n_keypoints,n_images,n_unanswered,official_pairs,fingerprint,plan,key,seed,matcher,"
    "weights_sha256,random_weights,commit,dirty,scored_by,scored_dirty,predictions_sha256,source"
)
CSV_ROW = (
    "a|b_c,measured,canonical@1,ori,,pfwillow,test,False,all,0.05,image,0.25,0.125,0.75,0.95,best,"
    f"False,,,,900,9000,70,0,900,0123456789abcdef,src2trg-own,{'k' * 24},2022,mine,,,{'c' * 40},"
    f"False,{'e' * 40},False,{'d' * 64},this run"
)


def test_markdown_is_golden(small: Table) -> None:
    assert small.markdown() == MARKDOWN


def test_latex_is_golden(small: Table) -> None:
    assert small.latex() == LATEX


def test_csv_is_golden_and_files_are_written(small: Table, tmp_path: Path) -> None:
    files = small.write(tmp_path / "new")
    assert [file.name for file in files] == ["small.md", "small.tex", "small.csv"]
    assert files[0].read_text(encoding="utf-8") == MARKDOWN
    assert files[1].read_text(encoding="utf-8") == LATEX
    lines = files[2].read_text(encoding="utf-8").splitlines()
    assert lines[:2] == [CSV_HEADER, CSV_ROW]
    assert len(lines) == 5  # two methods at two alphas
    assert {file.name for file in (tmp_path / "new").iterdir()} == {f.name for f in files}


def test_the_three_renderers_agree(small: Table, tmp_path: Path) -> None:
    small.write(tmp_path)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "small.csv").read_text())))
    for row in rows:
        shown = f"{float(row['pck']) * 100:.1f}"
        assert shown in small.markdown()
        assert shown in small.latex()


# -- special characters ---------------------------------------------------------------------------


def test_latex_escapes_what_latex_would_read(spec: TableSpec) -> None:
    label = r"50% & $x_1^2$ #{a} ~\b <c> [d] *"
    text = build_table(spec, [record(label)], synthetic=False).latex()
    (line,) = [line for line in text.splitlines() if line.startswith("50")]
    assert line.startswith(
        r"50\% \& \$x\_1\textasciicircum{}2\$ \#\{a\} \textasciitilde{}\textbackslash{}b "
        r"\textless{}c\textgreater{} {[}d] {*} & measured"
    )


def test_markdown_escapes_pipes(spec: TableSpec) -> None:
    text = build_table(spec, [record("a|b|c")], synthetic=False).markdown()
    assert r"| a\|b\|c | measured |" in text


def compiled(tex: Path) -> list[str]:
    """pdflatex's complaints about a table in a paper of two columns."""
    (tex.parent / "page.tex").write_text(
        r"\documentclass[twocolumn]{article}\usepackage{booktabs}\usepackage{graphicx}"
        rf"\usepackage[T1]{{fontenc}}\begin{{document}}\input{{{tex.name}}}\end{{document}}"
    )
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"],
        cwd=tex.parent, capture_output=True, text=True, errors="replace", timeout=120,
    )  # fmt: skip
    marks = ("!", "Overfull", "LaTeX Warning: Float")
    complaints = [line for line in done.stdout.splitlines() if line.startswith(marks)]
    assert done.returncode == 0, complaints
    assert (tex.parent / "page.pdf").stat().st_size > 1000
    return complaints


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_the_latex_compiles(tmp_path: Path, comparable: str) -> None:
    spec = spec_of(tmp_path, columns=["spair", "pfpascal", "pfwillow"], published=comparable)
    records = [
        record(r"50% & $x_1^2$ #{a} ~\b <c> [d] * ≤ ≥ ≈ → – — × Δ −", unanswered=3),
        record("*starred", dataset="pfpascal", n_pairs=65),
        published_again("first"),
        external("[bracketed]"),
    ]
    table = build_table(spec, records, synthetic=False, missing=["SPair-71k: no folder."])
    assert r"\textbf" in table.latex()
    assert r"$\Delta$ published" in table.latex()
    table.write(tmp_path)
    assert not compiled(tmp_path / "small.tex")


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_a_table_of_eighteen_classes_compiles(tmp_path: Path) -> None:
    spec = TableSpec.load(TABLES / "table2.yaml")
    published = PublishedTable.load(spec.published)
    classes = [g for _, g, _ in published.methods[0].figures if g != "all"]
    assert len(classes) == 18
    records = [by_class(f"mine {k}", {c: [k / 10] for c in classes}) for k in range(3)]
    table = build_table(spec, records, synthetic=False)
    assert len(table.columns) == 20
    table.write(tmp_path)
    assert not compiled(tmp_path / "table2.tex")


# -- real and synthetic ---------------------------------------------------------------------------


def test_a_synthetic_table_says_so_and_shows_nothing_published(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, published="nemf_table1.yaml")
    table = build_table(spec, [record("real"), record("fake", synthetic=True)], synthetic=True)
    assert methods(table) == [("fake", "measured", "canonical@1")]
    assert "SYNTHETIC" in table.title
    for text in (table.markdown(), table.latex()):
        assert "SYNTHETIC" in text
        assert "synthetic PF-WILLOW" in text
        assert "published" not in text.lower()
    assert table.cells["synthetic"].all()


def test_a_real_table_shows_nothing_synthetic(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, published="nemf_table1.yaml")
    table = build_table(spec, [record("fake", synthetic=True), record("real")], synthetic=False)
    assert {m for m, origin, _ in methods(table) if origin == "measured"} == {"real"}
    assert not table.cells["synthetic"].any()
    assert "synthetic" not in table.markdown().lower()


@pytest.mark.parametrize("synthetic", [True, False])
def test_nothing_to_show_is_an_error(synthetic: bool, spec: TableSpec) -> None:
    others = [
        record(synthetic=not synthetic),
        record(synthetic=synthetic, split="val"),
        record(synthetic=synthetic, dataset="spair"),
    ]
    kind = "synthetic" if synthetic else "real"
    with pytest.raises(NemfError, match=f"no {kind} score record for small"):
        build_table(spec, others, synthetic=synthetic)


# -- parts and versions of datasets ---------------------------------------------------------------


def test_a_part_says_how_large_it_is(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, columns=["spair", "pfpascal", "pfwillow"])
    part = record(dataset="pfpascal", n_pairs=65)
    table = build_table(spec, [part, record()], synthetic=False)
    assert table.headings == {
        "spair": "SPair-71k (bbox), not measured",
        "pfpascal": "PF-PASCAL (img), measured on 65 of 299 pairs",
        "pfwillow": "PF-WILLOW (bbox-kp)",
    }
    assert "PF-PASCAL (img), measured on 65 of 299 pairs @0.05 |" in table.markdown()
    assert r"\shortstack{PF-PASCAL (img)\\{\scriptsize measured on 65 of 299" in table.latex()


def test_two_versions_of_a_dataset_are_refused(spec: TableSpec) -> None:
    mixed = [record("a"), record("b", fingerprint="f" * 64, n_pairs=65)]
    with pytest.raises(NemfError) as refused:
        build_table(spec, mixed, synthetic=False)
    text = str(refused.value)
    assert "'a' was predicted on 0123456789ab (900 pairs)" in text
    assert "'b' on ffffffffffff (65 pairs)" in text


def test_two_datasets_have_two_fingerprints(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, columns=["pfpascal", "pfwillow"])
    mixed = [record(), record(dataset="pfpascal", fingerprint="f" * 64, pck=(0.75, 0.9))]
    table = build_table(spec, mixed, synthetic=False)
    (row,) = table.rows
    assert row["values"]["pfwillow", 0.05]["pck"] == 0.25
    assert row["values"]["pfpascal", 0.05]["pck"] == 0.75


def test_extra_columns_appear_where_measured(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, extra_columns=["pfpascal", "spair"])
    table = build_table(spec, [record(), record(dataset="spair")], synthetic=False)
    assert table.datasets == ["pfwillow", "spair"]


# -- alphas and averaging -------------------------------------------------------------------------


def test_a_record_that_lacks_an_alpha_is_refused(spec: TableSpec) -> None:
    lacking = record("lacking", alphas=(0.05, 0.2))
    with pytest.raises(NemfError, match=r"'lacking' on PF-WILLOW is not scored at alpha 0\.1"):
        build_table(spec, [record(), lacking], synthetic=False)


def test_further_alphas_are_not_shown(spec: TableSpec) -> None:
    table = build_table(
        spec, [record(alphas=(0.01, 0.05, 0.1), pck=(0.0, 0.25, 0.5))], synthetic=False
    )
    assert set(table.rows[0]["values"]) == {("pfwillow", 0.05), ("pfwillow", 0.1)}
    assert table.cells["alpha"].tolist() == [0.05, 0.1]


def test_per_point_means_are_a_choice_that_every_note_names(tmp_path: Path) -> None:
    table = build_table(spec_of(tmp_path, averaging="point"), [record()], synthetic=False)
    assert table.rows[0]["values"]["pfwillow", 0.05]["pck"] == pytest.approx(0.24)
    assert set(table.cells["averaging"]) == {"point"}
    assert "per-image" not in table.markdown()
    assert "original pixels; per-point mean" in table.markdown()


def test_published_figures_of_another_averaging_are_refused(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, averaging="point", published="nemf_table1.yaml")
    with pytest.raises(NemfError, match=r"nemf_table1\.yaml: its figures are per-image means"):
        build_table(spec, [record()], synthetic=False)


# -- published rows -------------------------------------------------------------------------------

FIGURES: dict[str, Any] = {
    "source": "A Paper (Somewhere 2020), Table 3",
    "split": "test",
    "averaging": "image",
    "bases": {"spair": "bbox", "pfpascal": "image", "pfwillow": "kps_extent"},
    "methods": [
        {"method": "First", "venue": "ABC", "year": 2019, "eval_resolution": 240,
         "flow_resolution": None, "pck": {"pfwillow": {0.05: 12.3, 0.2: 99.9}}},
        {"method": "Second", "venue": "DEF", "year": 2020, "eval_resolution": None,
         "flow_resolution": 15, "note": "read by eye", "pck": {"spair": {0.1: 45.6}}},
    ],
}  # fmt: skip


@pytest.fixture
def figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "figures.yaml").write_text(yaml.safe_dump(FIGURES))
    monkeypatch.setattr(reports.published_figures, "PUBLISHED", tmp_path)
    return "figures.yaml"


def test_published_rows_come_first_as_printed_and_marked(figures: str, tmp_path: Path) -> None:
    spec = spec_of(tmp_path, columns=["spair", "pfwillow"], published=figures)
    table = build_table(spec, [record()], synthetic=False)
    assert methods(table) == [
        ("First (ABC 2019)", "published", "its paper's"),
        ("Second (DEF 2020)", "published", "its paper's"),
        ("mine", "measured", "canonical@1"),
    ]
    text = table.markdown()
    assert (
        "| *Published: as printed, not measured here* |  |  |  |  |  |  |  |  |\n"
        "| First (ABC 2019) | published | its paper's | 240 | – | – | – | 12.3 | – |\n"
        "| Second (DEF 2020) | published | its paper's | – | 15 | – | 45.6 | – | – |\n"
        "| *Measured here* |  |  |  |  |  |  |  |  |\n"
        "| mine | measured | canonical@1 |"
    ) in text
    assert "99.9" not in text  # an alpha that the table does not show
    assert (
        "- Published rows are figures as printed in A Paper (Somewhere 2020), Table 3; not "
        "measured here.\n"
    ) in text
    assert "- Second: read by eye.\n" in text
    latex = table.latex()
    assert latex.index("Second") < latex.index(r"\midrule", latex.index("Second"))
    assert latex.index(r"\midrule", latex.index("Second")) < latex.index("mine &")


def test_published_cells_have_their_source_and_no_interval(figures: str, tmp_path: Path) -> None:
    table = build_table(spec_of(tmp_path, published=figures), [record()], synthetic=False)
    cells = table.cells.set_index("method")
    assert cells.loc["First (ABC 2019)", "source"] == FIGURES["source"]
    assert cells.loc["First (ABC 2019)", "pck"] == pytest.approx(0.123)
    assert cells.loc[["First (ABC 2019)"], ["low", "high", "fingerprint"]].isna().all(axis=None)


def test_the_papers_table_is_what_its_file_says(tmp_path: Path) -> None:
    """Table 1 itself: every published row in the file's order, with the file's figures."""
    spec = TableSpec.load(TABLES / "table1.yaml")
    content = yaml.safe_load((reports.published_figures.PUBLISHED / spec.published).read_text())
    mine = record(alphas=spec.alphas, pck=(0.1, 0.2, 0.3, 0.4))
    table = build_table(spec, [mine], synthetic=False)
    shown = [row for row in table.rows if row["origin"] == "published"]
    assert len(shown) == len(content["methods"])
    assert [row["method"].split(" (")[0] for row in shown] == [
        method["method"] for method in content["methods"]
    ]
    for row, method in zip(shown, content["methods"], strict=True):
        expected = {
            (dataset, alpha): value / 100
            for dataset, values in method["pck"].items()
            for alpha, value in values.items()
        }
        assert {k: v["pck"] for k, v in row["values"].items()} == expected
    assert any(content["source"] in note for note in table.footnotes)


# -- ranks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], []),
        ([0.5], [None]),
        ([0.2, 0.9, 0.5], [None, "best", "second"]),
        ([0.9, 0.9, 0.5, 0.1], ["best", "best", "second", None]),
        ([0.9, 0.5, 0.5, 0.1], ["best", "second", "second", None]),
        ([0.5, 0.5], ["best", "best"]),
        ([0.3, 0.1 + 0.2], ["best", "best"]),  # 0.30000000000000004
        ([0.3, 0.3001], ["second", "best"]),
    ],
)
def test_places(values: list[float], expected: list[str | None]) -> None:
    assert places(values) == expected


def ranks(table: Table, dataset: str = "pfwillow", alpha: float = 0.1) -> dict[str, Any]:
    """rank and same by label (with the protocol of measured rows where it is not canonical)."""
    return {
        row["method"] + (f" {row['protocol']}" if "paper@" in row["protocol"] else ""): (
            row["values"][dataset, alpha]["rank"],
            row["values"][dataset, alpha].get("same"),
        )
        for row in table.rows
        if (dataset, alpha) in row["values"]
    }


def test_overlapping_intervals_are_not_told_apart(spec: TableSpec) -> None:
    cells = {
        "a": (0.9, 0.75, 0.95), "b": (0.8, 0.7, 0.75), "c": (0.7, 0.6, 0.74), "d": (0.7, None, None)
    }  # fmt: skip
    made = []
    for label, (pck, low, high) in cells.items():
        made.append(record(label, pck=(0.0, pck)))
        made[-1]["metrics"][1] |= {"low": low, "high": high}
    table = build_table(spec, made, synthetic=False)
    assert ranks(table) == {
        "a": ("best", False),
        "b": ("second", True),  # 0.75 is in both
        "c": (None, False),
        "d": (None, True),  # nothing is known of it
    }
    text = table.markdown()
    assert "| **90.0** [75.0, 95.0] |" in text
    assert "| <ins>80.0</ins> ≈ [70.0, 75.0] |" in text
    assert "| 70.0 [60.0, 74.0] |" in text
    assert "| 70.0 ≈ [no interval] |" in text
    assert "the 95% intervals overlap" in text
    assert "Holm" not in text
    cells = table.cells[table.cells["alpha"] == 0.1].set_index("method")
    assert cells["rank"].fillna("").tolist() == ["best", "second", "", ""]
    assert cells["same_as_best"].tolist() == [False, True, False, True]
    assert cells["p_best"].isna().all()


def test_only_cells_of_one_protocol_are_compared(spec: TableSpec) -> None:
    made = [
        record("a", pck=(0.0, 0.5), low=0.45),
        record("b", pck=(0.0, 0.4), low=0.35),
        record("b", "hpf-paper@1", official="hpf-paper@1", pck=(0.0, 0.9)),
        external("theirs", pck=(0.0, 0.6)),
        external("theirs", protocol="nemf-paper@1", pck=(0.0, 0.1)),
        external("others", protocol="nemf-paper@1", pck=(0.0, 0.05)),
    ]
    table = build_table(spec, made, synthetic=False)
    assert {label: rank for label, (rank, _) in ranks(table).items()} == {
        "a": "second",
        "b hpf-paper@1": None,
        "b": None,
        "theirs": "best",
        "theirs nemf-paper@1": "best",
        "others nemf-paper@1": "second",
    }
    assert "Not ranked: rows that are alone under their protocol in a column." in table.footnotes


def test_floors_ceilings_and_unequal_rows_are_no_contenders(spec: TableSpec) -> None:
    oracle = {"official_protocol": "canonical@1", "oracle_class": True}
    made = [
        record("floor", pck=(0.99, 0.99), name="copy"),
        record("a", pck=(0.3, 0.3)),
        record("b", pck=(0.2, 0.2)),
        record("drawn", pck=(0.9, 0.9), random_weights=True),
        record("knows", pck=(0.9, 0.9), card=oracle),
        record("ceiling", pck=(1.0, 1.0), name="oracle-grid", card={}),
    ]
    table = build_table(spec, made, synthetic=False)
    assert {label: rank for label, (rank, _) in ranks(table).items()} == {
        "floor": None,
        "a": "best",
        "b": "second",
        "drawn [random weights]": None,
        "knows [oracle class]": None,
        "ceiling": None,
    }
    (note,) = [note for note in table.footnotes if note.startswith("Not ranked")]
    assert note == (
        "Not ranked: floor, drawn [random weights], knows [oracle class], ceiling (no contenders: "
        "floors, ceilings, random weights, rows that know the true class)."
    )


def test_a_part_is_not_ranked(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, columns=["pfpascal", "pfwillow"])
    made = [record(label, pck=(0.1, pck)) for label, pck in (("a", 0.9), ("b", 0.2))]
    made += [record(label, dataset="pfpascal", n_pairs=65) for label in "ab"]
    table = build_table(spec, made, synthetic=False)
    assert {rank for rank, _ in ranks(table, "pfpascal").values()} == {None}
    assert [rank for rank, _ in ranks(table).values()] == ["best", "second"]
    assert "Not ranked: PF-PASCAL (65 of 299 pairs), a part of the dataset." in table.footnotes


def test_a_synthetic_table_is_ranked_too(spec: TableSpec) -> None:
    made = [record(label, pck=(0.1, pck), synthetic=True) for label, pck in (("a", 0.9), ("b", 0))]
    assert [r for r, _ in ranks(build_table(spec, made, synthetic=True)).values()] == [
        "best",
        "second",
    ]


def test_alone_nothing_is_best(spec: TableSpec) -> None:
    table = build_table(spec, [record("only")], synthetic=False)
    assert ranks(table) == {"only": (None, None)}
    assert "**" not in table.markdown()
    assert not any("ranked within" in note for note in table.footnotes)


def test_measured_and_published_are_ranked_apart(figures: str, tmp_path: Path) -> None:
    content = yaml.safe_load((tmp_path / figures).read_text())
    content["methods"][1]["pck"] = {"pfwillow": {0.05: 12.3}}
    content["methods"].append(content["methods"][0] | {"method": "Third"})
    content["methods"][2]["pck"] = {"pfwillow": {0.05: 1.0}}
    (tmp_path / figures).write_text(yaml.safe_dump(content))
    spec = spec_of(tmp_path, published=figures)
    made = [record("a", pck=(0.9, 0.9)), record("b", pck=(0.01, 0.9))]
    table = build_table(spec, made, synthetic=False)
    assert {k: rank for k, (rank, _) in ranks(table, alpha=0.05).items()} == {
        "First (ABC 2019)": "best",
        "Second (DEF 2020)": "best",  # a tie
        "Third (ABC 2019)": "second",
        "a": "best",
        "b": "second",
    }
    assert any(note.startswith("Published figures are ranked among") for note in table.footnotes)


PAIRS = {  # fraction correct of ten pairs that share no image
    "good": [0.9, 0.8, 0.9, 1.0, 0.7, 0.9, 0.8, 1.0, 0.9, 0.8],
    "close": [0.9, 0.7, 0.9, 1.0, 0.8, 0.8, 0.8, 1.0, 0.9, 0.8],
    "far": [0.4, 0.3, 0.5, 0.6, 0.2, 0.5, 0.1, 0.6, 0.4, 0.5],
}


def test_the_paired_test_decides_where_each_pairs_scores_are_at_hand(tmp_path: Path) -> None:
    """Pairs without a common image: the test is the paired t-test. All intervals overlap here."""
    spec = spec_of(tmp_path, columns=["spair"], alphas=[0.1])
    made = [by_class(label, {"cat": of}) for label, of in PAIRS.items()]
    labels = [one["predictions"]["matcher"]["label"] for one in made]
    asked: list[str] = []

    def scores_of(one: dict[str, Any]) -> PairScores:
        asked.append(one["predictions"]["matcher"]["label"])
        return pair_scores({"cat": PAIRS[asked[-1]]})

    table = build_table(spec, made, synthetic=False, scores_of=scores_of)
    assert ranks(table, "spair") == {
        "good": ("best", False),
        "close": ("second", True),
        "far": (None, False),
    }
    raw = [scipy.stats.ttest_rel(PAIRS["good"], PAIRS[k]).pvalue for k in ("close", "far")]
    assert raw[0] > 0.05 > raw[1]
    cells = table.cells.set_index("method")["p_best"]
    assert cells["far"] == pytest.approx(2 * raw[1])  # Holm: the smallest of two times two
    assert cells["close"] == pytest.approx(raw[0])
    assert np.isnan(cells["good"])
    assert sorted(asked) == sorted(labels)  # each is scored once
    (note,) = [note for note in table.footnotes if note.startswith("≈")]
    assert "Holm-adjusted over the table's 2 comparisons" in note
    assert "p ≥ 0.05" in note


def test_holm_counts_the_whole_table() -> None:
    contenders = []
    for column in range(2):
        contenders.append(
            [
                Contender(
                    {"pck": float(np.mean(PAIRS[k]))}, {"label": k, "column": column}, "all", 0.1
                )
                for k in ("far", "good")
            ]
        )
    n = rank_columns(
        contenders,
        averaging="image",
        level=0.95,
        scores_of=lambda one: pair_scores({"cat": PAIRS[one["label"]]}),
    )
    assert n == 2
    raw = scipy.stats.ttest_rel(PAIRS["far"], PAIRS["good"]).pvalue
    for far, good in contenders:
        assert far.entry["p_best"] == pytest.approx(2 * raw)
        assert good.entry == {
            "pck": good.entry["pck"],
            "rank": "best",
            "same": False,
            "p_best": None,
        }


def test_equal_predictions_are_equally_best_and_no_test_shows_no_difference() -> None:
    one, same, lower = ({"pck": v} for v in (0.9, 0.9, 0.8))
    column = [Contender(e, {"of": k}, "all", 0.1) for k, e in enumerate((one, same, lower))]
    values = [[0.9, 0.9], [0.9, 0.9], [0.8, 0.8]]  # one difference: no variance to test with

    def scores_of(asked: dict[str, Any]) -> PairScores:
        return pair_scores({"cat": values[asked["of"]]})

    rank_columns([column], averaging="image", level=0.95, scores_of=scores_of)
    assert (one["rank"], same["rank"], lower["rank"]) == ("best", "best", "second")
    assert lower["same"] is True
    assert lower["p_best"] is None


def test_other_pairs_are_not_compared() -> None:
    column = [Contender({"pck": v}, record(f"m{v}") | {"of": v}, "all", 0.1) for v in (0.5, 0.9)]

    def scores_of(asked: dict[str, Any]) -> PairScores:
        made = pair_scores({"cat": [0.5, 0.9]})
        if asked["of"] == 0.5:
            made.frame["pair"] = made.frame["pair"].cat.rename_categories(["x", "y"])
        return made

    with pytest.raises(NemfError, match=r"'m0\.9' and 'm0\.5' were not predicted on the same"):
        rank_columns([column], averaging="image", level=0.95, scores_of=scores_of)


# -- differences from published figures -----------------------------------------------------------

MEASURED_AS = {
    "protocol": "hpf-paper@1",
    "backbone": "resnet101",
    "layers": {"pfwillow": [1, 2]},
    "weights_sha256": {"pfwillow": ["a" * 64]},
}


@pytest.fixture
def comparable(figures: str, tmp_path: Path) -> str:
    """Published figures whose first method says what it was measured with."""
    content = yaml.safe_load((tmp_path / figures).read_text())
    content["methods"][0] |= {"measured_as": MEASURED_AS}
    content["methods"][0]["pck"] = {"pfwillow": {0.05: 26.1, 0.1: 50.0}}
    (tmp_path / figures).write_text(yaml.safe_dump(content))
    return figures


def published_again(
    label: str = "again",
    protocol: str = "hpf-paper@1",
    backbone: str = "resnet101",
    layers: tuple[int, ...] = (1, 2),
    weights: str = "a",
    published_as: str | None = "First",
    **changes: Any,
) -> dict[str, Any]:
    """A record of what "First" was measured with, less what is changed."""
    made = record(label, protocol, official="hpf-paper@1", **changes)
    matcher = made["predictions"]["matcher"]
    matcher["card"] |= {"published_as": published_as}
    matcher |= {"config": {"backbone": backbone, "layers": list(layers)}}
    matcher |= {"weights_sha256": weights * 64}
    return made


def test_what_was_measured_as_published_shows_the_difference(
    comparable: str, tmp_path: Path
) -> None:
    spec = spec_of(tmp_path, columns=["spair", "pfwillow"], published=comparable)
    made = [published_again("again"), published_again("again", "canonical@1"), record("other")]
    table = build_table(spec, made, synthetic=False)
    text = table.markdown()
    head = "| PF-WILLOW (bbox-kp) @0.05 | Δ published | @0.1 | Δ published |"
    assert head in text  # and none for SPair-71k
    assert text.count("Δ published |") == 2
    assert "| 25.0 [12.5, 75.0] | −1.1 | 50.0 [12.5, 75.0] | 0.0 |" in text
    rows = [line for line in text.splitlines() if line.startswith(("| again", "| other"))]
    assert [line.count("−1.1") for line in rows] == [1, 0, 0]
    cells = table.cells.set_index(["method", "protocol", "alpha"])
    assert cells.loc[("again", "hpf-paper@1", 0.05), "published"] == pytest.approx(0.261)
    assert cells.loc[("again", "hpf-paper@1", 0.05), "delta_published"] == pytest.approx(-0.011)
    assert cells.loc[("again", "hpf-paper@1", 0.1), "delta_published"] == 0
    assert cells.loc[("again", "canonical@1", 0.05), "delta_published"] != 0  # NaN
    assert any(note.startswith("Δ published: measured minus") for note in table.footnotes)
    latex = table.latex()
    assert r"& {\scriptsize $\Delta$ published} &" in latex
    assert r"25.0 & $-$1.1 & 50.0 & 0.0 \\" in latex
    assert r"\multicolumn{4}{c}{PF-WILLOW (bbox-kp)}" in latex


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"backbone": "resnet18"}, "backbone resnet18 instead of resnet101"),
        ({"layers": (1, 3)}, "layers 1,3 instead of 1,2"),
        ({"weights": "b"}, "weights not known to be the authors'"),
        ({"random_weights": True}, "random weights"),
        ({"n_pairs": 65}, "65 of 900 pairs"),
        ({"protocol": "canonical@1"}, None),
        ({"published_as": "Second"}, None),
        ({"published_as": "Nobody"}, None),
        ({"published_as": None}, None),
    ],
)
def test_what_was_not_measured_as_published_shows_none_and_why(
    change: dict[str, Any], reason: str | None, comparable: str, tmp_path: Path
) -> None:
    spec = spec_of(tmp_path, published=comparable)
    table = build_table(spec, [published_again(**change)], synthetic=False)
    assert "Δ" not in table.markdown()
    assert table.cells["delta_published"].isna().all()
    said = [note for note in table.footnotes if "not compared with its published" in note]
    expected = f"again is not compared with its published figures on PF-WILLOW: {reason}."
    assert said == ([expected] if reason else [])


def test_another_threshold_is_not_compared(comparable: str, tmp_path: Path) -> None:
    content = yaml.safe_load((tmp_path / comparable).read_text())
    content["bases"]["pfwillow"] = "kps_extent_padded"
    (tmp_path / comparable).write_text(yaml.safe_dump(content))
    spec = spec_of(tmp_path, published=comparable)
    notes = build_table(spec, [published_again()], synthetic=False).footnotes
    assert any(n.endswith("threshold over kps extent instead of kps extent padded.") for n in notes)


def test_training_free_weights_are_taken_for_the_published_ones(
    comparable: str, tmp_path: Path
) -> None:
    content = yaml.safe_load((tmp_path / comparable).read_text())
    content["methods"][0]["measured_as"]["weights_sha256"] = None
    (tmp_path / comparable).write_text(yaml.safe_dump(content))
    spec = spec_of(tmp_path, published=comparable)
    table = build_table(spec, [published_again(weights="z")], synthetic=False)
    assert table.cells["delta_published"].notna().sum() == 2
    assert "again: the trunk's weights are taken for the published ones." in table.footnotes


def test_figures_of_another_split_are_refused(figures: str, tmp_path: Path) -> None:
    spec = spec_of(tmp_path, published=figures, split="val")
    with pytest.raises(NemfError, match=r"figures\.yaml: its figures are of the test split"):
        build_table(spec, [record(split="val")], synthetic=False)


# -- classes --------------------------------------------------------------------------------------

CLASSES = {"kind": "classes", "columns": ["spair"], "alphas": [0.1]}
THREE_AND_ONE = {"tvmonitor": [0.25, 0.5, 0.75], "cat": [0.9]}


def test_classes_are_columns_and_the_two_means_stand_side_by_side(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, **CLASSES)
    table = build_table(spec, [by_class("mine", THREE_AND_ONE)], synthetic=False)
    assert table.title == "Table 9: PCK (%), alpha 0.1"
    assert (
        "| Method | Origin | Protocol | cat | tv | all | class mean |\n"
        "| --- | --- | --- | ---: | ---: | ---: | ---: |\n"
        "| mine | measured | canonical@1 | 90.0 | 50.0 | 60.0 [0.0, 100.0] | 70.0 |\n"
    ) in table.markdown()
    cells = table.cells.set_index("group")
    assert cells["pck"].to_dict() == pytest.approx(
        {"cat": 0.9, "tvmonitor": 0.5, "all": 0.6, "class mean": 0.7}
    )
    assert cells["n_pairs"].to_dict() == {"cat": 1, "tvmonitor": 3, "all": 4, "class mean": 4}
    assert cells["low"].isna().to_dict()["class mean"]  # records alone give it no interval
    assert cells.loc["cat", "high"] == 1
    assert "cmidrule" not in table.latex()
    assert r"mine & measured & canonical@1 & 90.0 & 50.0 & 60.0 & 70.0 \\" in table.latex()


@pytest.mark.parametrize(
    ("averaging", "expected"),
    # per point, tv is (0.25 x 40 + 0.5 x 40 + 0.75 x 80) / 160 = 0.5625
    [("image", (0.9 + 0.5) / 2), ("point", (0.9 + 0.5625) / 2)],
)
def test_the_class_mean_weighs_classes_alike(averaging: str, expected: float) -> None:
    scores = pair_scores(THREE_AND_ONE, n=[40, 40, 80, 100])
    estimate = class_mean(scores, 0.1, averaging=averaging, level=0.95)
    assert estimate.mean == pytest.approx(expected)
    assert estimate.low < expected < estimate.high


def test_the_class_mean_has_its_interval_where_pairs_are_at_hand(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, **CLASSES)
    table = build_table(
        spec,
        [by_class("mine", THREE_AND_ONE)],
        synthetic=False,
        scores_of=lambda _: pair_scores(THREE_AND_ONE, n=20),
    )
    cell = table.cells.set_index("group").loc["class mean"]
    assert 0 <= cell["low"] < cell["pck"] < cell["high"] <= 1
    assert cell["pck"] == pytest.approx(0.7)


def test_each_class_is_compared_on_its_own_pairs(tmp_path: Path) -> None:
    mine = {"cat": PAIRS["good"], "dog": PAIRS["far"]}
    theirs = {"cat": PAIRS["far"], "dog": PAIRS["good"][::-1]}
    table = build_table(
        spec_of(tmp_path, **CLASSES),
        [by_class("mine", mine), by_class("theirs", theirs)],
        synthetic=False,
        scores_of=lambda one: pair_scores(
            mine if one["predictions"]["matcher"]["label"] == "mine" else theirs
        ),
    )
    cells = table.cells.set_index(["method", "group"])
    assert cells.loc[("mine", "cat"), "rank"] == "best"
    assert cells.loc[("theirs", "dog"), "rank"] == "best"
    assert {cells.loc[(m, g), "rank"] for m in ("mine", "theirs") for g in ("all", CLASS_MEAN)} == {
        "best"  # both reach (0.87 + 0.41) / 2
    }
    raw = [
        scipy.stats.ttest_rel(PAIRS["good"], PAIRS["far"]).pvalue,
        scipy.stats.ttest_rel(PAIRS["good"][::-1], PAIRS["far"]).pvalue,
    ]
    assert cells.loc[("theirs", "cat"), "p_best"] == pytest.approx(2 * min(raw))
    assert cells.loc[("mine", "dog"), "p_best"] == pytest.approx(max(2 * min(raw), max(raw)))


def test_the_classes_of_a_part_and_of_stand_ins_are_labelled(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, **CLASSES)
    made = [by_class(label, THREE_AND_ONE, n_pairs=4) for label in "ab"]
    table = build_table(spec, made, synthetic=False)
    assert table.title.endswith(", alpha 0.1, measured on 4 of 12234 pairs")
    assert table.cells["rank"].isna().all()
    made = [by_class(label, {"own class": [0.5]}, synthetic=True) for label in "ab"]
    table = build_table(spec, made, synthetic=True)
    assert "SYNTHETIC" in table.title
    assert "| own class | all | class mean |" in table.markdown()
    assert (table.cells["rank"] == "best").all()


def test_table_2_is_what_its_file_says(tmp_path: Path) -> None:
    spec = TableSpec.load(TABLES / "table2.yaml")
    content = yaml.safe_load(
        (reports.published_figures.PUBLISHED / spec.published).read_text(encoding="utf-8")
    )
    mine = by_class("mine", {"cat": [0.5], "dog": [0.7, 0.6]}, n_pairs=12234)
    table = build_table(spec, [mine], synthetic=False)
    rows = {row["method"].split(" (")[0]: row["values"] for row in table.rows}
    assert list(rows) == [method["method"] for method in content["methods"]] + ["mine"]
    assert len(table.columns) == 20
    for method in content["methods"]:
        (classes,) = method["classes"]["spair"].values()
        values = rows[method["method"]]
        for name, value in classes.items():
            assert values["spair", 0.1, name]["pck"] * 100 == pytest.approx(value)
        assert values["spair", 0.1]["pck"] * 100 == pytest.approx(method["pck"]["spair"][0.1])
        mean = sum(classes.values()) / 18
        assert values["spair", 0.1, CLASS_MEAN]["pck"] * 100 == pytest.approx(mean)
    assert "| 20.6 | 23.8 |" in table.markdown()  # CNNGeo: the two means are often confused
    line = next(line for line in table.markdown().splitlines() if line.startswith("| mine |"))
    assert line == (
        "| mine | measured | canonical@1 | – | – | – | – | – | – | – | 50.0 | – | – | 65.0 | – "
        "| – | – | – | – | – | – | 60.0 [0.0, 100.0] | 57.5 |"
    )
    computed = table.cells[table.cells["group"] == CLASS_MEAN]
    assert computed["source"].str.endswith("mean of its printed classes").sum() == 11


@pytest.mark.parametrize(
    ("name", "file"), [("nemf_table1", "published"), ("nemf_table2", "spair_per_class")]
)
def test_published_figures_are_those_that_were_read(name: str, file: str, shared: Path) -> None:
    """Both ways against the list that says where each figure was read."""
    short = {"aero": "aeroplane", "bike": "bicycle", "mbike": "motorbike", "plant": "pottedplant",
             "tv": "tvmonitor"}  # fmt: skip
    titles = {title: dataset for dataset, title in TITLES.items()}
    source = f"NeMF arXiv 2210.02689 Table {name[-1]}"
    read = {}
    for row in yaml.safe_load((shared / "published" / f"{file}.yaml").read_text()):
        if row["source"] == source:
            group = short.get(row.get("class", "all"), row.get("class", "all"))
            read[row["method"], titles[row["dataset"]], group, row["alpha"]] = row["value"]
    published = PublishedTable.load(f"{name}.yaml")
    assert len(read) > 50
    assert {(m.name, *key): v for m in published.methods for key, v in m.figures.items()} == read


def test_table_2_from_images_to_the_files(tiny_spair: Any, tmp_path: Path) -> None:
    """What the commands do; the per-pair scores agree with the records."""
    spec = TableSpec.load(TABLES / "table2.yaml")
    data, out = tiny_spair(splits=("test",)), tmp_path / "out"
    assert find_datasets(spec, data).datasets == ("spair",)
    predict_table(spec, data, out, ("copy",), {})
    assert score_table(spec, out) == 1 + len(spec.oracle_grids)
    found = current_records(out)
    records = [one for _, one in found]
    scores_of = rescorer(found, spec.alphas)
    for one in records:
        frame = scores_of(one).frame
        (entry,) = [
            e for e in one["metrics"]
            if (e["group"], e["averaging"], e["alpha"]) == ("all", "image", 0.1)
        ]  # fmt: skip
        assert (frame[alpha_name(0.1)] / frame["n"]).mean() == pytest.approx(entry["pck"])
    tables = [
        build_table(spec, records, synthetic=False, scores_of=rescorer(found, spec.alphas))
        for _ in range(2)
    ]
    texts = [(t.markdown(), t.latex(), t.cells.to_csv()) for t in tables]
    assert texts[0] == texts[1]
    assert "measured on 2 of 12234 pairs" in texts[0][0]
    measured = tables[0].cells[tables[0].cells["origin"] == "measured"]
    assert set(measured["group"]) == {"cat", "dog", "all", "class mean"}
    assert measured["key"].notna().all()
    assert (measured["seed"] == 2022).all()
    # another table leaves these predictions alone
    with pytest.raises(NemfError, match="no predictions to score"):
        score_table(TableSpec.load(TABLES / "table2-animalpose.yaml"), out)


# -- rows: order and marks ------------------------------------------------------------------------


def test_the_papers_own_protocol_comes_before_the_canonical(spec: TableSpec) -> None:
    made = [
        record("second", "canonical@1", official="hpf-paper@1"),
        record("second", "hpf-paper@1", official="hpf-paper@1"),
        record("first", "canonical@1", official="cats-paper@1"),
        record("first", "cats-paper@1", official="cats-paper@1"),
    ]
    assert [(m, p) for m, _, p in methods(build_table(spec, made, synthetic=False))] == [
        ("second", "hpf-paper@1"),
        ("second", "canonical@1"),
        ("first", "cats-paper@1"),
        ("first", "canonical@1"),
    ]


def test_ceilings_come_last(spec: TableSpec) -> None:
    ceiling = record("oracle-grid 4x4 (ceiling)", name="oracle-grid", card={})
    table = build_table(spec, [ceiling, record("mine")], synthetic=False)
    assert [m for m, _, _ in methods(table)] == ["mine", "oracle-grid 4x4 (ceiling)"]
    assert any("oracle-grid GxG is no method" in note for note in table.footnotes)


def test_protocols_that_the_table_does_not_ask_for_are_left_out(spec: TableSpec) -> None:
    made = [record("mine"), record("mine", "hpf-paper@1"), external("theirs")]
    made.append(external("theirs", protocol="nemf-paper@1"))
    assert methods(build_table(spec, made, synthetic=False)) == [
        ("mine", "measured", "canonical@1"),
        ("theirs", "external", "canonical@1"),
        ("theirs", "external", "nemf-paper@1"),
    ]
    with pytest.raises(NemfError, match="no real score record"):
        build_table(spec, made[1:2], synthetic=False)


def test_predictions_made_elsewhere_are_marked(spec: TableSpec) -> None:
    table = build_table(spec, [external("theirs")], synthetic=False)
    assert "| theirs | external | canonical@1 |" in table.markdown()
    assert "theirs: predictions made elsewhere, file SHA-256 aaaaaaaaaaaa." in table.footnotes
    assert f"Code: scores by commit {'e' * 12}." in table.footnotes


def test_random_weights_and_known_classes_are_marked(tmp_path: Path) -> None:
    oracle = {"official_protocol": "canonical@1", "oracle_class": True}
    spec = spec_of(tmp_path, columns=["pfwillow", "pfpascal"])
    table = build_table(
        spec,
        [
            record("a", random_weights=True),
            record("b", card=oracle),
            record("c", card=oracle, random_weights=True),
            record("d", random_weights=False),
            record("d", dataset="pfpascal", random_weights=True),
            record("e"),
        ],
        synthetic=False,
    )
    assert [m for m, _, _ in methods(table)] == [
        "a [random weights]",
        "b [oracle class]",
        "c [random weights, oracle class]",
        "d [random weights]",
        "e",
    ]


def test_resolutions_are_printed(spec: TableSpec) -> None:
    made = [
        record("a", "cats-paper@1", official="cats-paper@1", flow_resolution="16"),
        record("b", "hpf-paper@1", official="hpf-paper@1"),
        record("c", "scot-paper@1", official="scot-paper@1"),
        record("d", "mmnet-paper@1", official="mmnet-paper@1"),
    ]
    made[1]["predictions"]["matcher"]["card"]["flow_resolution"] = "20"
    text = build_table(spec, made, synthetic=False).markdown()
    assert "| a | measured | cats-paper@1 | 256 | 16 |" in text
    assert "| b | measured | hpf-paper@1 | max 300 | 20 |" in text
    assert "| c | measured | scot-paper@1 | long 300 |" in text
    assert "| d | measured | mmnet-paper@1 | 224x320 |" in text


def test_footnotes_name_weights_unanswered_code_and_what_is_missing(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, columns=["pfwillow", "pfpascal"])
    config = {"backbone": "resnet18"}
    made = [
        record("net", config=config, weights_sha256="1" * 64, unanswered=7),
        record("net", dataset="pfpascal", config=config, weights_sha256="2" * 64),
        record("dirty", commit="b" * 40),
        record("loose", commit=None),
    ]
    made[2]["predictions"]["code"]["dirty"] = True
    made[3]["scored_by"] = {"commit": "f" * 40, "dirty": True}
    table = build_table(spec, made, synthetic=False, missing=["SPair-71k: no folder."])
    notes = table.footnotes
    assert f"net: weights {'1' * 12}, {'2' * 12}." in notes
    assert "net on PF-WILLOW: 7 of 9000 unanswered (wrong)." in notes
    assert (
        f"Code: predictions by code outside a git checkout, commit {'b' * 12} with uncommitted "
        f"changes, commit {'c' * 12}; scores by commit {'e' * 12}, commit {'f' * 12} with "
        "uncommitted changes."
    ) in notes
    assert notes[-1] == "Not measured: SPair-71k: no folder."


# -- specifications -------------------------------------------------------------------------------


def test_the_tables_that_ship_are_valid() -> None:
    files = sorted(TABLES.glob("*.yaml"))
    assert files
    for file in files:
        spec = TableSpec.load(file)
        assert f"table{spec.name.removeprefix('table')}" == file.stem


def test_a_specification_is_read_in_its_types(spec: TableSpec) -> None:
    assert spec.alphas == (0.05, 0.1)
    assert spec.columns == ("pfwillow",)
    assert spec.matchers == {"real": ("copy",), "synthetic": ("copy",)}
    assert spec.oracle_grids == ()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"name": None}, "name must be a text"),
        ({"title": 3}, "title must be a text, not 3"),
        ({"split": ["test"]}, "split must be a text"),
        ({"kind": "flags"}, "kind must be datasets or classes, not 'flags'"),
        ({"kind": "classes"}, "a table of classes has one dataset in columns"),
        ({"kind": "classes", "alphas": [0.1], "columns": []}, "a table of classes has one"),
        (
            {"kind": "classes", "alphas": [0.1], "extra_columns": ["spair"]},
            "a table of classes has one",
        ),
        ({"averaging": "pair"}, "averaging must be image or point, not 'pair'"),
        ({"alphas": 0.1}, "alphas must be a list of numbers, not 0.1"),
        ({"alphas": []}, "give at least one alpha"),
        ({"alphas": ["wide"]}, "alphas must be numbers"),
        ({"alphas": [0.1, -0.1]}, "alpha must be a positive number, not -0.1"),
        ({"alphas": [float("nan")]}, "alpha must be a positive number, not nan"),
        ({"columns": "pfwillow"}, "columns must be a list of names, not 'pfwillow'"),
        ({"columns": ["imagenet"]}, "unknown dataset 'imagenet'"),
        ({"extra_columns": None}, "extra_columns must be a list of names, not None"),
        ({"extra_columns": ["x"]}, "unknown dataset 'x'"),
        ({"protocols": ["papers"]}, "unknown protocol 'papers'"),
        ({"matchers": ["copy"]}, "matchers must list those for real and for synthetic"),
        ({"matchers": {"real": ["copy"]}}, "matchers must list those for real and for synthetic"),
        ({"matchers": {"real": "copy", "synthetic": []}}, "matchers must be a list of names"),
        ({"oracle_grids": [16, 0]}, "oracle_grids must be a list of positive integers"),
        ({"oracle_grids": ["16"]}, "oracle_grids must be a list of positive integers"),
        ({"published": "gone.yaml"}, "published must be null or one of nemf_table1.yaml, nemf_t"),
        ({"colums": []}, "unknown colums"),
    ],
)
def test_a_broken_specification_names_its_file(
    change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(NemfError) as refused:
        spec_of(tmp_path, **change)
    assert str(refused.value).startswith(f"{tmp_path / 'spec.yaml'}: {reason}")


@pytest.mark.parametrize("key", SPEC)
def test_a_missing_entry_is_named(key: str, tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in SPEC.items() if k != key}))
    with pytest.raises(NemfError, match=rf"spec\.yaml: lacks {key}$"):
        TableSpec.load(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read as a table specification"),
        (b"\xff\xfe\x00", "cannot be read as a table specification"),
        (b"a: [1\nb: 2", "cannot be read as a table specification"),
        (b"- a\n- b\n", "must be a mapping"),
        (b"", "must be a mapping"),
    ],
)
def test_what_is_no_specification_is_refused(
    content: bytes | None, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "spec.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(NemfError) as refused:
        TableSpec.load(path)
    assert str(refused.value).startswith(f"{path}: {reason}")


@pytest.mark.parametrize(
    "change", [{"external": True}, {"config": {"layers": [4]}}, {"name": "another"}]
)
def test_one_label_for_two_methods_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    other = record(dataset="pfpascal", fingerprint="f" * 64)
    other["predictions"]["matcher"] = other["predictions"]["matcher"] | change
    spec = spec_of(tmp_path, columns=["pfpascal", "pfwillow"])
    with pytest.raises(NemfError, match="stands for two methods"):
        build_table(spec, [record(), other], synthetic=False)
