"""Tables: golden renderings, what is marked, what is never mixed, and broken specifications."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import reports.tables
from experiments.jobs import TABLES
from nemf.errors import NemfError
from nemf.scoring import get_protocol
from reports.tables import Table, TableSpec, build_table

TITLES = {"spair": "SPair-71k", "pfpascal": "PF-PASCAL", "pfwillow": "PF-WILLOW"}
OFFICIAL = {"spair": 12234, "pfpascal": 299, "pfwillow": 900}
SPEC: dict[str, Any] = {
    "name": "small",
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
        },
        "predictions_sha256": "d" * 64,
        "protocol": {
            "id": protocol, "averaging": rule.averaging, "bases": rule.bases,
            "frame": {"kind": rule.frame.kind, "side": rule.frame.side},
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
| a\|b_c | measured | canonical@1 | ori | – | 25.0 [12.5, 75.0] | 50.0 [12.5, 75.0] |
| lone | measured | canonical@1 | ori | – | 0.0 [12.5, 75.0] | 100.0 [no interval] |

- PCK in percent, per-image mean, at the given alphas.
- Measured cells: mean [95% interval]; the interval counts images, not pairs, as independent (docs/statistics.md) and is a claim about these weights.
- canonical@1: src→trg; error ≤ alpha x trg kps extent; original pixels; per-image mean (PF-WILLOW).
- PF-WILLOW test: 900 pairs of 70 distinct images, 9000 keypoints, fingerprint 0123456789ab.
- Code: commit cccccccccccc.
"""  # noqa: E501

LATEX = r"""% Needs \usepackage{booktabs}, \usepackage{graphicx} and \usepackage[T1]{fontenc}.
\begin{table*}
\caption{PCK (\%)}
\setlength{\tabcolsep}{4pt}
\resizebox{\textwidth}{!}{%
\begin{tabular}{lllllrr}
\toprule
 &  &  &  &  & \multicolumn{2}{c}{PF-WILLOW (bbox-kp)} \\
\cmidrule(lr){6-7}
Method & Origin & Protocol & Eval. reso. & Flow reso. & 0.05 & 0.1 \\
\midrule
a|b\_c & measured & canonical@1 & ori & -- & 25.0 & 50.0 \\
 &  &  &  &  & {\tiny [12.5, 75.0]} & {\tiny [12.5, 75.0]} \\
lone & measured & canonical@1 & ori & -- & 0.0 & 100.0 \\
 &  &  &  &  & {\tiny [12.5, 75.0]} & {\tiny [no interval]} \\
\bottomrule
\end{tabular}}
\par\smallskip\footnotesize\raggedright
PCK in percent, per-image mean, at the given alphas.\par
Measured cells: mean {[}95\% interval]; the interval counts images, not pairs, as independent (docs/statistics.md) and is a claim about these weights.\par
canonical@1: src$\rightarrow$trg; error $\leq$ alpha x trg kps extent; original pixels; per-image mean (PF-WILLOW).\par
PF-WILLOW test: 900 pairs of 70 distinct images, 9000 keypoints, fingerprint 0123456789ab.\par
Code: commit cccccccccccc.\par
\end{table*}
"""  # noqa: E501

CSV_HEADER = (
    "method,origin,protocol,eval_resolution,flow_resolution,dataset,split,synthetic,alpha,"
    "averaging,pck,low,high,level,n_pairs,n_keypoints,n_images,official_pairs,fingerprint,"
    "weights_sha256,commit,dirty,scored_by,predictions_sha256,source"
)
CSV_ROW = (
    "a|b_c,measured,canonical@1,ori,,pfwillow,test,False,0.05,image,0.25,0.125,0.75,0.95,900,9000,"
    f"70,900,0123456789abcdef,,{'c' * 40},False,{'e' * 40},{'d' * 64},this run"
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


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_the_latex_compiles(tmp_path: Path) -> None:
    spec = spec_of(
        tmp_path, columns=["spair", "pfpascal", "pfwillow"], published="nemf_table1.yaml"
    )
    records = [
        record(r"50% & $x_1^2$ #{a} ~\b <c> [d] * ≤ → – — ×", unanswered=3),
        record("*starred", dataset="pfpascal", n_pairs=65),
        external("[bracketed]"),
    ]
    build_table(spec, records, synthetic=False, missing=["SPair-71k: no folder."]).write(tmp_path)
    (tmp_path / "page.tex").write_text(
        r"\documentclass[twocolumn]{article}\usepackage{booktabs}\usepackage{graphicx}"
        r"\usepackage[T1]{fontenc}\begin{document}\input{small.tex}\end{document}"
    )
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"],
        cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=120,
    )  # fmt: skip
    complaints = [line for line in done.stdout.splitlines() if line.startswith(("!", "Overfull"))]
    assert done.returncode == 0, complaints
    assert not complaints
    assert (tmp_path / "page.pdf").stat().st_size > 1000


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

FIGURES = {
    "source": "A Paper (Somewhere 2020), Table 3",
    "averaging": "image",
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
    monkeypatch.setattr(reports.tables, "PUBLISHED", tmp_path)
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
        "| First (ABC 2019) | published | its paper's | 240 | – | – | – | 12.3 | – |\n"
        "| Second (DEF 2020) | published | its paper's | – | 15 | – | 45.6 | – | – |\n"
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
    content = yaml.safe_load((reports.tables.PUBLISHED / spec.published).read_text())
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
    assert not any(note.startswith("Code:") for note in table.footnotes)


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
    ]
    made[1]["predictions"]["matcher"]["card"]["flow_resolution"] = "20"
    text = build_table(spec, made, synthetic=False).markdown()
    assert "| a | measured | cats-paper@1 | 256 | 16 |" in text
    assert "| b | measured | hpf-paper@1 | max 300 | 20 |" in text


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
    table = build_table(spec, made, synthetic=False, missing=["SPair-71k: no folder."])
    notes = table.footnotes
    assert f"net: weights {'1' * 12}, {'2' * 12}." in notes
    assert "net on PF-WILLOW: 7 of 9000 unanswered (wrong)." in notes
    assert (
        f"Code: commit {'b' * 12} with uncommitted changes, commit {'c' * 12}, predictions from "
        "outside a git checkout."
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
        ({"published": "gone.yaml"}, "published must be null or one of nemf_table1.yaml"),
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
