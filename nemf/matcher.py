"""The one interface of every method, and the one-call API on top of it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import PIL.Image
import torch
from mmengine.model import BaseModel
from torch import Tensor

from nemf.cards import MatcherCard
from nemf.errors import NemfError
from nemf.pairs import Image, Matches
from nemf.supervision import PairBatch

log = logging.getLogger(__name__)

Role = Literal["query", "reference"]
Features = Any  # what encode returns per image; only the same matcher's match reads it
SLACK_PX = 1.0  # a point may lie that far outside: some count pixels from 1


class Matcher(BaseModel):
    """Answers one question: where are these points of the query image in the reference image?

    A subclass sets ``card`` and implements :meth:`encode` and :meth:`match`, or, where images and
    pairs are taken one by one, :meth:`encode_one` and :meth:`match_one`; trainable ones also
    :meth:`loss`. Contract (held by the tests over everything registered):

    - ``encode`` depends on one image, its canvas and, if ``uses_role``, the role; it may be cached;
    - ``match`` never sees the truth, answers every query (NaN = no answer), in float32 pixels of
      the original reference image; a batch equals its pairs taken one by one;
    - inputs are never changed in place; gradients are enabled locally where they are needed.
    """

    card: ClassVar[MatcherCard]
    uses_role: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__(data_preprocessor=None)

    @property
    def weights_hash(self) -> str:
        """What identifies the weights: :func:`hash_of_state` of those that answers depend on."""
        return hash_of_state(self.state_dict())

    @property
    def random_weights(self) -> bool:
        """True if any part runs on random weights (``init: random``); tables say so."""
        return any(getattr(m, "is_random", False) for m in self.modules() if m is not self)

    @property
    def device(self) -> torch.device:
        tensor = next(self.parameters(), next(self.buffers(), None))
        return torch.device("cpu") if tensor is None else tensor.device

    @property
    def couples_pairs(self) -> bool:
        """True if an answer depends on the pairs before it (an official random stream): such a run
        cannot be resumed half-way, only started again."""
        return False

    @torch.no_grad()
    def encode(self, images: Sequence[Image], role: Role) -> list[Features]:
        """Features of each image on its canvas. ``role`` matters only if ``uses_role``. NemfError
        naming an image whose features are not finite, where a matcher checks that."""
        return [self.encode_one(image, role) for image in images]

    def encode_one(self, image: Image, role: Role) -> Features:
        """:meth:`encode` of one image."""
        raise NotImplementedError

    @torch.no_grad()
    def match(
        self, queries: Sequence[Features], references: Sequence[Features], points: Sequence[Tensor]
    ) -> list[Matches]:
        """One answer per pair. Lists run over pairs; ``points[i]`` float32 (N_i, 2) px of the
        original query image i. Raises ValueError if the lists differ in length."""
        triples = zip(queries, references, points, strict=True)
        return [self.match_one(*triple) for triple in triples]

    def match_one(self, query: Features, reference: Features, points: Tensor) -> Matches:
        """:meth:`match` of one pair."""
        raise NotImplementedError

    def loss(
        self, batch: PairBatch, counts: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Training losses by name: sums over what supervises them, divided by ``counts``, how much
        of that a whole batch has (by default :meth:`supervised` of this one). So the losses of a
        batch's parts, given the whole's counts, add up to the whole's."""
        raise NotImplementedError(f"{type(self).__name__} is not trainable")

    def supervised(self, batch: PairBatch) -> dict[str, Tensor]:
        """How many keypoints or cells supervise each loss, from the annotation alone."""
        raise NotImplementedError(f"{type(self).__name__} is not trainable")

    def forward(self, batch: Any, mode: str = "tensor") -> Any:
        """MMEngine's entry: only ``mode="loss"`` computes something here; prediction goes through
        :meth:`encode` and :meth:`match`, so that images are encoded once."""
        if mode == "loss":
            return self.loss(batch)
        raise NemfError(f"{type(self).__name__}.forward has no mode {mode!r}; use encode and match")


def hash_of_state(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over a state dict's names, shapes and bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        array = value.detach().cpu().contiguous().numpy()
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def build_matcher(name: str, **overrides: Any) -> Matcher:
    """A registered matcher by name, in evaluation mode; keywords are its constructor's.

    ``weights=`` takes this project's checkpoints and the authors' official ones where a matcher
    has any. Raises NemfError for an unknown name or keyword and for unusable weights.
    """
    from nemf.registry import MATCHERS, matcher_class

    cls = matcher_class(name)
    try:
        matcher = MATCHERS.build({"type": cls, **overrides})
    except TypeError as problem:
        if "argument" in str(problem):
            raise NemfError(f"matcher {name!r} ({cls.__name__}): {problem}") from None
        raise
    return matcher.eval()


def match(
    matcher: Matcher,
    query_image: str | Path | PIL.Image.Image | np.ndarray,
    reference_image: str | Path | PIL.Image.Image | np.ndarray,
    points: Any,
) -> Matches:
    """Where ``points`` of the query image lie in the reference image, in one call.

    Images: the path of a photograph, which is turned upright as its EXIF orientation says, like in
    every viewer; or pixels as they are: a PIL image or uint8 (H, W, 3) RGB. ``points``: (N, 2)
    (x, y) px of the query image, N >= 0; one that lies outside it is warned of. Returns Matches
    with float32 (N, 2) px of the reference image; their ``plot()`` draws them. NemfError for an
    unreadable image, points that are not finite (N, 2), or a ``matcher`` that is none.
    """
    if not (hasattr(matcher, "encode") and hasattr(matcher, "match")):
        raise NemfError(
            f"the first argument must be a matcher, as nemf.build_matcher makes them, not "
            f"{type(matcher).__name__}"
        )
    query, reference = _as_image(query_image), _as_image(reference_image)
    array = _as_points(points)
    height, width = query.size
    outside = ((array < -SLACK_PX) | (array > np.array([width, height]) - 1 + SLACK_PX)).any(1)
    if outside.any():
        k = int(np.argmax(outside))
        log.warning(
            "%d of %d points lie outside the query image (%dx%d), the first of them (%g, %g); "
            "points are (x, y)", outside.sum(), len(array), width, height, *array[k],
        )  # fmt: skip
    with torch.no_grad():
        (q,) = matcher.encode([query], "query")
        (r,) = matcher.encode([reference], "reference")
        (answer,) = matcher.match([q], [r], [torch.from_numpy(array).to(matcher.device)])
    answer.scene = (query.pixels, reference.pixels, array.copy())
    return answer


def _as_points(points: Any) -> np.ndarray:
    """float32 (N, 2). NemfError for anything else."""
    try:
        array = np.asarray(points, np.float32)
    except (TypeError, ValueError) as problem:
        raise NemfError(f"points must be numbers of shape (N, 2): {problem}") from None
    if array.size == 0:
        array = array.reshape(0, 2)
    if array.ndim != 2 or array.shape[1] != 2:
        raise NemfError(f"points must be finite and of shape (N, 2), not {array.shape}")
    if not np.isfinite(array).all():
        k = int(np.argmin(np.isfinite(array).all(1)))
        raise NemfError(f"points must be finite, but row {k} is {array[k].tolist()}")
    return array


def _as_image(source: str | Path | PIL.Image.Image | np.ndarray) -> Image:
    if isinstance(source, np.ndarray):
        return Image.from_pixels(source)
    if isinstance(source, PIL.Image.Image):
        from nemf.datasets.index import rgb_pixels

        return Image.from_pixels(rgb_pixels(source, "the image"))
    from nemf.photographs import upright_pixels

    return Image.from_pixels(upright_pixels(Path(source)))
