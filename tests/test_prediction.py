"""Prediction through the runner and the store: resumable, byte-equal, keyed by what matters."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments import prediction, provenance
from experiments.configurations import config_names, load_config
from experiments.feature_cache import FeatureCache, n_bytes
from experiments.prediction import predict
from experiments.store import Cell, cell_key, slug
from nemf.cards import available_matchers
from nemf.datasets import CATALOGUE
from nemf.datasets.pfwillow import PFWillow
from nemf.datasets.spair import SPair71k
from nemf.errors import NemfError
from nemf.matcher import Matcher, build_matcher
from nemf.pairs import Matches, Plan
from nemf.predictions import Predictions

FORWARD, BACKWARD, PADDED = Plan("src2trg"), Plan("trg2src"), Plan("trg2src", "pair")


def run(config: str, data: Path, out: Path, plan: Plan = FORWARD, **options: Any) -> Path:
    return predict(load_config(config, options), data=data, out=out, plan=plan)


# -- configs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("matcher", config_names("matchers"))
@pytest.mark.parametrize("dataset", config_names("datasets"))
def test_every_matcher_has_a_config_on_every_dataset(matcher: str, dataset: str) -> None:
    config = load_config(f"{matcher}/{dataset}")
    assert config.model.type in available_matchers()
    assert config.dataset.type in CATALOGUE
    assert config.label
    assert config.batch >= 1


def test_a_config_file_of_ones_own_inherits_and_options_override(tmp_path: Path) -> None:
    from experiments.configurations import CONFIGS

    bases = [str(CONFIGS / f) for f in ("runtime.py", "matchers/copy.py", "datasets/pfwillow.py")]
    file = tmp_path / "mine.py"
    file.write_text(f"_base_ = {bases!r}\nlabel = 'mine'\n")
    config = load_config(str(file), {"predict.chunk": 3})
    assert (config.label, config.predict.chunk, config.dataset.type) == ("mine", 3, "pfwillow")


@pytest.mark.parametrize("name", ["copy", "copy/nowhere", "nothing/pfwillow", "x.py"])
def test_unknown_configs_are_named(name: str) -> None:
    with pytest.raises(NemfError, match=r"unknown config|no such config"):
        load_config(name)


def test_a_config_that_does_not_parse_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("model = (\n")
    with pytest.raises(NemfError, match=r"bad\.py: cannot be read as a config"):
        load_config(str(tmp_path / "bad.py"))


# -- what is in a file ----------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [FORWARD, BACKWARD, PADDED])
def test_the_file_holds_the_dataset_in_the_plans_direction(
    plan: Plan, tiny_pfwillow: Callable[..., Path], tmp_path: Path
) -> None:
    root = tiny_pfwillow()
    found = Predictions.read(run("copy/pfwillow", root, tmp_path / "out", plan))
    dataset = PFWillow(root)
    assert len(found) == sum(len(pair.src_kps) for pair in dataset)
    forward = plan.direction == "src2trg"
    expected_q = np.concatenate([p.src_kps if forward else p.trg_kps for p in dataset])
    expected_t = np.concatenate([p.trg_kps if forward else p.src_kps for p in dataset])
    np.testing.assert_array_equal(found.points("query"), expected_q)
    np.testing.assert_array_equal(found.points("true"), expected_t)
    pair = dataset[0]
    q, r = (pair.src, pair.trg) if forward else (pair.trg, pair.src)
    scale = np.float32([r.size[1] / q.size[1], r.size[0] / q.size[0]])
    np.testing.assert_allclose(found.points("pred")[:10], expected_q[:10] * scale, rtol=1e-6)
    assert found.column("query_hash")[0] == q.hash
    assert found.plan == plan
    assert found.meta["fingerprint"] == dataset.fingerprint


def test_padding_applies_to_the_pf_layouts_only(tiny_spair: Callable[..., Path]) -> None:
    pair = SPair71k(tiny_spair())[0]
    assert PADDED.for_layout("spair") == BACKWARD
    assert pair.oriented(BACKWARD).canvases == (pair.trg.size, pair.src.size)
    common = tuple(np.maximum(pair.trg.size, pair.src.size))
    assert pair.oriented(PADDED).canvases == (common, common)


# -- resume, bytes, keys --------------------------------------------------------------------------


def test_a_second_run_does_nothing(tiny_spair: Callable[..., Path], tmp_path: Path) -> None:
    root = tiny_spair()
    first = run("copy/spair", root, tmp_path)
    stamp = first.stat().st_mtime_ns
    assert run("copy/spair", root, tmp_path) == first
    assert first.stat().st_mtime_ns == stamp


def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(
    tiny_pfwillow: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tiny_pfwillow()
    options = {"predict.chunk": 1, "model.init": "random", "model.weights": None}
    undisturbed = run("nearest_small/pfwillow", root, tmp_path / "a", **options)

    calls = []
    real = prediction.predict_pairs

    def dies_at_the_second_chunk(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(prediction, "predict_pairs", dies_at_the_second_chunk)
    with pytest.raises(KeyboardInterrupt):
        run("nearest_small/pfwillow", root, tmp_path / "b", **options)
    assert not list((tmp_path / "b").rglob("predictions.parquet"))
    assert len(list((tmp_path / "b").rglob("chunks/*.parquet"))) == 1
    resumed = run("nearest_small/pfwillow", root, tmp_path / "b", **options)
    assert len(calls) == 4  # the first chunk was not computed again
    assert resumed.read_bytes() == undisturbed.read_bytes()
    assert not list((tmp_path / "b").rglob("chunks"))


def test_what_was_left_by_a_kill_after_the_file_was_whole_is_removed(
    tiny_pfwillow: Callable[..., Path], tmp_path: Path
) -> None:
    root = tiny_pfwillow()
    file = run("copy/pfwillow", root, tmp_path)
    chunk = file.parent / "chunks" / "000000.parquet"
    chunk.parent.mkdir()
    chunk.write_bytes(b"")
    assert run("copy/pfwillow", root, tmp_path) == file
    assert not chunk.parent.exists()


def test_a_matcher_that_couples_its_pairs_starts_again(
    tiny_pfwillow: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its random stream runs through all pairs, so half a run cannot be continued."""
    from baselines.copy import CopyKeypoints

    monkeypatch.setattr(CopyKeypoints, "couples_pairs", True)
    calls = []
    real = prediction.predict_pairs

    def dies_once(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(prediction, "predict_pairs", dies_once)
    root, options = tiny_pfwillow(), {"predict.chunk": 1}
    with pytest.raises(KeyboardInterrupt):
        run("copy/pfwillow", root, tmp_path, **options)
    run("copy/pfwillow", root, tmp_path, **options)
    assert len(calls) == 3 + 3


@pytest.mark.long
def test_killed_runs_go_on_and_give_the_same_bytes(
    tiny_pfwillow: Callable[..., Path], tmp_path: Path
) -> None:
    """SIGKILL at different moments; the next start ends with the bytes of an undisturbed run."""
    root = tiny_pfwillow()
    command = [
        *(sys.executable, "-m", "experiments.cli", "predict", "nearest_small/pfwillow"),
        *("--data", str(root), "--cfg-options", "predict.chunk=1"),
        *("--cfg-options", "model.init=random", "--cfg-options", "model.weights=None"),
    ]

    def start(out: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*command, "--out", str(out)], stderr=subprocess.DEVNULL)

    begun = time.monotonic()
    assert start(tmp_path / "whole").wait() == 0
    duration = time.monotonic() - begun
    (whole,) = (tmp_path / "whole").rglob("predictions.parquet")
    for moment in np.linspace(0.3, 1.0, 6):
        out = tmp_path / f"killed-{moment:.2f}"
        process = start(out)
        time.sleep(duration * moment)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert start(out).wait() == 0
        (again,) = out.rglob("predictions.parquet")
        assert again.read_bytes() == whole.read_bytes()
        assert not [p for p in out.rglob(".*") if not p.name.startswith(".lock.")]


