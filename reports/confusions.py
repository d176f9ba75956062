"""Predictions that are nearer to another keypoint than to their own: PCK-dagger, left and right.

A threshold of a tenth of a box is generous where keypoints lie close together, and PCK does not say
which keypoint a prediction found instead. Distances are those of the protocol's frame.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath

import numpy as np
import pandas as pd
import pyarrow.compute as pc

from nemf.datasets.index import PairDataset
from nemf.datasets.spair import read_json_object
from nemf.errors import NemfError
from nemf.predictions import Predictions
from nemf.scoring import Protocol, errors_px

# A run of capitals before a capitalised word ("LEye"), a word, other capitals, a number.
_WORDS = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+")
_SWAPPED = {"left": "right", "right": "left", "l": "r", "r": "l"}


def nearer_to_another(
    predictions: Predictions, protocol: Protocol, error_px: np.ndarray
) -> np.ndarray:
    """bool (R,): the prediction is strictly nearer to another annotated keypoint of the reference
    image's object than to its own truth.

    A keypoint that is wrong for that reason too is what PCK-dagger adds to PCK (Aygun & Mac Aodha,
    ECCV 2022, "Demystifying Unsupervised Semantic Correspondence Estimation"). ``error_px``: from
    :func:`reports.records.keypoint_errors` under the same protocol. False where there is no answer.

    NemfError if a reference image's annotated keypoints lack one of the pair's.
    """
    lists = predictions.table["reference_annotated"].combine_chunks()
    counts = pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.int64) // 2
    rows = np.repeat(np.arange(len(counts)), counts)
    annotated = lists.flatten().to_numpy(zero_copy_only=False).reshape(-1, 2)
    known = (annotated == predictions.points("true")[rows]).all(1)
    present = np.bincount(rows, known, len(counts)) > 0
    if not present.all():
        pair = predictions.column("pair")[int(np.argmin(present))]
        raise NemfError(
            f"pair {pair}: the annotated keypoints of its reference image lack one of the pair's"
        )
    distance = _distances(predictions, protocol, rows, annotated)
    return np.minimum.reduceat(distance, np.r_[0, np.cumsum(counts)[:-1]]) < error_px


def mirrored_name(name: str) -> tuple[str, ...] | None:
    """The words of the name with left and right (or l and r) exchanged, lower case; None if it
    holds neither. Words are parted by anything but letters and digits, and by capitals.

    >>> mirrored_name("left_front_paw"), mirrored_name("R_Eye"), mirrored_name("nose")
    (('right', 'front', 'paw'), ('l', 'eye'), None)
    """
    words = _words(name)
    mirrored = tuple(_SWAPPED.get(word, word) for word in words)
    return None if mirrored == words else mirrored


def keypoint_names(predictions: Predictions, dataset: PairDataset | None) -> np.ndarray:
    """The name of each row's keypoint, (R,) of str: the file's own, or, where the file only
    numbers keypoints, ``kps_names`` of the image annotations of ``dataset``.

    NemfError if there are only numbers.
    """
    codes, texts = predictions.codes("kp_name")
    if not all(text.isdigit() for text in texts):
        return np.array(texts, object)[codes]
    if predictions.meta["layout"] != "spair":
        raise NemfError("keypoints are numbered, not named")
    if dataset is None:
        raise NemfError("keypoints are numbered, and without the dataset nothing names them")
    images = predictions.codes("reference_image")
    categories = predictions.codes("category")
    names: dict[tuple[str, str], str] = {}
    seen = pd.DataFrame({"image": images[0], "category": categories[0]}).drop_duplicates()
    for image, category in seen.itertuples(index=False):
        for number, name in _annotated_names(dataset, images[1][image]).items():
            known = names.setdefault((categories[1][category], number), name)
            if known != name:
                raise NemfError(
                    f"keypoint {number} of {categories[1][category]} is {known} in one annotation "
                    f"and {name} in another"
                )
    pairs = zip(categories[0], codes, strict=True)
    keys = [(categories[1][category], texts[code]) for category, code in pairs]
    unnamed = [key for key in keys if key not in names]
    if unnamed:
        category, number = unnamed[0]
        raise NemfError(f"no annotation names keypoint {number} of {category}")
    return np.array([names[key] for key in keys], object)


def left_right(
    predictions: Predictions, protocol: Protocol, error_px: np.ndarray, names: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(has a mirrored counterpart, is confused with it), bool (R,) each.

    The counterpart is the keypoint of the same reference image and class whose name has left and
    right exchanged, at the place where any pair of the file shows it; where the pairs show it at
    two places (two objects of one class in an image) there is none. Confused: the prediction is
    strictly nearer to the counterpart than to the truth; no answer is no confusion.

    NemfError if no keypoint of the file has a counterpart.
    """
    mirrored = {name: mirrored_name(name) for name in dict.fromkeys(names)}
    if not any(mirrored.values()):
        raise NemfError("no keypoint's name says left or right")
    words = {name: "\0".join(_words(name)) for name in mirrored}
    wanted = ["\0".join(mirrored[name] or ("",)) for name in names]
    category = predictions.codes("category")[0]
    hashes = {s: predictions.column(f"{s}_hash") for s in ("query", "reference")}
    shown = pd.concat(
        pd.DataFrame({"image": hashes[side], "category": category, "name": names})
        .assign(name=lambda frame: frame["name"].map(words))
        .assign(x=predictions.points(what)[:, 0], y=predictions.points(what)[:, 1])
        for side, what in (("query", "query"), ("reference", "true"))
    ).drop_duplicates()
    keys = ["image", "category", "name"]
    places = shown[~shown.duplicated(keys, keep=False)].set_index(keys)
    asked = pd.MultiIndex.from_arrays([hashes["reference"], category, wanted])
    counterpart = places.reindex(asked).to_numpy(np.float32)
    there = ~np.isnan(counterpart).any(1)
    if not there.any():
        raise NemfError("no reference image shows both a keypoint and its mirrored one")
    rows = np.arange(len(counterpart))
    return there, _distances(predictions, protocol, rows, counterpart) < error_px


def _distances(
    predictions: Predictions, protocol: Protocol, rows: np.ndarray, points: np.ndarray
) -> np.ndarray:
    """float32: distance of the predictions of ``rows`` to as many points (px of the reference
    image), in the protocol's frame; +inf without an answer or a point."""
    heights, widths = (predictions.column(f"reference_{v}") for v in ("height", "width"))
    factors = protocol.frame.factors(heights, widths)
    return errors_px(predictions.points("pred")[rows], points, factors[rows])


def _words(name: str) -> tuple[str, ...]:
    return tuple(word.lower() for word in _WORDS.findall(name))


def _annotated_names(dataset: PairDataset, image: str) -> dict[str, str]:
    """Name by number of an image's keypoints, from its annotation file."""
    file = dataset.folder / "ImageAnnotation" / PurePosixPath(image).with_suffix(".json")
    content = read_json_object(file) if file.is_file() else {}
    numbers, names = content.get("kps"), content.get("kps_names")
    if not isinstance(names, list) or not isinstance(numbers, dict) or len(names) != len(numbers):
        raise NemfError("keypoints are numbered, and the image annotations do not name them")
    return {str(number): str(name) for number, name in zip(numbers, names, strict=True)}
