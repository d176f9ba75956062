"""Synthetic stand-ins for SPair-71k, PF-PASCAL and PF-WILLOW, written in the official layouts.

Rendered objects with exact keypoints let the whole suite run where no real data may be had. Each
folder says what it is: ``SYNTHETIC.json`` names the generator, the seed and the preset. Every image
is a pure function of (seed, dataset, class, split, index), so the same call gives the same bytes,
whatever the number of workers.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import multiprocessing
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from nemf.claims import claimed
from nemf.datasets.synthetic_objects import OBJECT_CLASSES, ObjectClass
from nemf.datasets.synthetic_scenes import Framing, Photograph, take_photograph
from nemf.errors import NemfError
from nemf.reading import read_json

GENERATOR = "nemf-synthetic@1"
MARKER = "SYNTHETIC.json"

_logger = logging.getLogger(__name__)
_SPLITS = ("trn", "val", "test")
_DATASETS = ("SPair-71k", "PF-PASCAL", "PF-WILLOW")
_FEWEST_COMMON = 3
# spacing in the seed sequence: beyond every image index
_VIEW_KEY, _PAIR_KEY = 1_000_000, 2_000_000
_TWIN_SPREAD_DEG = 18.0
# pairs seen from viewpoints farther apart than this are kept rare
_USUAL_VIEWPOINT_DEG = 60.0
_RARE_WEIGHT = 0.08


@dataclass(frozen=True)
class _Preset:
    """Classes, and per class: images and pairs for each of trn, val, test."""

    classes: tuple[str, ...]
    spair_images: tuple[int, int, int]
    spair_pairs: tuple[int, int, int]
    pascal_images: tuple[int, int, int]
    pascal_pairs: tuple[int, int, int]
    willow_folders: tuple[str, ...]
    willow_images: int
    willow_pairs: int


@dataclass(frozen=True)
class _WillowFolder:
    """A PF-WILLOW sub-class: a kind of object, bounds of its azimuth, the same ten points."""

    subject: str
    azimuth_deg: tuple[float, float]
    keypoints: tuple[str, ...]


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_WILLOW = {
    "car(G)": _WillowFolder(
        "car", (25, 65),
        _names("wheel_front_left wheel_rear_left headlight_left headlight_right roof_front_left "
               "roof_front_right roof_rear_left roof_rear_right windshield_base_left "
               "windshield_base_right"),
    ),
    "car(S)": _WillowFolder(
        "car", (65, 105),
        _names("wheel_front_left wheel_rear_left headlight_left taillight_left roof_front_left "
               "roof_front_right roof_rear_left roof_rear_right windshield_base_left "
               "bumper_front_left"),
    ),
    "chair": _WillowFolder("chair", (15, 60), OBJECT_CLASSES["chair"].keypoints),
    "horse": _WillowFolder(
        "horse", (50, 105),
        _names("nose ear_left eye_left withers tail_base tail_tip hoof_front_left "
               "hoof_front_right hoof_rear_left hoof_rear_right"),
    ),
    "motorbike(S)": _WillowFolder(
        "motorbike", (60, 115),
        _names("wheel_front wheel_rear wheel_front_bottom wheel_rear_bottom handle_left headlight "
               "taillight tank_top seat_rear engine"),
    ),
    "winebottle(wC)": _WillowFolder(
        "bottle", (-25, 25),
        _names("cap_top cap_bottom neck_bottom label_centre label_top_left label_top_right "
               "label_bottom_left label_bottom_right base_left base_right"),
    ),
}  # fmt: skip

_PRESETS = {
    "table1": _Preset(
        classes=tuple(OBJECT_CLASSES),
        spair_images=(24, 8, 12),
        spair_pairs=(120, 20, 48),
        pascal_images=(8, 4, 6),
        pascal_pairs=(8, 5, 12),
        willow_folders=tuple(_WILLOW),
        willow_images=8,
        willow_pairs=200,
    ),
    "tiny": _Preset(
        classes=("bus", "chair", "motorbike"),
        spair_images=(4, 2, 4),
        spair_pairs=(4, 1, 3),
        pascal_images=(4, 2, 2),
        pascal_pairs=(2, 1, 1),
        willow_folders=("car(S)", "chair"),
        willow_images=2,
        willow_pairs=4,
    ),
}


def make_synthetic(
    root: Path,
    *,
    seed: int = 0,
    preset: str = "table1",
    workers: int = 1,
    progress: bool = False,
) -> list[Path]:
    """Write the three stand-in datasets under ``root`` and return their folders.

    ``preset`` is "table1" (ten classes, for a whole table) or "tiny" (for tests). A dataset of the
    same generator, seed and preset that is already there is kept as it is; every other one is
    written into a hidden folder beside its place and renamed when complete. ``workers`` > 1 renders
    in that many processes; ``progress`` shows a bar.

    Raises NemfError for an unknown preset, a bad seed or worker count, and when one of the three
    folders exists and is anything else: nothing that exists is ever overwritten.
    """
    if preset not in _PRESETS:
        raise NemfError(f"unknown preset {preset!r}: choose one of {', '.join(sorted(_PRESETS))}")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise NemfError(f"seed {seed!r} is not a whole number from 0 up")
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise NemfError(f"workers {workers!r} is not a whole number from 1 up")
    root = Path(root)
    if root.exists() and not root.is_dir():
        raise NemfError(f"{root} is not a folder: choose another place for the datasets")
    marker = {"synthetic": True, "generator": GENERATOR, "seed": seed, "preset": preset}
    root.mkdir(parents=True, exist_ok=True)
    busy = "another process makes synthetic data here"
    with claimed(root, ".make-synthetic.lock", busy, timeout_s=math.inf):
        missing = [name for name in _DATASETS if not _is_complete(root / name, marker)]
        for name in missing:
            partial = root / f".{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            _write_dataset(name, partial, _PRESETS[preset], seed, workers, progress)
            (partial / MARKER).write_text(json.dumps(marker) + "\n", encoding="utf-8")
            os.rename(partial, root / name)
            _logger.info("wrote synthetic %s (seed %d, preset %s)", root / name, seed, preset)
    return [root / name for name in _DATASETS]


def synthetic_marker(folder: Path) -> dict | None:
    """What ``SYNTHETIC.json`` in a dataset folder says, or None where there is no such file.

    Raises NemfError when the file is there but is not a marker.
    """
    path = Path(folder) / MARKER
    if not path.exists():
        return None
    marker = read_json(path)
    wanted = {"synthetic": bool, "generator": str, "seed": int, "preset": str}
    if not isinstance(marker, dict) or any(
        type(marker.get(key)) is not kind for key, kind in wanted.items()
    ):
        raise NemfError(f"{path} lacks one of {', '.join(wanted)}: make the dataset again")
    if not marker["synthetic"]:
        raise NemfError(f"{path} says synthetic: false: remove the file if the data is real")
    return marker


def _is_complete(folder: Path, marker: dict) -> bool:
    if not os.path.lexists(folder):
        return False
    found = synthetic_marker(folder)
    if found is None:
        raise NemfError(
            f"{folder} exists and is not synthetic: choose another root, it is not overwritten"
        )
    if found != marker:
        raise NemfError(
            f"{folder} holds the synthetic data of {found['generator']}, seed {found['seed']}, "
            f"preset {found['preset']!r}: remove it or choose another root"
        )
    return True


@dataclass(frozen=True)
class _Task:
    """One image to render: its place in the seed sequence, its framing and its file."""

    key: tuple[int, ...]
    subject: str
    framing: Framing
    path: Path


@dataclass(frozen=True)
class _Shot:
    """A rendered image without its pixels; ``size`` is (width, height)."""

    path: Path
    size: tuple[int, int]
    photograph: Photograph


def _render(task: _Task) -> _Shot:
    rng = np.random.default_rng(np.random.SeedSequence(task.key))
    photograph = take_photograph(OBJECT_CLASSES[task.subject], task.framing, rng)
    image = Image.fromarray(photograph.pixels)
    if task.path.suffix == ".jpg":
        image.save(task.path, quality=92)
    else:
        image.save(task.path)
    # the pixels are on disk now; they need not travel back from a worker
    bare = replace(photograph, pixels=np.empty((0, 0, 3), np.uint8))
    return _Shot(task.path, image.size, bare)


def _render_all(tasks: list[_Task], workers: int, progress: str | None) -> list[_Shot]:
    """Render in order; ``progress`` labels a bar, None shows none."""

    def collect(shots: Iterable[_Shot]) -> list[_Shot]:
        if progress is None:
            return list(shots)
        from tqdm import tqdm

        return list(tqdm(shots, total=len(tasks), desc=progress, unit="image"))

    for folder in {task.path.parent for task in tasks}:
        folder.mkdir(parents=True, exist_ok=True)
    if workers == 1:
        return collect(map(_render, tasks))
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return collect(pool.imap(_render, tasks, chunksize=4))


def _write_dataset(
    name: str, folder: Path, preset: _Preset, seed: int, workers: int, progress: bool
) -> None:
    plan, write = {
        "SPair-71k": (_plan_spair, _write_spair),
        "PF-PASCAL": (_plan_pascal, _write_pascal),
        "PF-WILLOW": (_plan_willow, _write_willow),
    }[name]
    key = (seed, _DATASETS.index(name))
    groups = plan(folder, preset, key)
    tasks = [task for group in groups.values() for task in group]
    shots = iter(_render_all(tasks, workers, name if progress else None))
    rendered = {label: [next(shots) for _ in group] for label, group in groups.items()}
    write(folder, preset, key, rendered)


# A group is all images of one (class, split); pairs never leave their group.


def _plan_spair(folder: Path, preset: _Preset, key: tuple[int, ...]) -> dict:
    return _plan_splits(preset, key, preset.spair_images, lambda name: folder / "JPEGImages" / name)


def _plan_pascal(folder: Path, preset: _Preset, key: tuple[int, ...]) -> dict:
    return _plan_splits(preset, key, preset.pascal_images, lambda name: folder / "JPEGImages")


def _plan_splits(preset: _Preset, key: tuple[int, ...], counts, place) -> dict:
    groups = {}
    for split_id, (split, count) in enumerate(zip(_SPLITS, counts, strict=True)):
        for name in preset.classes:
            subject = OBJECT_CLASSES[name]
            group_key = (*key, subject.voc_id, split_id)
            groups[name, split] = [
                _Task(
                    (*group_key, index),
                    name,
                    _split_framing(subject, group_key, index),
                    place(name) / f"{name}_{split}_{index:03d}.jpg",
                )
                for index in range(count)
            ]
    return groups


def _split_framing(subject: ObjectClass, group_key: tuple[int, ...], index: int) -> Framing:
    """Framing of an image of SPair-71k or PF-PASCAL; the first two of a group are whole.

    So that even a small group has a pair with enough common keypoints.
    """
    viewpoint = _viewpoint_deg(subject, group_key, index)
    if index < 2:
        return Framing(subject.keypoints, viewpoint, truncated=0.0, occluded=0.0)
    return Framing(subject.keypoints, viewpoint)


def _viewpoint_deg(
    subject: ObjectClass, group_key: tuple[int, ...], index: int
) -> tuple[float, float]:
    """Signed bounds of an image's azimuth; images 2m and 2m + 1 are seen from about one side."""
    rng = np.random.default_rng(np.random.SeedSequence((*group_key, _VIEW_KEY + index // 2)))
    low, high = subject.azimuth_deg
    middle = rng.uniform(low + _TWIN_SPREAD_DEG, high - _TWIN_SPREAD_DEG)
    bounds = (middle - _TWIN_SPREAD_DEG, middle + _TWIN_SPREAD_DEG)
    return bounds if rng.uniform() < 0.5 else (-bounds[1], -bounds[0])


def _plan_willow(folder: Path, preset: _Preset, key: tuple[int, ...]) -> dict:
    groups = {}
    for name in preset.willow_folders:
        spec = _WILLOW[name]
        framing = Framing(
            spec.keypoints,
            spec.azimuth_deg,
            truncated=0.0,
            occluded=0.15,
            fewest_visible=7,
        )
        groups[name, "test"] = [
            _Task(
                (*key, list(_WILLOW).index(name), _SPLITS.index("test"), index),
                spec.subject,
                framing,
                folder / name / f"{name}_{index:03d}.png",
            )
            for index in range(preset.willow_images)
        ]
    return groups


def _azimuth_difference_deg(a: _Shot, b: _Shot) -> float:
    turn = abs(a.photograph.azimuth_deg - b.photograph.azimuth_deg) % 360
    return min(turn, 360 - turn)


def _choose_pairs(
    shots: list[_Shot], count: int, key: tuple[int, ...]
) -> list[tuple[_Shot, _Shot]]:
    """Draw ordered pairs with enough common keypoints, mostly from similar viewpoints."""
    candidates, weights = [], []
    for src in shots:
        for trg in shots:
            common = (src.photograph.visible & trg.photograph.visible).sum()
            if src is not trg and common >= _FEWEST_COMMON:
                candidates.append((src, trg))
                usual = _azimuth_difference_deg(src, trg) <= _USUAL_VIEWPOINT_DEG
                weights.append(1.0 if usual else _RARE_WEIGHT)
    if not candidates:
        raise NemfError(f"seed {key[0]} leaves a class without a pair: choose another seed")
    if len(candidates) < count:
        _logger.info("only %d of %d pairs share enough keypoints", len(candidates), count)
    rng = np.random.default_rng(np.random.SeedSequence(key))
    share = np.array(weights) / sum(weights)
    drawn = rng.choice(len(candidates), min(count, len(candidates)), replace=False, p=share)
    return [candidates[index] for index in np.sort(drawn)]


def _pair_key(key: tuple[int, ...], class_id: int, split: str) -> tuple[int, ...]:
    return (*key, class_id, _SPLITS.index(split), _PAIR_KEY)


def _point(xy: np.ndarray) -> list[float]:
    return [round(float(value), 3) for value in xy]


def _write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def _write_rows(path: Path, rows: Iterable[Iterable]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def _write_spair(folder: Path, preset: _Preset, key: tuple[int, ...], groups: dict) -> None:
    number = 0
    lines = defaultdict(list)
    for (name, split), shots in groups.items():
        subject = OBJECT_CLASSES[name]
        for shot in shots:
            path = folder / "ImageAnnotation" / name / f"{shot.path.stem}.json"
            _write_json(path, _image_annotation(name, shot))
        count = preset.spair_pairs[_SPLITS.index(split)]
        for src, trg in _choose_pairs(shots, count, _pair_key(key, subject.voc_id, split)):
            number += 1
            line = f"{number:06d}-{src.path.stem}-{trg.path.stem}:{name}"
            lines[split].append(line)
            path = folder / "PairAnnotation" / split / f"{line}.json"
            _write_json(path, _pair_annotation(line, name, src, trg))
    layout = folder / "Layout" / "large"
    layout.mkdir(parents=True)
    for split in _SPLITS:
        (layout / f"{split}.txt").write_text("\n".join(lines[split]) + "\n", encoding="utf-8")


def _image_annotation(name: str, shot: _Shot) -> dict:
    photograph = shot.photograph
    points = zip(photograph.keypoints_px, photograph.visible, strict=True)
    return {
        "filename": shot.path.name,
        "category": name,
        "image_width": shot.size[0],
        "image_height": shot.size[1],
        "image_depth": 3,
        "truncated": int(photograph.truncated),
        "occluded": int(photograph.occluded),
        "bndbox": photograph.box_px.tolist(),
        "kps": {str(i): _point(xy) if seen else None for i, (xy, seen) in enumerate(points)},
        "kps_names": list(OBJECT_CLASSES[name].keypoints),
        # eight sectors of 45 degrees, the first centred on the front
        "azimuth_id": int(((photograph.azimuth_deg + 22.5) % 360) // 45),
    }


def _pair_annotation(line: str, name: str, src: _Shot, trg: _Shot) -> dict:
    one, two = src.photograph, trg.photograph
    common = np.flatnonzero(one.visible & two.visible)
    areas = sorted(_box_area_px2(shot.photograph.box_px) for shot in (src, trg))
    return {
        "filename": line,
        "src_imname": src.path.name,
        "trg_imname": trg.path.name,
        "src_imsize": [*src.size, 3],
        "trg_imsize": [*trg.size, 3],
        "src_bndbox": one.box_px.tolist(),
        "trg_bndbox": two.box_px.tolist(),
        "category": name,
        "src_kps": [_point(one.keypoints_px[i]) for i in common],
        "trg_kps": [_point(two.keypoints_px[i]) for i in common],
        "kps_ids": [str(i) for i in common],
        "mirror": 0,
        "viewpoint_variation": int(
            np.searchsorted((30.0, 75.0), _azimuth_difference_deg(src, trg))
        ),
        "scale_variation": int(np.searchsorted((2.0, 4.0), areas[1] / areas[0])),
        "truncation": int(one.truncated) + 2 * int(two.truncated),
        "occlusion": int(one.occluded) + 2 * int(two.occluded),
    }


def _box_area_px2(box: np.ndarray) -> float:
    return float((box[2] - box[0] + 1) * (box[3] - box[1] + 1))


def _write_pascal(folder: Path, preset: _Preset, key: tuple[int, ...], groups: dict) -> None:
    rows = defaultdict(list)
    for (name, split), shots in groups.items():
        subject = OBJECT_CLASSES[name]
        for shot in shots:
            photograph = shot.photograph
            kps = np.where(photograph.visible[:, None], photograph.keypoints_px, np.nan)
            path = folder / "Annotations" / name / f"{shot.path.stem}.mat"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_mat_bytes({"kps": kps, "bbox": photograph.box_px[None].astype("u2")}))
        count = preset.pascal_pairs[_SPLITS.index(split)]
        for src, trg in _choose_pairs(shots, count, _pair_key(key, subject.voc_id, split)):
            names = [f"PF-PASCAL/JPEGImages/{shot.path.name}" for shot in (src, trg)]
            # the training list names each pair as it is and mirrored
            for flip in ((0,), (1,)) if split == "trn" else ((),):
                rows[split].append([*names, subject.voc_id, *flip])
    for split in _SPLITS:
        header = ["source_image", "target_image", "class", *(["flip"] if split == "trn" else [])]
        _write_rows(folder / f"{split}_pairs.csv", [header, *rows[split]])


def _mat_bytes(content: dict[str, np.ndarray]) -> bytes:
    """A MATLAB 5 file whose header text does not tell the time, so that bytes repeat."""
    buffer = io.BytesIO()
    savemat(buffer, content)
    header = f"MATLAB 5.0 MAT-file, {GENERATOR}".encode().ljust(116)
    return header + buffer.getvalue()[len(header) :]


def _write_willow(folder: Path, preset: _Preset, key: tuple[int, ...], groups: dict) -> None:
    header = ["imageA", "imageB"]
    header += [f"{axis}{image}{i}" for image in "AB" for axis in "XY" for i in range(1, 11)]
    rows = []
    share, extra = divmod(preset.willow_pairs, len(groups))
    for index, ((name, split), shots) in enumerate(groups.items()):
        pairs = [(src, trg) for src in shots for trg in shots if src is not trg]
        count = min(share + (index < extra), len(pairs))
        class_id = list(_WILLOW).index(name)
        rng = np.random.default_rng(np.random.SeedSequence(_pair_key(key, class_id, split)))
        for chosen in np.sort(rng.choice(len(pairs), count, replace=False)):
            src, trg = pairs[chosen]
            row = [f"PF-dataset/{name}/{shot.path.name}" for shot in (src, trg)]
            for shot in (src, trg):
                row += [f"{value:.6f}" for value in shot.photograph.keypoints_px.T.ravel()]
            rows.append(row)
    _write_rows(folder / "test_pairs.csv", [[*header], *rows])
