"""What matchers cost: rows against arithmetic by hand, and the table and figure of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from experiments.cli import main_group
from experiments.matcher_costs import measure, measure_one, of_configs, paper_settings
from nemf.backbones import tap_table
from nemf.cards import available_matchers
from nemf.errors import NemfError
from reports.costs import add_measured, add_published, markdown, write

NEAREST = {"type": "nearest", "backbone": "resnet_small", "init": "random"}


def task(label: str, **model: Any) -> dict[str, Any]:
    return {"label": label, "published_as": None, "model": model, "size": (64, 80), "device": "cpu"}


def content(*labels: str) -> dict[str, Any]:
    rows = [
        {
            **{"label": label, "published_as": None, "parameters": 1_500_000, "image_gflop": 2.0},
            **{"pair_gflop": 0.26, "image_ms": 10.0, "pair_ms": 1234.4, "peak_mib": 512.0},
            "random_weights": label == "random",
        }
        for label in labels
    ]
    machine = {"device": "CPU x", "threads": 2, "platform": "Y"}
    return {"machine": machine, "size": [375, 500], "n_points": 10, "code": None, "rows": rows}


def record(label: str, dataset: str = "spair", fingerprint: str = "f") -> dict[str, Any]:
    entry = {"group": "all", "value": "all", "averaging": "image", "alpha": 0.1}
    return {
        "predictions": {
            **{"matcher": {"label": label}, "dataset": dataset, "title": "SPair-71k"},
            **{"split": "test", "fingerprint": fingerprint, "synthetic": False},
            **{"n_pairs": 100, "official_pairs": 12234},
        },
        "protocol": {"id": "canonical@1", "averaging": "image"},
        "level": 0.95,
        "metrics": [entry | {"pck": 0.5, "low": 0.4, "high": 0.61}],
    }


def test_parameters_and_flop_of_the_nearest_neighbour_by_hand() -> None:
    row, _ = measure_one(task("nearest", **NEAREST))
    last = tap_table("resnet_small")[6]
    channels, jump = last.channels, last.jump_px
    cells = (256 // jump) ** 2
    # ten points against every cell of the reference
    assert row["pair_gflop"] == pytest.approx(2 * 10 * channels * cells / 1e9, rel=0.3)
    # the first convolution alone: 3 channels, 7x7, onto a half-size grid
    first = 2 * 3 * 49 * 128 * 128 * 16 / 1e9
    assert row["image_gflop"] > first
    assert row["parameters"] > 3 * 49 * 16
    assert row["random_weights"]
    assert min(row["image_ms"], row["pair_ms"]) > 0


def test_a_matcher_without_weights_costs_no_arithmetic() -> None:
    row, _ = measure_one(task("copy", type="copy"))
    assert (row["parameters"], row["image_gflop"], row["pair_gflop"]) == (0, 0, 0)
    assert not row["random_weights"]


def test_every_registered_matcher_has_a_paper_setting() -> None:
    tasks = paper_settings()
    assert {t["model"]["type"] for t in tasks} == set(available_matchers())
    assert len({t["label"] for t in tasks}) == len(tasks)
    assert "init" not in next(t for t in tasks if t["model"]["type"] == "copy")["model"]


def test_rows_are_measured_in_processes_of_their_own() -> None:
    found = measure([task("one", type="copy"), task("two", **NEAREST)], size=(64, 80))
    assert [row["label"] for row in found["rows"]] == ["one", "two"]
    assert set(found["rows"][0]) == set(found["rows"][1])
    assert found["size"] == [64, 80]
    assert all(row["peak_mib"] >= 0 for row in found["rows"])
    assert found["machine"]["threads"] >= 1


def test_a_matcher_that_cannot_be_measured_is_named() -> None:
    broken = task("broken one", type="nearest", backbone="resnet7", init="random")
    with pytest.raises(NemfError, match=r"broken one cannot be measured: .*resnet7"):
        measure([broken])


def test_configs_are_measured_as_they_are(tmp_path: Path) -> None:
    (only,) = of_configs(["nearest_small"], tmp_path)
    assert only["model"]["backbone"] == "resnet_small"
    assert only["label"] == "nearest, small CNN layer3.1"
    with pytest.raises(NemfError, match="unknown config"):
        of_configs(["nothing"], tmp_path)


def test_published_figures_are_marked_and_missing_ones_stay_missing() -> None:
    found = content("NeMF", "mine")
    found["rows"][0]["published_as"] = "NeMF"
    add_published(found, "nemf_table1.yaml", "spair", 0.1)
    assert found["rows"][0]["accuracy"] == {"pck": pytest.approx(0.536)}
    assert found["rows"][1]["accuracy"] is None
    assert "not measured here" in markdown(found)


def test_what_the_table_lacks_is_the_figure_that_most_sources_print() -> None:
    found = content("NeMF", "CATs++", "SCOT")
    found["rows"][0]["published_as"] = "NeMF"
    add_published(found, "nemf_table1.yaml", "spair", 0.1)
    shown = [row["accuracy"]["pck"] for row in found["rows"]]
    assert shown == pytest.approx([0.536, 0.599, 0.356])  # 59.9 four times, 59.8 twice
    assert "(CATs++ as in SD+DINO arXiv 2305.15347 Table 3; SCOT as in CHM" in markdown(found)


def test_measured_accuracies_come_with_their_interval_and_part() -> None:
    found = content("a", "random")
    add_measured(found, [record("a"), record("another")], "canonical@1", 0.1)
    text = markdown(found)
    assert "| a | 1.5 | 2.0 | 0.3 | 10 | 1,234 | 512 | 50.0 [40.0, 61.0] |" in text
    assert "| random | 1.5 | 2.0 | 0.3 | 10 | 1,234 | 512 | – |" in text
    assert "100 of 12,234 pairs" in text
    assert "Random weights in random" in text


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        ([], {}, "no score of a under canonical@1"),
        ([record("a"), record("a", "pfwillow")], {}, r"2 datasets .*pfwillow, spair.*--dataset"),
        ([record("a"), record("a", fingerprint="g")], {"dataset": "spair"}, "versions"),
        ([record("a")], {"alpha": 0.05}, "alpha 0.05 was not scored"),
    ],
)
def test_scores_that_do_not_fit_are_refused(
    records: list[dict[str, Any]], options: dict[str, Any], message: str
) -> None:
    given = {"protocol": "canonical@1", "alpha": 0.1, **options}
    with pytest.raises(NemfError, match=message):
        add_measured(content("a"), records, **given)


def test_table_and_figure_hold_the_same_numbers(tmp_path: Path) -> None:
    found = content("a", "b")
    add_measured(found, [record("a")], "canonical@1", 0.1)
    files = write(found, tmp_path)
    assert {f.name for f in files} == {"costs.md", "costs.png", "costs.pdf", "costs.json"}
    assert all(f.stat().st_size > 200 for f in files)
    assert json.loads((tmp_path / "costs.json").read_text())["rows"] == found["rows"]


def test_the_command_refuses_what_it_cannot_read() -> None:
    for arguments, message in (
        (["matchers", "score"], "runs alone"),
        (["matchers", "--size", "500"], "WIDTHxHEIGHT"),
        (["matchers", "--size", "8x8"], "WIDTHxHEIGHT"),
    ):
        result = CliRunner().invoke(main_group, ["bench", *arguments])
        assert result.exit_code != 0
        assert message in str(result.exception) + result.output
