"""PCK and the protocols under which the field reports it. Torch-free.

"PCK@0.1" names several different quantities. A :class:`Protocol` is a named, versioned object that
says which one: a plan (how predictions are made) plus a rule (how they are scored). A change that
alters a score bumps the version.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from nemf.errors import NemfError, did_you_mean
from nemf.geometry import fit_ratio
from nemf.pairs import Layout, Plan

Averaging = Literal["image", "point"]
Base = Literal["bbox", "image", "kps_extent", "kps_extent_padded", "kps_extent_padded_2"]
PADDING: dict[Base, int] = {"kps_extent_padded": -1, "kps_extent_padded_2": -2}
DEFAULT_ALPHAS = (0.01, 0.03, 0.05, 0.07, 0.10, 0.15)


@dataclass(frozen=True)
class Frame:
    """The coordinate frame in which errors and thresholds are measured.

    ``original``: pixels of the original image. ``squash``: the image resized to ``side`` x ``side``
    (``side`` wide and ``height`` high, if that is given) without keeping its aspect ratio, points
    scaled per axis (x * side / W). ``fit``: the image shrunk so that its longer side is at most
    ``side``, points scaled by that one ratio. ``scale``: the image shrunk or enlarged so that its
    longer side is ``side``, points likewise.
    """

    kind: Literal["original", "squash", "fit", "scale"]
    side: int = 0
    height: int | None = None

    def __str__(self) -> str:
        if self.kind == "original":
            return "original pixels"
        if self.kind == "squash" and self.height:
            return f"squashed to {self.side} wide, {self.height} high"
        if self.kind == "squash":
            return f"squashed to {self.side}x{self.side}"
        return f"longer side {'<= ' if self.kind == 'fit' else ''}{self.side}"

    def factors(self, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
        """float32 (R, 2): what x and y of images of these sizes (R,) are multiplied by."""
        if self.kind == "original":
            return np.ones((len(heights), 2), np.float32)
        if self.kind == "squash":
            height = self.height or self.side
            return np.stack([self.side / widths, height / heights], 1).astype(np.float32)
        if self.kind == "scale":
            ratios = (self.side / np.maximum(heights, widths)).astype(np.float32)
            return np.stack([ratios, ratios], 1)
        sizes = zip(heights.tolist(), widths.tolist(), strict=True)
        ratios = np.array([fit_ratio(size, self.side) for size in sizes], np.float32)
        return np.stack([ratios, ratios], 1)


@dataclass(frozen=True)
class Protocol:
    """A named, versioned way to obtain one PCK.

    ``bases`` gives, per benchmark layout, the length that alpha multiplies; it is always measured
    on the reference image (the one predicted into), in ``frame``:

    - ``bbox``: longer side of the annotated box, x2 - x1 or y2 - y1 (no +1);
    - ``image``: longer side of the image (unpadded);
    - ``kps_extent``: longer side of the extent of the pair's keypoints there;
    - ``kps_extent_padded``: the same over an array padded with (-1, -1), as several official
      codes compute it on PF-WILLOW by accident: max(max x, max y) + 1, larger than the object;
    - ``kps_extent_padded_2``: the same over an array padded with (-2, -2).

    A keypoint is correct if its error <= alpha * length (< if not ``inclusive``), compared in
    float32. ``averaging``: "image" is the mean over pairs of the fraction correct in the pair,
    "point" the fraction over all keypoints.
    """

    name: str
    version: int
    plan: Plan
    frame: Frame
    bases: dict[Layout, Base]
    source: str
    note: str
    inclusive: bool = True
    averaging: Averaging = "image"
    alphas: tuple[float, ...] = DEFAULT_ALPHAS

    @property
    def id(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def threshold_side(self) -> str:
        """ "trg" or "src": the image whose box or size sets the threshold."""
        return "trg" if self.plan.direction == "src2trg" else "src"

    def describe(self, layout: Layout) -> str:
        """One line for table footnotes."""
        sign = "≤" if self.inclusive else "<"
        arrow = self.plan.direction.replace("2", "→")
        canvas = (
            ", padded to the pair's size" if self.plan.for_layout(layout).canvas != "own" else ""
        )
        base = self.bases[layout].replace("_", " ")
        return (
            f"{self.id}: {arrow}{canvas}; error {sign} alpha x {self.threshold_side} {base}; "
            f"{self.frame}; per-{self.averaging} mean"
        )


def _protocols() -> dict[str, Protocol]:
    proper: dict[Layout, Base] = {"spair": "bbox", "pfpascal": "image", "pfwillow": "kps_extent"}
    padded: dict[Layout, Base] = proper | {"pfwillow": "kps_extent_padded"}
    items = [
        Protocol(
            "canonical",
            1,
            Plan("src2trg"),
            Frame("original"),
            proper,
            "this project",
            "The quantity most papers mean: source keypoints transferred to the target, thresholds "
            "of the target, original pixels.",
        ),
        Protocol(
            "nemf-paper",
            1,
            Plan("trg2src", "pair"),
            Frame("original"),
            proper,
            "Hong et al., NeurIPS 2022, official code",
            "Target keypoints transferred to the source; on PF-PASCAL and PF-WILLOW both images "
            "are zero-padded to a common size first; thresholds of the unpadded source.",
        ),
        Protocol(
            "cats-paper",
            1,
            Plan("trg2src"),
            Frame("squash", 256),
            padded,
            "Cho et al., NeurIPS 2021, official code",
            "Scored in the squashed 256x256 frame; on PF-WILLOW the threshold is taken over the -1 "
            "padding of the keypoint array and is larger than the object.",
        ),
        Protocol(
            "catspp-paper",
            1,
            Plan("trg2src"),
            Frame("squash", 512),
            padded,
            "Cho et al., TPAMI 2022, official code, threshold `bbox`",
            "Scored in the squashed 512x512 frame; on PF-WILLOW the threshold is taken over the -1 "
            "padding of the keypoint array and is larger than the object.",
        ),
        Protocol(
            "catspp-paper-kp",
            1,
            Plan("trg2src"),
            Frame("squash", 512),
            proper,
            "Cho et al., TPAMI 2022, official code, threshold `bbox-kp`",
            "As catspp-paper, but on PF-WILLOW the threshold is that of the keypoints alone.",
        ),
        Protocol(
            "hpf-paper",
            1,
            Plan("src2trg"),
            Frame("fit", 300),
            proper,
            "Min et al., ICCV 2019, official code",
            "Scored after shrinking each image to longer side <= 300 (isotropic, so up to rounding "
            "equal to canonical).",
        ),
        Protocol(
            "scot-paper",
            1,
            Plan("src2trg"),
            Frame("scale", 300),
            proper,
            "Liu et al., CVPR 2020, official code",
            "As hpf-paper, but smaller images are enlarged to longer side 300 too (up to rounding "
            "equal to canonical).",
        ),
        Protocol(
            "geoaware-paper",
            1,
            Plan("src2trg"),
            Frame("scale", 840),
            proper,
            "Zhang et al., CVPR 2024, official code",
            "Scored after resizing each image to longer side 840; a keypoint whose error equals "
            "the limit is wrong.",
            inclusive=False,
        ),
        Protocol(
            "ncnet-paper",
            1,
            Plan("trg2src"),
            Frame("squash", 224),
            proper,
            "Rocco et al., NeurIPS 2018, official code",
            "Scored in the squashed 224x224 frame. The code evaluates PF-PASCAL only; the lengths "
            "of the others are the source's usual ones.",
        ),
        Protocol(
            "dhpf-paper",
            1,
            Plan("src2trg"),
            Frame("squash", 240),
            padded,
            "Min et al., ECCV 2020, official code",
            "Scored in the squashed 240x240 frame; on PF-WILLOW the threshold is taken over the -1 "
            "padding of the keypoint array and is larger than the object.",
        ),
        Protocol(
            "chm-paper",
            1,
            Plan("src2trg"),
            Frame("squash", 240),
            proper | {"pfwillow": "kps_extent_padded_2"},
            "Min and Cho, CVPR 2021, official code",
            "Scored in the squashed 240x240 frame; on PF-WILLOW the threshold is taken over the -2 "
            "padding of the keypoint array and is larger than the object.",
        ),
        Protocol(
            "mmnet-paper",
            1,
            Plan("src2trg"),
            Frame("squash", 320, 224),
            proper,
            "Zhao et al., ICCV 2021, official code",
            "Scored in the frame squashed to 320 wide, 224 high. The code evaluates SPair-71k and "
            "PF-PASCAL only; the length of PF-WILLOW is the target's usual one.",
        ),
    ]
    return {p.id: p for p in items}


PROTOCOLS: dict[str, Protocol] = _protocols()


def get_protocol(name: str) -> Protocol:
    """A protocol by id (``canonical@1``) or bare name if that is unambiguous; NemfError else."""
    matching = [p for p in PROTOCOLS.values() if name in (p.id, p.name)]
    if len(matching) != 1:
        raise NemfError(
            f"unknown protocol {name!r}{did_you_mean(name, PROTOCOLS)}: choose one of "
            f"{', '.join(sorted(PROTOCOLS))}"
        )
    return matching[0]


def correct(
    error_px: np.ndarray, threshold_px: np.ndarray, alpha: float, *, inclusive: bool = True
) -> np.ndarray:
    """Boolean array: error <= alpha * threshold (< if not inclusive), in float32.

    float32 because the official codes compare there: borderline keypoints fall as theirs do.
    Invalid keypoints (NaN threshold) come out False; mask them with ``isfinite(threshold_px)``.
    """
    error = np.asarray(error_px, np.float32)
    limit = np.float32(alpha) * np.asarray(threshold_px, np.float32)
    near = error <= limit if inclusive else error < limit
    return near & np.isfinite(error)  # no answer is wrong at any alpha


def pck(
    error_px: np.ndarray,
    threshold_px: np.ndarray,
    alpha: float,
    by: Averaging = "image",
    *,
    inclusive: bool = True,
) -> float:
    """Percentage of correct keypoints, as a fraction in [0, 1].

    ``error_px``, ``threshold_px``: (N,) one pair or (P, N) pairs, pixels of one frame, compared in
    float32. A NaN threshold means "no keypoint there"; an infinite error "no answer" (wrong).
    ``by="image"``: mean over pairs of the pair's fraction; ``"point"``: fraction over all points.

    >>> pck(np.array([[1.0, 3.0], [2.0, 9.0]]), np.array([[10.0, 10.0], [20.0, np.nan]]), 0.2)
    0.75

    Raises NemfError for shapes that differ, a NaN error with a finite threshold, a negative error,
    a threshold that is infinite or not positive, alpha that is not positive, or a pair without
    keypoints.
    """
    error = np.atleast_2d(np.asarray(error_px, np.float32))
    threshold = np.atleast_2d(np.asarray(threshold_px, np.float32))
    if error.shape != threshold.shape or error.ndim != 2:
        raise NemfError(
            f"error_px {np.shape(error_px)} and threshold_px {np.shape(threshold_px)} must have "
            "one shape, (N,) or (P, N)"
        )
    check_alphas([alpha])
    if by not in ("image", "point"):
        raise NemfError(f"by must be 'image' or 'point', not {by!r}")
    valid = ~np.isnan(threshold)
    check_errors(error[valid], threshold[valid])
    if not valid.any(1).all() or not len(valid):
        raise NemfError(f"pair {int(np.argmin(valid.any(1))) if len(valid) else 0} has no keypoint")
    hits = correct(error, threshold, alpha, inclusive=inclusive) & valid
    if by == "point":
        return float(hits.sum() / valid.sum())
    return float((hits.sum(1) / valid.sum(1)).mean())


def check_alphas(alphas: Sequence[float]) -> tuple[float, ...]:
    """The alphas as floats; NemfError if there is none or one is not a positive finite number."""
    try:
        values = tuple(float(a) for a in alphas)
    except (TypeError, ValueError, OverflowError):
        raise NemfError(f"alphas must be numbers, not {alphas!r}") from None
    for value in values:
        if not (np.isfinite(value) and value > 0):
            raise NemfError(f"alpha must be a positive number, not {value}")
    if not values:
        raise NemfError("give at least one alpha")
    return values


def check_errors(error_px: np.ndarray, threshold_px: np.ndarray) -> None:
    """NemfError if an error is NaN or negative, or a threshold not positive and finite."""
    if np.isnan(error_px).any():
        raise NemfError(f"error_px is NaN at valid keypoint {int(np.argmax(np.isnan(error_px)))}")
    if (error_px < 0).any():
        raise NemfError(f"error_px is negative: {float(error_px.min())}")
    bad = ~(np.isfinite(threshold_px) & (threshold_px > 0))
    if bad.any():
        raise NemfError(f"a threshold must be positive and finite, not {threshold_px[bad][0]}")


def errors_px(pred: np.ndarray, true: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """float32 (R,): distance of prediction and truth, both float32 (R, 2) original pixels, in the
    frame that ``factors`` (R, 2) leads to. A NaN prediction (no answer) gives +inf."""
    pred, true = np.asarray(pred, np.float32), np.asarray(true, np.float32)
    delta = pred * factors - true * factors
    error = np.sqrt(np.square(delta).sum(1, dtype=np.float32), dtype=np.float32)
    return np.where(np.isnan(error), np.float32(np.inf), error)


def lengths_px(
    base: Base,
    *,
    factors: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    bbox: np.ndarray,
    true: np.ndarray,
    pair: np.ndarray,
) -> np.ndarray:
    """float32 (R,): the length that alpha multiplies, per keypoint row, in the scoring frame.

    All arrays have one row per keypoint and describe the reference image: ``factors`` (R, 2) of the
    frame, ``heights``/``widths`` (R,) px, ``bbox`` (R, 4) xyxy px (NaN where none is annotated),
    ``true`` (R, 2) px keypoints, ``pair`` (R,) non-decreasing codes of the pair.

    Raises NemfError where a box is needed and missing.
    """
    if base == "bbox":
        box = np.asarray(bbox, np.float32)
        if np.isnan(box).any():
            row = int(np.argmax(np.isnan(box).any(1)))
            raise NemfError(f"pair number {int(pair[row])} has no box, which this protocol needs")
        sides = box[:, 2:] * factors - box[:, :2] * factors
        return sides.max(1)
    if base == "image":
        return np.maximum(widths * factors[:, 0], heights * factors[:, 1]).astype(np.float32)
    points = np.asarray(true, np.float32) * factors
    first = np.flatnonzero(np.r_[True, pair[1:] != pair[:-1]])
    low = np.minimum.reduceat(points, first)
    high = np.maximum.reduceat(points, first)
    if base in PADDING:
        low = np.minimum(low, np.float32(PADDING[base]))
        high = np.maximum(high, np.float32(PADDING[base]))
    counts = np.diff(np.r_[first, len(points)])
    return np.repeat((high - low).max(1), counts)


def available_protocols() -> dict[str, Protocol]:
    """Every protocol by id."""
    return dict(PROTOCOLS)
