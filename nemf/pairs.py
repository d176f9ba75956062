"""What travels between the datasets, the matchers and the scores: images, pairs, plans, matches.

Conventions (whole project): points are (x, y), float32, in pixels of the *original* image; the
centre of the top-left pixel is (0, 0). Boxes are xyxy pixels. Images are RGB uint8 (H, W, 3).
Sizes are (height, width). This module imports no torch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from nemf.errors import NemfError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

Size = tuple[int, int]
Layout = Literal["spair", "pfpascal", "pfwillow"]
FLAGS = ("viewpoint", "scale", "truncation", "occlusion")


@dataclass(frozen=True)
class Plan:
    """How predictions of a protocol are made; everything else of a protocol is a scoring rule.

    ``direction``: which image carries the queries. ``canvas``: ``"own"`` encodes each image as it
    is; ``"pair"`` zero-pads both images of a pair (right and bottom) to their common size first, as
    the official NeMF code does on the PF datasets. SPair layouts are never padded.
    """

    direction: Literal["src2trg", "trg2src"]
    canvas: Literal["own", "pair"] = "own"

    def __str__(self) -> str:
        return f"{self.direction}-{self.canvas}"

    @classmethod
    def parse(cls, text: str) -> Plan:
        direction, _, canvas = text.partition("-")
        if direction not in ("src2trg", "trg2src") or canvas not in ("own", "pair"):
            raise ValueError(f"{text!r} is not a plan: expected e.g. 'src2trg-own'")
        return cls(direction, canvas)  # type: ignore[arg-type]

    def for_layout(self, layout: Layout) -> Plan:
        """The plan as it applies to a dataset of that layout (SPair layouts are never padded)."""
        return Plan(self.direction, "own") if layout == "spair" else self


@dataclass(frozen=True, eq=False)
class Image:
    """One decoded image as a matcher sees it.

    ``pixels`` uint8 (H, W, 3) RGB at original size; ``hash`` hex SHA-256 of the image's content;
    ``canvas`` (height, width) at least the image's size: the frame that is encoded, the image in
    its top-left corner and zeros elsewhere (so coordinates do not change); ``category`` for
    matchers that need it (tables then mark them "oracle class").
    """

    pixels: np.ndarray
    hash: str
    canvas: Size
    category: str | None = None

    def __post_init__(self) -> None:
        check_pixels(self.pixels)
        if self.canvas[0] < self.size[0] or self.canvas[1] < self.size[1]:
            raise ValueError(f"canvas {self.canvas} is smaller than the image {self.size}")

    @classmethod
    def from_pixels(cls, pixels: np.ndarray, category: str | None = None) -> Image:
        """An image on its own canvas, hashed by its pixels."""
        check_pixels(pixels)
        digest = hashlib.sha256(
            repr(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()
        )
        return cls(pixels, digest.hexdigest(), pixels.shape[:2], category)

    @property
    def size(self) -> Size:
        """(height, width) of the image itself, without padding."""
        return self.pixels.shape[0], self.pixels.shape[1]

    def on_canvas(self) -> np.ndarray:
        """uint8 (Hc, Wc, 3): the image zero-padded right and bottom to its canvas."""
        if self.canvas == self.size:
            return self.pixels
        padded = np.zeros((*self.canvas, 3), np.uint8)
        padded[: self.size[0], : self.size[1]] = self.pixels
        return padded


def check_pixels(pixels: np.ndarray) -> None:
    """Raises ValueError unless ``pixels`` is uint8 (H, W, 3) with H, W >= 1."""
    shape = getattr(pixels, "shape", None)
    if getattr(pixels, "dtype", None) != np.uint8 or shape is None or len(shape) != 3:
        kind = getattr(pixels, "dtype", type(pixels).__name__)
        raise ValueError(f"an image must be uint8 (H, W, 3), not {kind} {shape}")
    if shape[2] != 3 or shape[0] < 1 or shape[1] < 1:
        raise ValueError(f"an image must be (H, W, 3) with H, W >= 1, not {shape}")


@dataclass(frozen=True, eq=False)
class ImageRecord:
    """An image of a dataset as its index knows it (not decoded).

    ``kps`` float32 (K, 2): every annotated keypoint of the image, whichever pair uses it, named by
    ``kp_names`` (K). ``hash``: hex SHA-256 of the file's bytes. ``mirrored``: the file is read
    left-right mirrored (then size, keypoints and hash are those of the mirrored image).
    """

    path: Path
    name: str
    hash: str
    size: Size
    kps: np.ndarray
    kp_names: tuple[str, ...]
    mirrored: bool = False


@dataclass(frozen=True, eq=False)
class Pair:
    """One annotated pair. ``src_kps``/``trg_kps`` float32 (N, 2) hold the keypoints that both
    images show, N >= 1, named by ``kp_names``. Boxes are float32 (4,) xyxy or None where the
    layout annotates none. ``flags``: SPair's difficulty flags, -1 where not annotated."""

    id: str
    category: str
    src: ImageRecord
    trg: ImageRecord
    src_kps: np.ndarray
    trg_kps: np.ndarray
    kp_names: tuple[str, ...]
    src_bbox: np.ndarray | None = None
    trg_bbox: np.ndarray | None = None
    flags: dict[str, int] = field(default_factory=dict)

    def oriented(self, plan: Plan) -> OrientedPair:
        """The pair with its query side chosen by the plan."""
        forward = plan.direction == "src2trg"
        return OrientedPair(self, plan, forward)


