"""Own pairs from keypoint annotations in COCO's format (Lin et al., ECCV 2014)."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemf.datasets.index import SLACK_PX, image_header, inside
from nemf.datasets.spair import json_number
from nemf.errors import NemfError, did_you_mean
from nemf.files import write_text
from nemf.pairs import Size
from nemf.photographs import orientation, write_upright
from nemf.reading import read_json

_MOST_DRAWS = 1_000_000  # of pairs that may turn out to share too few keypoints
VISIBLE = 2  # COCO's flag: 0 not labelled, 1 labelled but hidden, 2 visible


@dataclass(frozen=True, eq=False)
class Instance:
    """The main instance of a class in an image. ``points``: (x, y) px by keypoint name, those that
    count as visible; ``box``: xyxy px; ``size``: (height, width) that the annotation claims."""

    image: str
    size: Size
    points: dict[str, tuple[float, float]]
    box: tuple[float, float, float, float]
    rank: tuple[float, ...]


@dataclass(frozen=True)
class Written:
    """What :func:`pairs_from_coco` wrote: pairs by class, images copied, and why a class or an
    instance is not among them, with how many it concerns."""

    pairs: dict[str, int]
    images: int
    left_out: dict[str, int]


def pairs_from_coco(
    annotations: Path,
    images: Path,
    out: Path,
    *,
    categories: Sequence[str] = (),
    pairs: int = 100,
    common: int = 3,
    visibility: int = VISIBLE,
    seed: int = 0,
) -> Written:
    """Writes a folder of pairs (see :class:`nemf.datasets.folder.FolderOfPairs`) into ``out``.

    Per class of ``annotations`` (all that have keypoints, or those named) up to ``pairs`` pairs of
    images, drawn by ``seed`` alone whatever the file's order. Each image counts with one instance:
    of those that are no crowd the one with the most keypoints whose visibility flag is at least
    ``visibility``, then the largest. A pair holds the keypoints visible in both images, at least
    ``common``. Coordinates are taken as they are; the images used are copied into ``out/images``,
    upright where the annotation has the size of the turned photograph.

    NemfError for a file that is no such annotation (naming the entry), an image that is missing or
    of another size, a class that is not there, no pair at all, or an ``out`` that is not empty.
    """
    for value, name in ((pairs, "pairs"), (common, "common")):
        if value < 1:
            raise NemfError(f"{name} must be at least 1, not {value}")
    if visibility not in (1, 2):
        raise NemfError(f"visibility must be 1 (hidden ones too) or 2, not {visibility}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise NemfError(f"{out}: is there and not empty; give a new folder")
    left_out: dict[str, int] = {}
    by_class = _main_instances(annotations, categories, common, visibility, left_out)
    drawn = {
        category: list(_draw(instances, pairs, common, f"{seed} {category}"))
        for category, instances in sorted(by_class.items())
    }
    entries = [
        _entry(category, k, *pair)
        for category, chosen in drawn.items()
        for k, pair in enumerate(chosen, 1)
    ]
    if not entries:
        lesser = "" if visibility == 1 else "; --visibility 1 counts hidden keypoints too"
        raise NemfError(
            f"{annotations}: no two images show {common} common keypoints of one class "
            f"(--common asks for fewer{lesser})"
        )
    used = {one.image: one.size for chosen in drawn.values() for pair in chosen for one in pair}
    sources = {name: _source(images, name, size, annotations) for name, size in used.items()}
    for name, (path, turned) in sorted(sources.items()):
        _copy(path, out / "images" / _copied_name(name, turned), turned)
    for entry in entries:
        for side in ("src", "trg"):
            name = entry[side]
            entry[side] = f"images/{_copied_name(name, sources[name][1])}"
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    write_text(out / "pairs.json", f"[\n{lines}\n]\n")  # last: without it the folder is no dataset
    counts = {category: len(chosen) for category, chosen in drawn.items() if chosen}
    for category, chosen in drawn.items():
        if not chosen:
            left_out[f"class {category} without a pair"] = 1
    return Written(counts, len(used), left_out)


def _main_instances(
    file: Path,
    wanted: Sequence[str],
    common: int,
    visibility: int,
    left_out: dict[str, int],
) -> dict[str, list[Instance]]:
    """The main instance of each image by class, images in the order of their names."""
    content = read_json(file)
    if not isinstance(content, dict):
        raise NemfError(f"{file}: is no COCO annotation (an object with images and annotations)")
    names = _keypoint_names(file, content, wanted)
    images = {}
    for number, image in enumerate(_listed(file, content, "images")):
        try:
            size = (_whole(image["height"]), _whole(image["width"]))
            images[image["id"]] = (str(image["file_name"]), size)
        except (KeyError, TypeError, ValueError, OverflowError):
            raise NemfError(
                f"{file}: images entry {number + 1} lacks id, file_name, width or height"
            ) from None
    best: dict[str, dict[str, Instance]] = {}

    def leave_out(why: str) -> None:
        left_out[why] = left_out.get(why, 0) + 1

    for number, annotation in enumerate(_listed(file, content, "annotations")):
        where = f"{file}: annotations entry {number + 1}"
        if not isinstance(annotation, dict) or not all(
            isinstance(annotation.get(key), int | str | None) for key in ("category_id", "image_id")
        ):
            raise NemfError(f"{where} is no object with a category_id and an image_id")
        category = annotation.get("category_id")
        if category not in names or not annotation.get("keypoints"):
            continue
        if annotation.get("iscrowd"):
            leave_out("instances that are crowds")
            continue
        if annotation.get("image_id") not in images:
            raise NemfError(f"{where}: its image {annotation.get('image_id')!r} is not listed")
        title, points = names[category]
        image, size = images[annotation["image_id"]]
        instance = _instance(where, annotation, points, image, size, visibility)
        if len(instance.points) < common:
            leave_out(f"instances with fewer than {common} visible keypoints")
            continue
        held = best.setdefault(title, {})
        if image not in held or instance.rank > held[image].rank:
            held[image] = instance
    return {title: [held[name] for name in sorted(held)] for title, held in best.items()}


def _keypoint_names(
    file: Path, content: dict[str, Any], wanted: Sequence[str]
) -> dict[Any, tuple[str, list[str]]]:
    """Name and keypoint names of each class that has any (and is wanted), by category id."""
    found = {}
    for number, category in enumerate(_listed(file, content, "categories")):
        try:
            title, points = str(category["name"]), category.get("keypoints") or []
            found[category["id"]] = (title, [str(point) for point in points])
        except (KeyError, TypeError, AttributeError):
            raise NemfError(f"{file}: categories entry {number + 1} lacks id or name") from None
    with_points = {key: entry for key, entry in found.items() if entry[1]}
    titles = [title for title, _ in with_points.values()]
    for name in wanted:
        if name not in titles:
            known = ", ".join(titles) or "none"
            raise NemfError(
                f"{file}: has no class {name!r} with keypoints{did_you_mean(name, titles)}: it has "
                f"{known}"
            )
    if not with_points:
        raise NemfError(f"{file}: none of its categories names keypoints")
    return {k: entry for k, entry in with_points.items() if not wanted or entry[0] in wanted}


def _instance(
    where: str,
    annotation: dict[str, Any],
    names: list[str],
    image: str,
    size: Size,
    visibility: int,
) -> Instance:
    try:
        flat = [json_number(v) for v in annotation["keypoints"]]
        x, y, width, height = (json_number(v) for v in annotation["bbox"])
    except (KeyError, TypeError, ValueError, OverflowError):
        raise NemfError(
            f"{where} needs keypoints (numbers) and bbox (x, y, width, height)"
        ) from None
    if len(flat) != 3 * len(names) or not all(map(math.isfinite, [*flat, x, y, width, height])):
        raise NemfError(
            f"{where} needs {len(names)} keypoints as x, y, visibility and a finite bbox"
        )
    points = {
        name: (flat[3 * k], flat[3 * k + 1])
        for k, name in enumerate(names)
        if flat[3 * k + 2] >= visibility
    }
    for name, (u, v) in points.items():
        if not (-SLACK_PX <= u <= size[1] and -SLACK_PX <= v <= size[0]):
            raise NemfError(f"{where}: {name} at ({u:g}, {v:g}) lies outside {image}")
    if points and (width <= 0 or height <= 0):
        raise NemfError(f"{where}: its bbox is empty")
    rank = (len(points), width * height, -x, -y)
    return Instance(image, size, points, (x, y, x + width, y + height), rank)


def _whole(value: Any) -> int:
    """A whole number of a JSON file. TypeError, ValueError or OverflowError for anything else."""
    if json_number(value) % 1:
        raise ValueError(f"{value!r} is not whole")
    return int(value)


def _draw(
    instances: list[Instance], wanted: int, common: int, seed: str
) -> Iterator[tuple[Instance, Instance]]:
    """Pairs with enough common keypoints, without replacement, in random order and direction."""
    n = len(instances)
    total = n * (n - 1) // 2
    source = random.Random(seed)
    found = 0
    for number in itertools.islice(_shuffled(total, source), max(_MOST_DRAWS, 1000 * wanted)):
        j = (1 + math.isqrt(1 + 8 * number)) // 2  # the number-th pair i < j, counted by rows
        i = number - j * (j - 1) // 2
        pair = (instances[i], instances[j])
        turned = source.random() < 0.5
        if len(pair[0].points.keys() & pair[1].points.keys()) >= common:
            yield pair[::-1] if turned else pair  # type: ignore[misc]
            found += 1
            if found == wanted:
                return


def _shuffled(total: int, source: random.Random) -> Iterator[int]:
    """The numbers below ``total`` in random order, without a list of them: a lazy Fisher-Yates."""
    moved: dict[int, int] = {}
    for last in range(total - 1, -1, -1):
        k = source.randrange(last + 1)
        yield moved.get(k, k)
        moved[k] = moved.pop(last, last)


def _entry(category: str, number: int, a: Instance, b: Instance) -> dict[str, Any]:
    shared = [name for name in a.points if name in b.points]
    return {
        "id": f"{category}-{number:05d}",
        "category": category,
        "src": a.image,
        "trg": b.image,
        "src_kps": [list(a.points[name]) for name in shared],
        "trg_kps": [list(b.points[name]) for name in shared],
        "kp_names": shared,
        "src_bbox": list(a.box),
        "trg_bbox": list(b.box),
    }


def _source(images: Path, name: str, size: Size, annotations: Path) -> tuple[Path, bool]:
    """The file of an image and whether its annotation refers to the photograph turned upright."""
    path = inside(images, name, str(annotations))
    if not os.path.isfile(path):  # a name may be too long for pathlib
        raise NemfError(f"{path}: the image is missing (named by {annotations})")
    stored, turn = image_header(path)[0], orientation(path)
    if stored == size:
        return path, False
    if turn >= 5 and stored == size[::-1]:
        return path, True
    raise NemfError(
        f"{path}: is {stored[1]}x{stored[0]}, but {annotations} was made for {size[1]}x{size[0]}"
    )


def _copied_name(name: str, turned: bool) -> str:
    jpeg = name.lower().endswith((".jpg", ".jpeg"))
    return name if jpeg or not turned else f"{name}.png"


def _copy(path: Path, copy: Path, turned: bool) -> None:
    if turned:
        write_upright(path, copy)
        return
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    except OSError as problem:
        reason = problem.strerror or os.fspath(copy)
        raise NemfError(f"{copy}: cannot be written ({reason})") from None


def _listed(file: Path, content: dict[str, Any], key: str) -> list[Any]:
    listed = content.get(key)
    if not isinstance(listed, list):
        raise NemfError(f"{file}: is no COCO annotation: {key!r} is not a list")
    return listed