def test_the_key_holds_what_changes_a_prediction(
    tiny_pfwillow: Callable[..., Path], tmp_path: Path
) -> None:
    root = tiny_pfwillow()
    options: dict[str, Any] = {"model.init": "random", "model.weights": None}

    def key(**more: Any) -> str:
        return run("nearest_small/pfwillow", root, tmp_path, **options, **more).parent.name

    first = key()
    assert key() == first
    changes = [
        {"seed": 1},
        {"model.layers": (5,)},
        {"predict.chunk": 2},
        {"batch": 3},
        {"dataset.first": 2},
    ]
    keys = {key(**change) for change in changes}
    assert len(keys) == len(changes)
    assert first not in keys
    assert key(label="another name") == first
    assert key(**{"predict.cache_mib": 1}) == first


def test_key_facts_are_canonical() -> None:
    assert cell_key({"a": 1, "b": (1, 2)}) == cell_key({"b": [1, 2], "a": 1})
    assert cell_key({"a": 1}) != cell_key({"a": 2})
    with pytest.raises(TypeError, match="cannot be part"):
        cell_key({"a": object()})


def test_a_cell_has_one_writer(tmp_path: Path) -> None:
    cell = Cell(tmp_path / "slot", "key")
    code = (
        "import sys, time; from pathlib import Path; from experiments.store import Cell\n"
        "with Cell(Path(sys.argv[1]), 'key').claim():\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "slot")], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline().strip() == "held"
    with pytest.raises(NemfError, match="another process"), cell.claim():
        pass
    holder.kill()
    holder.wait()
    with cell.claim():  # a dead owner's claim is free
        pass


def test_an_output_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NemfError, match="cannot be written"), Cell(tmp_path / "file", "k").claim():
        pass