@dataclass(frozen=True, eq=False)
class OrientedPair:
    """A pair seen in the direction of a plan: ``query`` image and points, ``reference`` image and
    the truth there. The truth is for the prediction file; a matcher never receives this object."""

    pair: Pair
    plan: Plan
    forward: bool

    @property
    def query(self) -> ImageRecord:
        return self.pair.src if self.forward else self.pair.trg

    @property
    def reference(self) -> ImageRecord:
        return self.pair.trg if self.forward else self.pair.src

    @property
    def query_kps(self) -> np.ndarray:
        return self.pair.src_kps if self.forward else self.pair.trg_kps

    @property
    def reference_kps(self) -> np.ndarray:
        return self.pair.trg_kps if self.forward else self.pair.src_kps

    @property
    def query_bbox(self) -> np.ndarray | None:
        return self.pair.src_bbox if self.forward else self.pair.trg_bbox

    @property
    def reference_bbox(self) -> np.ndarray | None:
        return self.pair.trg_bbox if self.forward else self.pair.src_bbox

    @cached_property
    def canvases(self) -> tuple[Size, Size]:
        """Canvas (height, width) of the query image and of the reference image."""
        q, r = self.query.size, self.reference.size
        if self.plan.canvas == "own":
            return q, r
        common = (max(q[0], r[0]), max(q[1], r[1]))
        return common, common


@dataclass(eq=False)
class Matches:
    """A matcher's answer for one pair.

    ``points`` float32 (N, 2), pixels of the original reference image, one row per query, NaN = no
    answer; ``confidence`` (N,) or None; ``flow`` (2, H, W) px on the query image's grid, pointing
    into the reference image, or None.

    ``scene``: what :func:`nemf.match` was asked: query and reference pixels uint8 (H, W, 3) and the
    query points (N, 2) px; None for a matcher's bare answer.
    """

    points: Tensor
    confidence: Tensor | None = None
    flow: Tensor | None = None
    scene: tuple[np.ndarray, np.ndarray, np.ndarray] | None = field(
        default=None, init=False, repr=False
    )

    def plot(self, titles: tuple[str, str] = ("query", "reference")) -> Figure:
        """Both images with the numbered points and their answers, as a matplotlib figure: shown by
        a notebook, kept by ``.savefig(file)``. NemfError without a ``scene``."""
        from nemf.match_pictures import match_figure

        if self.scene is None:
            raise NemfError(
                "these matches know no images: nemf.match gives some that do; for others call "
                "nemf.match_pictures.match_figure"
            )
        answers = self.points.detach().cpu().numpy()
        return match_figure(*self.scene, {"": answers}, titles)
