"""The command line: bad input ends in one line and leaves nothing; good input runs through."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from nemf.cards import available_matchers
from nemf.datasets import available_datasets
from nemf.predictions import Predictions
from nemf.scoring import PROTOCOLS, available_protocols
from tests.conftest import REPO, save_image, write_json


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line sees and sets no variable of the caller."""
    for name in ("NEMF_DATA", "NEMF_WEIGHTS", "NEMF_DOWNLOAD", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def half_written(folder: Path) -> list[str]:
    """What only an interrupted writer would leave, and any prediction file."""
    return [
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file()
        and (path.name == "predictions.parquet" or path.name.startswith("."))
        and not path.name.startswith(".lock.")
    ]


# -- bad input ------------------------------------------------------------------------------------


@dataclass
class Bench:
    """What a bad case is made of: an output folder, and the makers of tiny datasets."""

    tmp: Path
    spair: Callable[..., Path]
    willow: Callable[..., Path]
    folder: Callable[..., Path]
    patch: pytest.MonkeyPatch

    @property
    def out(self) -> Path:
        return self.tmp / "out"

    def predict(self, config: str, data: Path, *more: Any) -> list[Any]:
        return ["predict", config, "--data", data, "--out", self.out, *more]

    def write(self, name: str, content: bytes) -> Path:
        path = self.tmp / name
        path.write_bytes(content)
        return path


@pytest.fixture
def bench(
    tmp_path: Path,
    tiny_spair: Callable[..., Path],
    tiny_pfwillow: Callable[..., Path],
    tiny_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Bench:
    return Bench(tmp_path, tiny_spair, tiny_pfwillow, tiny_folder, monkeypatch)


def truncated_image(bench: Bench) -> list[Any]:
    data = bench.spair(splits=("test",))
    image = data / "SPair-71k" / "JPEGImages" / "dog" / "test_d.jpg"
    image.write_bytes(image.read_bytes()[:-200])
    return bench.predict("copy/spair", data)


def empty_list(bench: Bench) -> list[Any]:
    data = bench.willow()
    file = data / "PF-WILLOW" / "test_pairs.csv"
    file.write_text(file.read_text().splitlines()[0] + "\n")
    return bench.predict("copy/pfwillow", data)


def empty_file(bench: Bench) -> list[Any]:
    data = bench.willow()
    (data / "PF-WILLOW" / "test_pairs.csv").write_text("")
    return bench.predict("copy/pfwillow", data)


def keypoint_outside(bench: Bench) -> list[Any]:
    data = bench.willow()
    file = data / "PF-WILLOW" / "test_pairs.csv"
    header, *rows = file.read_text().splitlines()
    cells = rows[1].split(",")
    cells[5] = "999.5"
    rows[1] = ",".join(cells)
    file.write_text("\n".join([header, *rows]) + "\n")
    return bench.predict("copy/pfwillow", data)


def nan_everywhere(bench: Bench) -> list[Any]:
    data = bench.folder()
    pairs = json.loads((data / "pairs.json").read_text())
    pairs[1]["src_kps"] = [None]
    write_json(data / "pairs.json", pairs)
    return bench.predict("copy/folder", data)


def other_architecture(bench: Bench) -> list[Any]:
    import torch

    from nemf.backbones import build_backbone

    file = bench.tmp / "small.pth"
    torch.save(build_backbone("resnet_small", init="random", upto=6).state_dict(), file)
    return bench.predict(
        "nearest_resnet18/pfwillow", bench.willow(), "--cfg-options", f"model.weights={file}"
    )


def weights(name: str, content: bytes | None) -> Callable[[Bench], list[Any]]:
    def prepare(bench: Bench) -> list[Any]:
        file = bench.tmp / name if content is None else bench.write(name, content)
        return bench.predict(
            "nearest_resnet18/pfwillow", bench.willow(), "--cfg-options", f"model.weights={file}"
        )

    return prepare


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disk(call: str) -> Callable[[Bench], list[Any]]:
    def prepare(bench: Bench) -> list[Any]:
        bench.patch.setattr(os, call, no_space)
        return bench.predict("copy/pfwillow", bench.willow())

    return prepare


def out_is_a_file(bench: Bench) -> list[Any]:
    return [
        *("predict", "copy/pfwillow", "--data", bench.willow()),
        *("--out", bench.write("file", b"")),
    ]


def options(*values: str) -> Callable[[Bench], list[Any]]:
    def prepare(bench: Bench) -> list[Any]:
        more = [part for value in values for part in ("--cfg-options", value)]
        return bench.predict("copy/pfwillow", bench.willow(), *more)

    return prepare


def with_data(*arguments: Any) -> Callable[[Bench], list[Any]]:
    return lambda bench: [*arguments, "--data", bench.willow(), "--out", bench.out]


def with_out(*arguments: Any) -> Callable[[Bench], list[Any]]:
    return lambda bench: [*arguments, "--out", bench.out]


def score(name: str, content: bytes | None, *more: Any) -> Callable[[Bench], list[Any]]:
    def prepare(bench: Bench) -> list[Any]:
        file = bench.tmp / name if content is None else bench.write(name, content)
        return ["score", file, "--out", bench.out, *more]

    return prepare


def external(content: bytes) -> Callable[[Bench], list[Any]]:
    def prepare(bench: Bench) -> list[Any]:
        more = ("--dataset", "pfwillow", "--data", bench.willow())
        return score("theirs.csv", content, *more)(bench)

    return prepare


def match(*more: Any, image: bytes | None = None) -> Callable[[Bench], list[Any]]:
    def prepare(bench: Bench) -> list[Any]:
        good = save_image(bench.tmp / "a.png", 0, 20, 30)
        other = good if image is None else bench.write("b.png", image)
        return ["match", good, other, "--matcher", "copy", *more]

    return prepare


BAD: dict[str, tuple[Callable[[Bench], list[Any]], str]] = {
    "no --data": (with_out("predict", "copy/pfwillow"), "give --data"),
    "no --data for a table": (with_out("predict", "--table", "1"), "give --data"),
    "data folder missing": (
        lambda b: b.predict("copy/pfwillow", b.tmp / "nowhere"),
        "nowhere: no PF-WILLOW here",
    ),
    "data folder missing for a table": (
        lambda b: ["predict", "--table", "1", "--data", b.tmp / "nowhere", "--out", b.out],
        "nowhere: no such folder",
    ),
    "dataset folder absent": (
        lambda b: b.predict("copy/spair", b.willow()),
        "no SPair-71k here (looked for SPair-71k",
    ),
    "no dataset of the table": (
        lambda b: ["predict", "--table", "1", "--data", b.folder(), "--out", b.out],
        "holds none of SPair-71k",
    ),
    "truncated JPEG": (truncated_image, "test_d.jpg: image does not decode"),
    "empty pair list": (empty_list, "test_pairs.csv"),
    "empty file as pair list": (empty_file, "test_pairs.csv"),
    "keypoint outside": (keypoint_outside, "lies outside"),
    "NaN everywhere": (nan_everywhere, "pairs.json entry 2: pair"),
    "unknown matcher": (with_data("predict", "magic/pfwillow"), "unknown config 'magic/pfwillow'"),
    "matcher without a dataset": (
        with_data("predict", "copy"),
        "unknown config 'copy': it names a matcher only; give <matcher>/<dataset>, e.g. copy/",
    ),
    "unknown matcher in the config": (options("model.type=magic"), "unknown matcher 'magic'"),
    "unknown matcher to match": (
        match("--points", "1,1", "--matcher", "magic"),
        "unknown config 'magic/folder'",
    ),
    "unknown matcher in a table": (
        with_data("predict", "--table", "1", "--matchers", "magic"),
        "unknown config 'magic/pfwillow'",
    ),
    "unknown protocol": (
        with_data("predict", "copy/pfwillow", "--protocol", "pck"),
        "unknown protocol 'pck'",
    ),
    "unknown config": (with_data("predict", "copy/nowhere"), "unknown config 'copy/nowhere'"),
    "missing config file": (with_data("predict", "gone.py"), "gone.py: no such config file"),
    "config that does not parse": (
        lambda b: b.predict(str(b.write("bad.py", b"model = (\n")), b.willow()),
        "bad.py: cannot be read as a config",
    ),
    "config misspelt": (
        with_data("predict", "hpf_resnet8/pfwillow"),
        "(did you mean 'hpf_resnet18'",
    ),
    "config and table": (with_data("predict", "copy/pfwillow", "--table", "1"), "give either"),
    "neither config nor table": (with_data("predict"), "give either"),
    "option without a value": (options("model.layers"), "'model.layers': expected KEY=VALUE"),
    "option without a key": (options("=3"), "'=3': expected KEY=VALUE"),
    "option that the matcher lacks": (options("model.nonsense=1"), "nonsense"),
    "option that the dataset lacks": (options("dataset.nonsense=1"), "nonsense"),
    "option out of range": (options("predict.chunk=0"), "predict.chunk must be an integer"),
    "unknown split": (options("dataset.split=tests"), "pfwillow has no split 'tests'"),
    "option that does not fit": (options("model.type.x=1"), "do not fit copy/pfwillow"),
    "weights of another architecture": (other_architecture, "small.pth does not hold resnet18"),
    "weights that are text": (weights("text.pth", b"no weights\n"), "text.pth: not a readable"),
    "weights file missing": (weights("gone.pth", None), "gone.pth: there is no such weights file"),
    "weights folder missing": (
        lambda b: b.predict("copy/pfwillow", b.willow(), "--weights", b.tmp / "nowhere"),
        "nowhere: no such folder of weights",
    ),
    "output folder is a file": (out_is_a_file, "cannot be written"),
    "disk full at fsync": (full_disk("fsync"), "cannot be written (No space left on device)"),
    "disk full at replace": (full_disk("replace"), "cannot be written (No space left on device)"),
    "no prediction file": (score("gone.parquet", None), "gone.parquet: no such prediction file"),
    "prediction file that is text": (score("t.parquet", b"text"), "t.parquet: cannot be read"),
    "prediction file that is empty": (score("e.parquet", b""), "e.parquet: cannot be read"),
    "file and table": (score("x.parquet", b"", "--table", "1"), "give either"),
    "score nothing": (with_out("score"), "give either"),
    "score an empty store": (with_out("score", "--table", "1"), "holds no predictions to score"),
    "unknown table": (with_out("table", "7"), "table7.yaml: no such table specification"),
    "table without records": (with_out("table", "1", "--no-mlflow"), "no real score record"),
    "unknown protocol to score": (
        score("x.parquet", b"", "--protocol", "pck"),
        "unknown protocol 'pck'",
    ),
    "alphas that are text": (score("x.parquet", b"", "--alphas", "wide"), "alphas must be numbers"),
    "alphas below zero": (score("x.parquet", b"", "--alphas", "-1"), "positive number, not -1.0"),
    "foreign CSV without columns": (external(b"a,b\n1,2\n"), "theirs.csv: lacks the column(s)"),
    "foreign CSV of other pairs": (external(b"pair,keypoint,x,y\nq,0,1,2\n"), "pair q keypoint 0"),
    "unknown dataset": (
        score("x.csv", b"", "--dataset", "imagenet", "--data", "."),
        "unknown dataset 'imagenet'",
    ),
    "points that are text": (match("--points", "here"), "--points 'here': expected"),
    "points of three": (match("--points", "1,2,3"), "--points '1,2,3': expected"),
    "no points": (match("--points", " "), "--points ' ': expected"),
    "points that are NaN": (match("--points", "nan,1"), "points must be finite"),
    "image that is text": (match("--points", "1,1", image=b"text"), "b.png: not a readable image"),
    "picture of no kind that can be written": (
        match("--points", "1,1", "--out", "m.bmp"),
        "m.bmp: give a name that ends in .png, .pdf",
    ),
    "points and a grid": (match("--points", "1,1", "--grid", "3"), "give one of them"),
    "point outside": (match("--points", "1,1 300,9"), "point 2 (300, 9) lies outside"),
    "match without the weights": (
        match("--matcher", "hpf_resnet18"),
        "hpf_resnet18: no weights for resnet18",
    ),
    "quiet and verbose": (lambda b: ["-q", "-v", "list"], "--quiet does not go with"),
    "annotate a missing folder": (
        lambda b: ["annotate", b.tmp / "nowhere"],
        "nowhere: no such folder of photographs",
    ),
    "COCO annotation that is text": (
        lambda b: ["data", "from-coco", b.write("c.json", b"text"), b.tmp, b.tmp / "out"],
        "c.json: cannot be read as JSON",
    ),
    "stats of an unknown dataset": (
        lambda b: ["data", "stats", "imagenet", "--data", b.tmp],
        "unknown dataset 'imagenet'",
    ),
    "stats without data": (lambda b: ["data", "stats", "pfwillow"], "give --data"),
    "verify a missing folder": (
        lambda b: ["data", "verify", "pfwillow", "--data", b.tmp / "nowhere"],
        "nowhere: no PF-WILLOW here",
    ),
    "queries into a file": (
        lambda b: [
            *("data", "queries", "pfwillow", b.write("file", b"") / "q.csv"),
            *("--data", b.willow()),
        ],
        "q.csv: cannot be written",
    ),
    "unknown preset": (
        lambda b: ["data", "make-synthetic", b.tmp / "s", "--preset", "huge"],
        "huge",
    ),
}


@pytest.mark.parametrize(("prepare", "reason"), BAD.values(), ids=BAD)
def test_bad_input_ends_in_one_line(
    prepare: Callable[[Bench], list[Any]], reason: str, bench: Bench, nemf: Any
) -> None:
    arguments = prepare(bench)
    result = nemf(*arguments)
    assert result.status not in (0, None)
    lines = result.err.splitlines()
    assert len(lines) == 1, result.err
    assert lines[0].startswith("nemf: ")
    assert reason in lines[0]
    assert "Traceback" not in result.err + result.out
    assert half_written(bench.tmp) == []

    with pytest.raises(Exception, match=r".") as shown:  # --debug lets it through
        nemf("--debug", *arguments)
    assert not isinstance(shown.value, SystemExit)


@pytest.mark.parametrize("content", [b"hello", b"abc"])
def test_text_that_looks_like_a_pickle_is_refused_by_name(
    content: bytes, bench: Bench, nemf: Any
) -> None:
    result = nemf(*weights("text.pth", content)(bench))
    assert "text.pth" in result.err


@pytest.mark.parametrize("option", ["predict.chnuk=3", "nonsense.x=1", "sede=3"])
def test_a_misspelt_option_is_refused(option: str, bench: Bench, nemf: Any) -> None:
    assert nemf(*options(option)(bench)).status != 0


@pytest.mark.parametrize("debug", [False, True])
def test_in_a_process_of_its_own(debug: bool, tmp_path: Path) -> None:
    arguments = [*(["--debug"] if debug else []), "data", "stats", "pfwillow", "--data"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.cli", *arguments, str(tmp_path)],
        cwd=REPO, capture_output=True, text=True,
    )  # fmt: skip
    message = f"{tmp_path}: no PF-WILLOW here"
    assert message in done.stderr
    assert done.stdout == ""
    if debug:
        assert done.returncode == 1
        assert done.stderr.startswith("Traceback (most recent call last)")
    else:
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith(f"nemf: {message}")


def test_stopping_is_no_error_of_the_user(nemf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nemf.cards.available_matchers", stop)
    result = nemf("list")
    assert result.status == 130
    assert "the same command goes on where it was" in result.err


def test_a_wrong_option_shows_the_usage(nemf: Any) -> None:
    result = nemf("predict", "--nonsense")
    assert result.status == 2
    assert "No such option '--nonsense'" in result.err


# -- what good input leaves when something else breaks --------------------------------------------


@pytest.fixture
def predicted(
    nemf: Any, tiny_pfwillow: Callable[..., Path], tmp_path: Path
) -> tuple[Path, Path, Path]:
    """(data, out, prediction file) of the copy matcher on the tiny PF-WILLOW."""
    data, out = tiny_pfwillow(), tmp_path / "out"
    result = nemf("predict", "copy/pfwillow", "--data", data, "--out", out)
    assert result.status == 0, result.err
    return data, out, Path(result.out.strip())


@pytest.mark.parametrize("how", ["score FILE", "score --table", "table"])
def test_a_damaged_prediction_file_is_named(how: str, predicted: Any, nemf: Any) -> None:
    _, out, file = predicted
    if how == "table":
        assert nemf("score", "--table", "1", "--out", out).status == 0
        (record,) = [f for f in (file.parent / "scores").iterdir() if "oracle" not in f.name]
        record.write_text(record.read_text()[:-30])
        result = nemf("table", "1", "--out", out, "--no-mlflow")
        file = record
    else:
        file.write_bytes(file.read_bytes()[:-100])
        what = [file] if how == "score FILE" else ["--table", "1"]
        result = nemf("score", *what, "--out", out)
    assert result.status == 2
    assert result.err.count("\n") == 1
    assert f"{file}: cannot be read" in result.err
    assert not list(out.rglob("*.md"))


def test_a_full_disk_while_scoring_keeps_the_predictions(
    predicted: Any, nemf: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out, file = predicted
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", no_space)
        result = nemf("score", file, "--out", out)
    assert result.status == 2
    assert "canonical@1.json: cannot be written (No space left on device)" in result.err
    assert list((file.parent / "scores").iterdir()) == []
    assert nemf("score", file, "--out", out).status == 0


def test_a_full_disk_while_predicting_is_made_up_for_later(
    nemf: Any,
    tiny_pfwillow: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ("predict", "copy/pfwillow", "--data", tiny_pfwillow(), "--out", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", no_space)
        assert nemf(*arguments).status == 2
    result = nemf(*arguments)
    assert result.status == 0
    assert Path(result.out.strip()).is_file()


def test_another_plan_says_how_to_predict(predicted: Any, nemf: Any) -> None:
    _, out, file = predicted
    result = nemf("score", file, "--protocol", "nemf-paper@1", "--out", out)
    assert result.status == 2
    assert "predict with --protocol nemf-paper@1" in result.err


# -- predict, score, table ------------------------------------------------------------------------


@pytest.fixture
def three_datasets(
    tiny_spair: Callable[..., Path],
    tiny_pfpascal: Callable[..., Path],
    tiny_pfwillow: Callable[..., Path],
) -> Path:
    tiny_spair(splits=("test",))
    tiny_pfpascal(splits=("test",))
    return tiny_pfwillow()


def test_from_data_to_the_table(nemf: Any, three_datasets: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    common = ("--data", three_datasets, "--out", out)
    assert nemf("predict", "--table", "1", "--matchers", "copy", *common).status == 0
    scored = nemf("score", "--table", "1", "--out", out)
    assert scored.out.startswith("9 score records")  # three datasets, each with two ceilings
    result = nemf("table", "1", "--no-mlflow", "--out", out)
    assert result.status == 0
    for ending in ("md", "tex", "csv"):
        assert (out / "table1" / f"table1.{ending}").is_file()
    text = (out / "table1" / "table1.md").read_text(encoding="utf-8")
    assert text in result.out
    assert "SPair-71k (bbox), measured on 2 of 12234 pairs" in text
    assert "PF-WILLOW (bbox-kp), measured on 3 of 900 pairs" in text
    cells = pd.read_csv(out / "table1" / "table1.csv")
    assert set(cells["origin"]) == {"published", "measured"}
    measured = cells[cells["origin"] == "measured"]
    assert set(measured["method"]) == {
        "copy (floor)",
        "oracle-grid 16x16 (ceiling)",
        "oracle-grid 64x64 (ceiling)",
    }
    assert measured["pck"].between(0, 1).all()
    assert not (out / "mlflow.db").exists()

    again = nemf("table", "1", "--no-mlflow", "--out", out)
    assert again.out == result.out


def test_a_second_prediction_does_no_work(
    predicted: Any, nemf: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from baselines.copy import CopyKeypoints

    data, out, file = predicted
    before = file.stat()
    folder = sorted(path.name for path in file.parent.iterdir())

    def refuse(*_: Any) -> None:
        raise AssertionError("matched again")

    monkeypatch.setattr(CopyKeypoints, "match", refuse)
    monkeypatch.setattr(CopyKeypoints, "encode", refuse)
    result = nemf("predict", "copy/pfwillow", "--data", data, "--out", out)
    assert (result.status, result.out.strip()) == (0, str(file))
    after = file.stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)
    assert sorted(path.name for path in file.parent.iterdir()) == folder


def protocols_of_the_plan(file: Path) -> list[str]:
    """Every protocol whose plan the predictions of a file were made under."""
    plan = Predictions.read(file).plan
    fitting = [name for name, protocol in PROTOCOLS.items() if protocol.plan == plan]
    assert {"canonical@1", "hpf-paper@1"} <= set(fitting)
    return fitting


def test_score_prints_what_it_wrote(predicted: Any, nemf: Any) -> None:
    _, out, file = predicted
    result = nemf("score", file, "--out", out, "--by", "point", "--alphas", "0.05,0.2")
    assert result.status == 0
    assert "copy (floor) on PF-WILLOW test (3 pairs of 4 distinct images, 30 keypoints" in (
        result.out
    )
    assert "per-point mean" in result.out
    assert "per-image" not in result.out
    header = next(line for line in result.out.splitlines() if "@" in line and "mean" not in line)
    assert header.split() == ["@0.05", "@0.2"]
    written = {path.stem for path in (file.parent / "scores").iterdir()}
    assert written == set(protocols_of_the_plan(file))


def test_alphas_of_ones_own_take_nothing_from_the_table(predicted: Any, nemf: Any) -> None:
    _, out, file = predicted
    assert nemf("score", "--table", "1", "--out", out).status == 0
    before = nemf("table", "1", "--no-mlflow", "--out", out)
    assert nemf("score", file, "--alphas", "0.33", "--out", out).status == 0
    record = json.loads((file.parent / "scores" / "canonical@1.json").read_text())
    assert {0.05, 0.1, 0.33} <= set(record["alphas"])
    after = nemf("table", "1", "--no-mlflow", "--out", out)
    assert after.status == 0
    assert after.out == before.out


def test_matcher_options_get_a_row_of_their_own(
    nemf: Any, tiny_pfwillow: Callable[..., Path], tmp_path: Path
) -> None:
    arguments = ("predict", "copy/pfwillow", "--data", tiny_pfwillow(), "--out", tmp_path / "out")
    assert nemf(*arguments).status == nemf(*arguments, "--label", "mine").status == 0
    folders = {path.name for path in (tmp_path / "out" / "predictions").iterdir()}
    assert folders == {"copy-floor", "mine"}


def test_the_protocol_decides_the_plan(
    nemf: Any, tiny_pfwillow: Callable[..., Path], tmp_path: Path
) -> None:
    result = nemf(
        *("predict", "copy/pfwillow", "--data", tiny_pfwillow(), "--out", tmp_path / "out"),
        *("--protocol", "nemf-paper@1"),
    )
    assert "trg2src-pair" in result.out
    scored = nemf("score", result.out.strip(), "--out", tmp_path / "out", "--json")
    assert [r["protocol"]["id"] for r in json.loads(scored.out)] == ["nemf-paper@1"]


def test_predictions_made_elsewhere_are_scored_and_shown(predicted: Any, nemf: Any) -> None:
    data, out, _ = predicted
    questions = out / "questions.csv"
    asked = nemf("data", "queries", "pfwillow", questions, "--data", data)
    assert asked.out.startswith("30 queries of 3 pairs")
    sheet = pd.read_csv(questions, dtype={"pair": str})
    sheet["x"], sheet["y"] = sheet["query_x"], sheet["query_y"]
    sheet.loc[0, ["x", "y"]] = np.nan
    sheet.to_csv(out / "answers.csv", index=False)
    result = nemf(
        *("score", out / "answers.csv", "--dataset", "pfwillow", "--name", "their method"),
        *("--data", data, "--out", out),
    )
    assert result.status == 0, result.err
    assert "their method on PF-WILLOW test" in result.out
    assert "1 unanswered" in result.out
    assert nemf("score", "--table", "1", "--out", out).status == 0
    table = nemf("table", "1", "--no-mlflow", "--out", out)
    rows = [line for line in table.out.splitlines() if line.startswith("| their method |")]
    assert len(rows) == 1
    assert rows[0].startswith("| their method | external | canonical@1 |")


# -- synthetic stand-ins --------------------------------------------------------------------------


def test_synthetic_stand_ins_and_their_table(
    nemf: Any, predicted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    root, out = tmp_path / "synthetic", predicted[1]
    made = nemf("data", "make-synthetic", root, "--preset", "tiny")
    assert made.status == 0
    assert {Path(line).name for line in made.out.split()} == {"SPair-71k", "PF-PASCAL", "PF-WILLOW"}
    verified = nemf("data", "verify", "pfwillow", "--data", root)
    assert verified.status == 0, verified.out
    common = ("--data", root, "--out", out)
    assert nemf("predict", "--table", "1", "--matchers", "copy", *common).status == 0
    assert nemf("score", "--table", "1", "--out", out).status == 0
    last = nemf("table", "1", "--no-mlflow", "--out", out)  # of the kind that was predicted last
    assert "SYNTHETIC" in last.out.splitlines()[0]
    (out / "table1" / "job.json").unlink()
    unclear = nemf("table", "1", "--no-mlflow", "--out", out)
    assert unclear.status == 2
    assert "holds real and synthetic records: say --real or --synthetic" in unclear.err
    table = nemf("table", "1", "--no-mlflow", "--out", out, "--synthetic")
    assert table.status == 0
    assert "SYNTHETIC" in table.out.splitlines()[0]
    assert "published" not in table.out
    real = nemf("table", "1", "--no-mlflow", "--out", out, "--real")
    assert "SYNTHETIC" not in real.out
    assert "| NeMF (NeurIPS 2022) | published |" in real.out


# -- list and data --------------------------------------------------------------------------------


def strictly(text: str) -> Any:
    """JSON as a strict reader takes it."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_list_names_everything(nemf: Any) -> None:
    result = nemf("list")
    assert result.status == 0
    for name in (*available_matchers(), *available_datasets(), *available_protocols()):
        assert f"  {name} " in result.out
    listed = strictly(nemf("list", "--json").out)
    assert listed.keys() == {"matchers", "datasets", "protocols"}
    assert listed["matchers"]["copy"]["official_protocol"] == "canonical@1"
    assert listed["protocols"]["nemf-paper@1"]["threshold_side"] == "src"
    assert listed["datasets"]["spair"]["official_pairs"]["test"] == 12234


@pytest.mark.parametrize("what", ["matchers", "datasets", "protocols", "configs"])
def test_list_one_kind(what: str, nemf: Any) -> None:
    plain = nemf("list", what)
    listed = strictly(nemf("list", what, "--json").out)
    assert list(listed) == [what]
    assert plain.out.splitlines()[0] == what
    assert len(plain.out.splitlines()) == 1 + len(listed[what])
    if what == "configs":
        assert "copy/pfwillow" in listed[what]


def test_data_stats(nemf: Any, tiny_pfwillow: Callable[..., Path]) -> None:
    data = tiny_pfwillow()
    card = strictly(nemf("data", "stats", "pfwillow", "--data", data, "--json").out)
    assert (card["pairs"], card["images"], card["keypoints"]) == (3, 4, 30)
    plain = nemf("data", "stats", "pfwillow", "--data", data)
    assert "3 of 900 official pairs (a part)" in plain.out
    assert card["fingerprint"] in plain.out


def test_data_verify(nemf: Any, tiny_spair: Callable[..., Path]) -> None:
    data = tiny_spair(splits=("test",))
    report = strictly(nemf("data", "verify", "spair", "--data", data, "--json").out)
    image = data / "SPair-71k" / "JPEGImages" / "dog" / "test_d.jpg"
    image.write_bytes(image.read_bytes()[:-200])
    damaged = nemf("data", "verify", "spair", "--data", data)
    assert damaged.status == 1
    assert "test_d.jpg" in damaged.out
    again = nemf("data", "verify", "spair", "--data", data, "--json")
    assert again.status == 1
    assert strictly(again.out) != report


@pytest.mark.parametrize("protocol", ["canonical@1", "cats-paper@1"])
def test_data_queries(
    protocol: str, nemf: Any, tiny_pfwillow: Callable[..., Path], tmp_path: Path
) -> None:
    data, file = tiny_pfwillow(), tmp_path / "q.csv"
    result = nemf("data", "queries", "pfwillow", file, "--data", data, "--protocol", protocol)
    assert result.status == 0
    table = pd.read_csv(file)
    assert len(table) == 30
    first = "car_1" if protocol == "canonical@1" else "car_2"
    assert first in table["query_image"][0]


def test_score_as_json(predicted: Any, nemf: Any) -> None:
    _, out, file = predicted
    result = nemf("score", file, "--out", out, "--json", "--oracle-grid", "8")
    records = strictly(result.out)
    assert len(records) == 2 * len(protocols_of_the_plan(predicted[2]))  # each with its ceiling
    assert records[0]["predictions"]["matcher"]["name"] == "copy"
    assert records[1]["predictions"]["matcher"]["label"] == "oracle-grid 8x8 (ceiling)"


def test_where_data_is_can_stand_in_the_environment(
    nemf: Any, tiny_pfwillow: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEMF_DATA", str(tiny_pfwillow()))
    assert nemf("data", "stats", "pfwillow").status == 0


def test_a_refused_external_file_leaves_nothing(
    nemf: Any, tiny_pfwillow: Callable[..., Path], tmp_path: Path
) -> None:
    root, out, sheet = tiny_pfwillow(), tmp_path / "fresh", tmp_path / "sheet.csv"
    assert nemf("data", "queries", "pfwillow", sheet, "--data", root).status == 0
    table = pd.read_csv(sheet).assign(x=1.0, y=1.0)
    table.to_csv(sheet, index=False)
    both = ("--protocol", "canonical@1", "--protocol", "nemf-paper@1")
    common = ("--dataset", "pfwillow", "--data", root, "--out", out)
    refused = nemf("score", sheet, *common, *both)
    assert refused.status == 2
    assert "nemf-paper@1" in refused.err
    assert not list(out.rglob("*.parquet"))
    assert nemf("score", sheet, *common).status == 0
    (record,) = out.rglob("scores/*.json")
    record.write_text(
        record.read_text().replace('"predictions_sha256": "', '"predictions_sha256": "0')
    )
    stale = nemf("table", "1", "--no-mlflow", "--out", out)
    assert stale.status == 2
    assert "scores other predictions" in stale.err