def test_folder_names() -> None:
    assert slug("HPF, ResNet-18 (4,6)") == "HPF-ResNet-18-4-6"
    assert slug("../../etc") == "etc"
    assert slug("CATs++, small CNN") == "CATsplusplus-small-CNN"
    labels = {load_config(f"{name}/spair").label for name in config_names("matchers")}
    assert len({slug(label) for label in labels}) == len(config_names("matchers"))
    with pytest.raises(NemfError, match="no letter"):
        slug("///")


def test_infinite_answers_are_refused(
    tiny_pfwillow: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from baselines.copy import CopyKeypoints

    real = CopyKeypoints.match

    def broken(self: Any, *arguments: Any) -> Any:
        found = real(self, *arguments)
        found[0].points[0, 0] = float("inf")
        return found

    monkeypatch.setattr(CopyKeypoints, "match", broken)
    with pytest.raises(NemfError, match=r"matcher copy, pair .*points has infinite"):
        run("copy/pfwillow", tiny_pfwillow(), tmp_path)


WRONG_ANSWERS: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "transposed": (lambda xy: Matches(xy.T), r"points has shape \(2, 10\), not \(10, 2\)"),
    "too few": (lambda xy: Matches(xy[:-1]), r"points has shape \(9, 2\), not \(10, 2\)"),
    "bare tensor": (lambda xy: xy, r"answered Tensor, not nemf.pairs.Matches"),
    "array": (lambda xy: Matches(xy.numpy()), r"points is a ndarray, not a tensor"),
    "map as confidence": (
        lambda xy: Matches(xy, xy),
        r"confidence has shape \(10, 2\), not \(10,\): one number for each query",
    ),
}


