"""Fixtures every test may use: the shared data, a cache of their own, and tiny valid datasets."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage
from scipy.io import savemat

from tests.browser import browser  # noqa: F401 (a fixture for everyone)

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is first imported

REPO = Path(__file__).resolve().parent.parent
WILLOW_HEADER = [
    "imageA",
    "imageB",
    *(f"{axis}{side}{k}" for side in "AB" for axis in "XY" for k in range(1, 11)),
]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with goldens and real data beside the checkout; the test is skipped without it."""
    folder = Path(os.environ.get("NEMF_SHARED", REPO.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent (goldens and real data); set NEMF_SHARED")
    return folder


@pytest.fixture(scope="session")
def _session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nemf-cache")


@pytest.fixture(autouse=True)
def _own_cache(_session_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("NEMF_CACHE", str(_session_cache))


@pytest.fixture(autouse=True)
def _one_torch_thread() -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def tiny_pixels(seed: int, height: int, width: int) -> np.ndarray:
    """uint8 (H, W, 3): a smooth random picture (JPEG keeps it well)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return np.asarray(
        PILImage.fromarray(coarse).resize((width, height), PILImage.Resampling.BILINEAR)
    )


def save_image(path: Path, seed: int, height: int, width: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PILImage.fromarray(tiny_pixels(seed, height, width)).save(path, quality=90)
    return path


@dataclass
class Result:
    status: int
    out: str
    err: str


@pytest.fixture
def nemf(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """``nemf(*arguments)`` runs the command line in this process."""

    from experiments.cli import main

    def run(*arguments: Any) -> Result:
        monkeypatch.setattr(sys, "argv", ["nemf", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            status = 0
        except SystemExit as leave:
            status = leave.code if isinstance(leave.code, int) else 0 if leave.code is None else 1
        captured = capsys.readouterr()
        return Result(status, captured.out, captured.err)

    return run


@pytest.fixture
def tiny_spair(tmp_path: Path) -> Callable[..., Path]:
    """``make(root=..., folder="SPair-71k", splits=("trn", "val", "test"))`` writes the dataset and
    returns ``root``: per split one ``cat`` pair a-b (3 keypoints) and one ``dog`` pair c-d (2), on
    images of the split's own; image annotations hold one keypoint more than the pairs."""

    def make(
        root: Path | None = None,
        folder: str = "SPair-71k",
        splits: Sequence[str] = ("trn", "val", "test"),
    ) -> Path:
        root = root or tmp_path / "data"
        base = root / folder
        for number, split in enumerate(splits):
            lines = []
            for k, (category, n) in enumerate((("cat", 3), ("dog", 2))):
                sizes = ((40 + 2 * k, 60), (50, 44))  # (height, width) of source and target
                stems = [f"{split}_{'abcd'[2 * k + side]}" for side in (0, 1)]
                points = [spair_points(number + 10 * k + side, n, *sizes[side]) for side in (0, 1)]
                for side in (0, 1):
                    save_image(
                        base / "JPEGImages" / category / f"{stems[side]}.jpg",
                        100 * number + 10 * k + side,
                        *sizes[side],
                    )
                    own = {str(i): p for i, p in enumerate(points[side])}
                    write_json(
                        base / "ImageAnnotation" / category / f"{stems[side]}.json",
                        {"kps": {**own, str(n): [1, 1], str(n + 1): None}},
                    )
                line = f"{k + 1:06d}-{stems[0]}-{stems[1]}:{category}"
                lines.append(line)
                (h0, w0), (h1, w1) = sizes
                write_json(
                    base / "PairAnnotation" / split / f"{line}.json",
                    {
                        "src_imname": f"{stems[0]}.jpg",
                        "trg_imname": f"{stems[1]}.jpg",
                        "src_imsize": [w0, h0, 3],
                        "trg_imsize": [w1, h1, 3],
                        "src_bndbox": [2, 3, w0 - 4, h0 - 5],
                        "trg_bndbox": [1, 2, w1 - 3, h1 - 4],
                        "category": category,
                        "src_kps": points[0],
                        "trg_kps": points[1],
                        "kps_ids": [str(i) for i in range(n)],
                        "viewpoint_variation": k,
                        "scale_variation": 2 * k,
                        "truncation": 3 * k,
                        "occlusion": 0,
                    },
                )
            (base / "Layout" / "large").mkdir(parents=True, exist_ok=True)
            (base / "Layout" / "large" / f"{split}.txt").write_text("\n".join(lines) + "\n")
        return root

    return make


def spair_points(seed: int, n: int, height: int, width: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(2, width - 2, n), rng.integers(2, height - 2, n)], 1).tolist()


@pytest.fixture
def tiny_pfpascal(tmp_path: Path) -> Callable[..., Path]:
    """``make(root=..., nested=False, mat=True, csv_kps=False, splits=...)`` writes the dataset and
    returns ``root``: per split a ``cat`` pair (4 keypoints, the second absent in the source) and a
    ``train`` pair (3). Rows of trn carry flip 0 and 1."""

    def make(
        root: Path | None = None,
        nested: bool = False,
        mat: bool = True,
        csv_kps: bool = False,
        splits: Sequence[str] = ("trn", "val", "test"),
    ) -> Path:
        root = root or tmp_path / "data"
        base = root / "PF-PASCAL"
        files = base / "PF-dataset-PASCAL" if nested else base
        for number, split in enumerate(splits):
            header = ["source_image", "target_image", "class"]
            header += ["flip"] if split.startswith("tr") else []
            header += ["XA", "YA", "XB", "YB"] if csv_kps else []
            rows = []
            for k, (category, voc, n) in enumerate((("cat", 8, 4), ("train", 19, 3))):
                sizes = ((36, 50 + k), (48, 40))
                stems = [f"{split}_{'abcd'[2 * k + side]}" for side in (0, 1)]
                points = []
                for side in (0, 1):
                    kps = np.asarray(
                        spair_points(number + 10 * k + side, n, *sizes[side]), np.float64
                    )
                    kps += 0.25
                    if k == 0 and side == 0:
                        kps[1] = np.nan
                    points.append(kps)
                    save_image(
                        files / "JPEGImages" / f"{stems[side]}.jpg",
                        100 * number + 10 * k + side,
                        *sizes[side],
                    )
                    if mat:
                        file = files / "Annotations" / category / f"{stems[side]}.mat"
                        file.parent.mkdir(parents=True, exist_ok=True)
                        box = [[1.0, 2.0, sizes[side][1] - 3.0, sizes[side][0] - 4.0]]
                        savemat(file, {"kps": kps, "bbox": np.array(box)})
                row: list[Any] = [f"PF-PASCAL/JPEGImages/{stem}.jpg" for stem in stems] + [voc]
                row += [k] if "flip" in header else []
                if csv_kps:
                    row += [";".join(f"{v:g}" for v in p[:, a]) for p in points for a in (0, 1)]
                rows.append(row)
            write_csv(base / f"{split}_pairs.csv", header, rows)
        return root

    return make


@pytest.fixture
def tiny_pfwillow(tmp_path: Path) -> Callable[..., Path]:
    """``make(root=..., below="")`` writes the dataset and returns ``root``: a ``car(S)`` pair, the
    same pair turned round, and a ``duck(S)`` pair. ``below``: folder that holds the classes."""

    def make(root: Path | None = None, below: str = "") -> Path:
        root = root or tmp_path / "data"
        base = root / "PF-WILLOW"
        images = {
            "car(S)/car_1.png": (30, 44),
            "car(S)/car_2.png": (40, 36),
            "duck(S)/duck_1.png": (32, 32),
            "duck(S)/duck_2.png": (28, 48),
        }
        points = {}
        for seed, (name, size) in enumerate(images.items()):
            save_image(base / below / name, seed, *size)
            kps = np.asarray(spair_points(seed, 10, *size)) + 0.125
            points[name] = [*kps[:, 0], *kps[:, 1]]
        car_1, car_2, duck_1, duck_2 = images
        listed = [(car_1, car_2), (car_2, car_1), (duck_1, duck_2)]
        rows = [[f"PF-dataset/{a}", f"PF-dataset/{b}", *points[a], *points[b]] for a, b in listed]
        write_csv(base / "test_pairs.csv", WILLOW_HEADER, rows)
        return root

    return make


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Callable[..., Path]:
    """``make(root=..., kind="json"|"csv", boxes=True)`` writes two pairs of images ``a.png``,
    ``b.png``, ``sub/c.jpg`` (the second source keypoint of the first pair is absent) and returns
    the folder."""

    def make(root: Path | None = None, kind: str = "json", boxes: bool = True) -> Path:
        root = root or tmp_path / "own"
        for seed, (name, size) in enumerate(
            {"a.png": (30, 40), "b.png": (36, 24), "sub/c.jpg": (28, 32)}.items()
        ):
            save_image(root / name, seed, *size)
        pairs: list[dict[str, Any]] = [
            {
                "src": "a.png",
                "trg": "b.png",
                "category": "cup",
                "src_kps": [[3, 4], None, [20.5, 10]],
                "trg_kps": [[5, 6], [7, 8], [9.5, 30]],
            },
            {"src": "b.png", "trg": "sub/c.jpg", "src_kps": [[5, 6]], "trg_kps": [[30, 2]]},
        ]
        if boxes:
            for pair in pairs:
                pair |= {"src_bbox": [1, 2, 22, 28], "trg_bbox": [2, 1, 21, 27]}
        if kind == "json":
            write_json(root / "pairs.json", pairs)
            return root
        header = ["src", "trg", "category", "XA", "YA", "XB", "YB"]
        header += ["src_bbox", "trg_bbox"] if boxes else []
        rows = []
        for pair in pairs:
            row = [pair["src"], pair["trg"], pair.get("category", "")]
            for key in ("src_kps", "trg_kps"):
                for axis in (0, 1):
                    row.append(";".join("nan" if p is None else f"{p[axis]:g}" for p in pair[key]))
            if boxes:
                row += [";".join(map(str, pair[key])) for key in ("src_bbox", "trg_bbox")]
            rows.append(row)
        write_csv(root / "pairs.csv", header, rows)
        return root

    return make


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [",".join(map(str, row)) for row in (header, *rows)]
    path.write_text("\n".join(lines) + "\n")


def golden_module(shared: Path, name: str) -> ModuleType:
    """``fill`` (deterministic weights) or ``inputs`` (deterministic images) of the goldens."""
    spec = importlib.util.spec_from_file_location(
        f"golden_{name}", shared / "goldens" / f"{name}.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def official_checkpoint(shared: Path, method: str, file: Path) -> Path:
    """A checkpoint as the authors of ``method`` ("cats", "nemf") release it, with the goldens'
    weights."""
    import torch

    fill = golden_module(shared, "fill")
    listed = json.loads((shared / "goldens" / f"{method}_state_dict.json").read_text())
    counters = {
        k: torch.int64 if k.endswith("num_batches_tracked") else None for k in listed["keys"]
    }
    empty = {k: torch.empty(shape, dtype=counters[k]) for k, shape in listed["keys"].items()}
    state = fill.fill_state_dict(empty)
    assert fill.checksum(state) == listed["checksum_crc32"]
    torch.save({"epoch": 1, "state_dict": state, "best_loss": 0.5}, file)
    return file


def willow_pck(matcher: Any, shared: Path) -> list[float]:
    """Canonical PCK in percent at .05, .10, .15 on all 900 pairs of PF-WILLOW, worked out here and
    not by the suite's own scoring of files; NaN answers are not expected."""
    import torch

    from nemf.datasets.pfwillow import PFWillow
    from nemf.pairs import Image, Plan
    from nemf.scoring import pck

    dataset = PFWillow(shared / "data")
    encoded: dict[str, Any] = {}
    errors, lengths = [], []
    for pair in dataset:
        oriented = pair.oriented(Plan("src2trg"))
        for record in (oriented.query, oriented.reference):
            if record.hash not in encoded:
                image = Image(dataset.pixels(record), record.hash, record.size)
                (encoded[record.hash],) = matcher.encode([image], "query")
        q, r = encoded[oriented.query.hash], encoded[oriented.reference.hash]
        (answer,) = matcher.match([q], [r], [torch.tensor(oriented.query_kps)])
        truth = oriented.reference_kps
        errors.append(np.linalg.norm(answer.points.numpy() - truth, axis=1))
        lengths.append(np.full(len(truth), np.ptp(truth, axis=0).max()))
    assert np.isfinite(errors).all()
    return [100 * pck(np.array(errors), np.array(lengths), a) for a in (0.05, 0.1, 0.15)]
