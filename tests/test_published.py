"""Published figures looked up: what is printed, where sources disagree, what the tables share."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from experiments.cli import main_group
from nemf.errors import NemfError
from nemf.scoring import get_protocol
from reports.published_figures import PublishedTable
from reports.published_lookup import look_up, published_figures

HEADINGS = {"bbox": "bbox", "image": "img", "kps_extent": "bbox-kp"}


def test_every_figure_is_a_percentage_with_a_source() -> None:
    figures = published_figures()
    assert len(figures) > 2000
    assert figures["pck_percent"].between(0, 100).all()
    assert not figures.duplicated().any()
    for column in ("method", "dataset", "class", "base", "averaging", "source", "read_from"):
        assert (figures[column].str.len() > 0).all(), column
    assert set(figures["averaging"]) == {"image", "point", "not stated"}


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("nemf_table1.yaml", "NeMF arXiv 2210.02689 Table 1"),
        ("nemf_table2.yaml", "NeMF arXiv 2210.02689 Table 2"),
    ],
)
def test_the_tables_show_the_same_figures(name: str, source: str) -> None:
    table = PublishedTable.load(name)
    shown = {
        (method.name, dataset, group, alpha, HEADINGS[table.bases[dataset]], value)
        for method in table.methods
        for (dataset, group, alpha), value in method.figures.items()
    }
    figures = published_figures()
    figures = figures[figures["source"] == source]
    columns = ["method", "dataset", "class", "alpha", "base", "pck_percent"]
    assert shown == set(figures[columns].itertuples(index=False, name=None))


def test_a_doubtful_cell_says_so() -> None:
    (row,) = look_up(["nemf"], dataset="pfwillow", alpha=0.05).to_dict("records")
    assert row["pck_percent"] == 60.8
    assert "misprint" in row["note"]


def test_sources_that_disagree_name_each_other() -> None:
    found = look_up(["CHM"], dataset="spair", group="cat").set_index("pck_percent")
    assert set(found.index) == {57.8, 64.9}
    assert "64.9 in SCorrSAN" in found.loc[57.8, "conflict"]
    assert "57.8 in NeMF" in found.loc[64.9, "conflict"]
    assert not look_up(["NeMF"])["conflict"].any()


def test_a_protocol_keeps_its_length_and_averaging() -> None:
    tight = look_up(["CATs"], dataset="pfwillow", alpha=0.1, protocol=get_protocol("canonical@1"))
    assert set(tight["pck_percent"]) == {69.0}
    padded = look_up(["CATs"], dataset="pfwillow", alpha=0.1, protocol=get_protocol("cats-paper@1"))
    assert set(padded["pck_percent"]) == {79.2}
    assert set(look_up(protocol=get_protocol("canonical@1"))["averaging"]) == {"image"}


def test_what_nothing_is_printed_of_is_an_error() -> None:
    with pytest.raises(NemfError, match=r"no published figure of 'CATz'.*did you mean 'CATs'"):
        look_up(["CATz"])
    with pytest.raises(NemfError, match="nowhere"):
        look_up(dataset="nowhere")


def test_the_command_prints_sources_and_doubts() -> None:
    result = CliRunner().invoke(main_group, ["published", "NeMF", "--dataset", "pfwillow"])
    assert result.exit_code == 0
    assert "60.8" in result.output
    assert "NeMF arXiv 2210.02689 Table 1" in result.output
    assert "misprint" in result.output
    assert "not measured here" in result.output


def test_the_command_prints_json() -> None:
    arguments = ["published", "CHM", "--dataset", "spair", "--class", "any", "--json"]
    rows = json.loads(CliRunner().invoke(main_group, arguments).output)
    assert {row["class"] for row in rows} >= {"all", "cat", "tvmonitor"}
    assert all(row["source"] and "conflict" in row for row in rows)


def test_nothing_that_fits_is_said() -> None:
    result = CliRunner().invoke(main_group, ["published", "NeMF", "--alpha", "0.42"])
    assert isinstance(result.exception, NemfError)
    assert "nothing is printed" in str(result.exception)