@pytest.mark.parametrize("name", WRONG_ANSWERS)
def test_answers_of_the_wrong_form_are_named(
    name: str, tiny_pfwillow: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from baselines.copy import CopyKeypoints

    real, (spoil, said) = CopyKeypoints.match, WRONG_ANSWERS[name]
    monkeypatch.setattr(
        CopyKeypoints, "match", lambda *given: [spoil(found.points) for found in real(*given)]
    )
    with pytest.raises(NemfError, match=rf"matcher copy, pair .*{said}"):
        run("copy/pfwillow", tiny_pfwillow(), tmp_path)


@pytest.mark.parametrize(("answers", "said"), [([], "pairs, not 0"), (None, "not NoneType")])
def test_match_must_answer_every_pair(
    answers: Any,
    said: str,
    tiny_pfwillow: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from baselines.copy import CopyKeypoints

    monkeypatch.setattr(CopyKeypoints, "match", lambda *given: answers)
    with pytest.raises(NemfError, match=f"one Matches for each of .*{said}"):
        run("copy/pfwillow", tiny_pfwillow(), tmp_path)


# -- encode once ----------------------------------------------------------------------------------


class Counting(Matcher):
    """Features are one kibibyte per image."""

    card = available_matchers()["copy"]

    def encode(self, images: Any, role: str) -> list[torch.Tensor]:
        return [torch.zeros(256) for _ in images]


def cache_of(root: Path, budget_bytes: int) -> FeatureCache:
    return FeatureCache(Counting(), PFWillow(root), budget_bytes)


def test_each_image_is_encoded_once(tiny_pfwillow: Callable[..., Path]) -> None:
    root = tiny_pfwillow()
    cache = cache_of(root, 2**20)
    for pair in cache.dataset:
        cache.get(pair.oriented(FORWARD), "query")
        cache.get(pair.oriented(FORWARD), "reference")
    assert (cache.asked, cache.encoded) == (6, 4)


def test_the_cache_keeps_to_its_budget_and_drops_the_least_recent(
    tiny_pfwillow: Callable[..., Path],
) -> None:
    cache = cache_of(tiny_pfwillow(), 2 * 1024)
    a_b, _, c_d = (pair.oriented(FORWARD) for pair in cache.dataset)
    cache.get(a_b, "query")
    cache.get(a_b, "reference")
    cache.get(a_b, "query")  # b is now the least recent
    cache.get(c_d, "query")
    assert cache.encoded == 3
    cache.get(a_b, "query")
    assert cache.encoded == 3
    cache.get(a_b, "reference")
    assert cache.encoded == 4
    nothing = cache_of(cache.dataset.folder.parent, 0)
    nothing.get(a_b, "query")
    nothing.get(a_b, "query")
    assert nothing.encoded == 2


def test_another_canvas_is_another_encoding(tiny_pfwillow: Callable[..., Path]) -> None:
    cache = cache_of(tiny_pfwillow(), 2**20)
    pair = cache.dataset[0]
    cache.get(pair.oriented(FORWARD), "query")
    cache.get(pair.oriented(Plan("src2trg", "pair")), "query")
    assert cache.encoded == 2


def test_bytes_of_nested_features() -> None:
    matcher = build_matcher("nearest", backbone="resnet_small", init="random")
    from nemf.pairs import Image

    (features,) = matcher.encode([Image.from_pixels(np.zeros((64, 64, 3), np.uint8))], "query")
    assert n_bytes(features) == features.map.nbytes
    assert n_bytes({"a": [torch.zeros(2), np.zeros(3)], "b": (1, "x")}) == 8 + 24


# -- provenance -----------------------------------------------------------------------------------


def test_the_code_fingerprint_covers_the_matcher_and_ignores_comments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "foreign"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "part.py").write_text("x = 1\n")
    (package / "method.py").write_text("from foreign.part import x\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def fingerprint() -> str:
        provenance.code_fingerprint.cache_clear()
        return provenance.code_fingerprint("foreign.method")

    first = fingerprint()
    (package / "part.py").write_text('"""Docs."""\n# a comment\nx = 1\n')
    assert fingerprint() == first
    (package / "part.py").write_text("x = 2\n")
    assert fingerprint() != first


def test_the_code_fingerprint_covers_research_code_beside_a_matcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else an edited network would be answered from predictions of the one before."""
    files = {
        name: tmp_path / f"{name}.py"
        for name in ("beside_matcher", "beside_network", "beside_layers")
    }
    files["beside_matcher"].write_text("def late():\n    from beside_network import net\n")
    files["beside_network"].write_text("import json, hypothesis, beside_layers\nnet = 1\n")
    files["beside_layers"].write_text("width = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def fingerprint() -> str:
        for cached in (provenance.code_fingerprint, provenance._installed):
            cached.cache_clear()
        return provenance.code_fingerprint("experiments.prediction", "beside_matcher")

    first = fingerprint()
    files["beside_layers"].write_text("width = 1  # a comment\n")
    assert fingerprint() == first
    files["beside_layers"].write_text("width = 2\n")
    second = fingerprint()
    assert second != first
    real = provenance.version
    monkeypatch.setattr(
        provenance, "version", lambda name: "0" if name == "hypothesis" else real(name)
    )
    assert fingerprint() != second


def test_installed_packages_are_not_taken_for_the_users() -> None:
    """Their sources are their version's."""
    for name in ("torch", "numpy", "yaml", "json", "sys", "reports", "nowhere_at_all", ""):
        assert not provenance._is_the_users(name)
    assert provenance._installed("yaml").keys() == {"PyYAML=="}
    assert provenance._installed("json") == {}


def test_scoring_and_reports_are_not_on_the_prediction_path() -> None:
    """A change of a score must not make predictions stale."""
    queue, seen = ["experiments.prediction", "baselines.hpf", "baselines.nearest"], set()
    while queue:
        name = queue.pop()
        path = provenance._source(name)
        if name in seen or path is None or name.partition(".")[0] not in provenance._ROOTS:
            continue
        seen.add(name)
        tree = ast.parse(path.read_text())
        queue += provenance.imported_modules(tree, name, is_package=path.name == "__init__.py")
    assert "nemf.backbones" in seen
    assert not {n for n in seen if n.startswith("reports") or n == "nemf.scoring"}


def test_code_state_reads_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        done = subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    (tmp_path / "experiments").mkdir()
    module = tmp_path / "experiments" / "provenance.py"
    module.write_text("")
    monkeypatch.setattr(provenance, "__file__", str(module))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    provenance.code_state.cache_clear()
    assert provenance.code_state() == {"commit": None, "dirty": None}
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "x")
    provenance.code_state.cache_clear()
    assert provenance.code_state() == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "new").write_text("")
    provenance.code_state.cache_clear()
    assert provenance.code_state()["dirty"] is True
    provenance.code_state.cache_clear()


def test_runs_are_recorded_with_their_origin(
    tiny_pfwillow: Callable[..., Path], tmp_path: Path
) -> None:
    meta = Predictions.read(run("copy/pfwillow", tiny_pfwillow(), tmp_path)).meta
    assert meta["facts"]["libraries"]["torch"] == torch.__version__.partition("+")[0] or (
        meta["facts"]["libraries"]["torch"] == torch.__version__
    )
    assert meta["facts"]["threads"] == torch.get_num_threads()
    assert meta["matcher"]["weights_sha256"] == build_matcher("copy").weights_hash
    assert set(meta["code"]) == {"commit", "dirty"}
    assert os.sep not in meta["key"]


# -- damage and changes ---------------------------------------------------------------------------


def test_a_damaged_prediction_file_is_predicted_anew(
    tiny_pfwillow: Callable[..., Path], tmp_path: Path
) -> None:
    root = tiny_pfwillow()
    file = run("copy/pfwillow", root, tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert run("copy/pfwillow", root, tmp_path).read_bytes() == whole


def test_a_damaged_chunk_and_foreign_files_are_no_obstacle(
    tiny_pfwillow: Callable[..., Path], tmp_path: Path
) -> None:
    root = tiny_pfwillow()
    file = run("copy/pfwillow", root, tmp_path)
    whole = file.read_bytes()
    file.unlink()
    (file.parent / "chunks").mkdir()
    (file.parent / "chunks" / "000000.parquet").write_bytes(b"PAR1")
    (file.parent / "chunks" / "foo.parquet").write_bytes(b"")
    assert run("copy/pfwillow", root, tmp_path).read_bytes() == whole


def test_a_folders_threshold_is_part_of_the_key(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    root = tiny_folder()
    first = run("copy/folder", root, tmp_path)
    other = run("copy/folder", root, tmp_path, **{"dataset.threshold": "image"})
    assert other != first
    assert Predictions.read(other).meta["layout"] == "pfpascal"


def test_the_readers_code_is_part_of_the_key(
    tiny_pfwillow: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(
        prediction, "code_fingerprint", lambda *modules: asked.append(modules) or "x"
    )
    run("copy/pfwillow", tiny_pfwillow(), tmp_path)
    assert "nemf.datasets.pfwillow" in asked[0]


def test_a_changed_matcher_has_a_name_of_its_own() -> None:
    from experiments.configurations import relabel

    config = load_config("copy/pfwillow")
    relabel(config, {"predict.chunk": 3})
    assert config.label == "copy (floor)"
    relabel(config, {"model.layers": (2,), "model.weights": "/a/b/c.pth"})
    assert config.label == "copy (floor) [layers=(2,), weights=c.pth]"


def test_a_flipped_bit_in_a_prediction_file_is_noticed(
    tiny_pfwillow: Callable[..., Path], tmp_path: Path
) -> None:
    root = tiny_pfwillow()
    file = run("copy/pfwillow", root, tmp_path)
    whole = file.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 3] ^= 1  # in a page of values: readable, but not what was written
    file.write_bytes(damaged)
    assert run("copy/pfwillow", root, tmp_path).read_bytes() == whole
