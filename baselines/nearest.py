"""Nearest neighbour over backbone features: what any method must beat to have learned something."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nemf.backbones import build_backbone, check_ids, last_of_stage, normalise, tap_table
from nemf.cards import MatcherCard
from nemf.errors import NemfError
from nemf.matcher import Matcher, Role
from nemf.pairs import Image, Matches

CARD = MatcherCard(
    name="nearest",
    title="nearest neighbour",
    paper="this project",
    year=None,
    arxiv=None,
    licence_of_original="Apache-2.0",
    backbone="ResNet-101 (any trunk)",
    input_size="256x256",
    training="none",
    official_protocol="canonical@1",
    description="Cosine nearest neighbour over backbone features, one keypoint at a time.",
    weights_at="torchvision's ImageNet files (download.pytorch.org/models)",
)

SOFTMAX_TEMPERATURE = 0.02


@dataclass(frozen=True, eq=False)
class NearestFeatures:
    """``map`` float32 (C, h, w), unit length along C. The cell in row y, column x is centred on
    ``first_px`` + (x, y) * ``step_px``, pixels of the original image, both (x, y)."""

    map: Tensor
    first_px: tuple[float, float]
    step_px: tuple[float, float]


class NearestNeighbour(Matcher):
    """Each query goes to the cell of the reference image whose feature is most similar (cosine).

    ``backbone``, ``weights``, ``init``: see :func:`nemf.backbones.build_backbone`. ``layers``:
    increasing hyperpixel ids, by default the last block of layer3; several are resized to the
    finest (bilinear, align_corners=True), concatenated and normalised together. ``input_size``: the
    canvas is squashed to that square (bilinear, antialiased); None keeps its own size. ``window``:
    odd number of cells; the answer is then the soft-argmax (temperature 0.02) over the window
    around the best cell, which gets below the cell size. ``mutual``: confidence is 1 where the
    answer's best cell in the query image lies within one cell of the query, else 0; the answer
    stays. Without it confidence is the cosine of the best cell.

    A query's feature is read bilinearly between the cell centres and normalised again. Cell i is
    taken to be centred in the middle of its tile, input pixel i * jump + (jump - 1) / 2. The middle
    of its receptive field is i * jump, but training on mirrored images moves what it responds to:
    measured on photographs against their mirror images, ImageNet trunks sit within a fifth of a
    jump of the tile's middle.
    """

    card = CARD

    def __init__(
        self,
        backbone: str = "resnet101",
        layers: Sequence[int] | None = None,
        weights: str | Path | None = None,
        init: Literal["random"] | None = None,
        input_size: int | None = 256,
        mutual: bool = False,
        window: int | None = None,
    ) -> None:
        super().__init__()
        if input_size is not None and input_size < 1:
            raise NemfError(f"input_size must be at least 1 px or None, not {input_size}")
        if window is not None and (window < 1 or window % 2 == 0):
            raise NemfError(f"window must be an odd number of cells or None, not {window}")
        if layers is None:
            layers = [last_of_stage(backbone, 3)]
        self.layers = check_ids(backbone, layers)
        self.jump_px = tap_table(backbone)[self.layers[0]].jump_px
        self.input_size = input_size
        self.mutual = mutual
        self.window = window
        self.backbone = build_backbone(backbone, weights, init, upto=self.layers[-1])

    @property
    def flow_resolution(self) -> str | None:
        """Cells on a side of the square input, as tables print it; None at the image's own size."""
        if self.input_size is None:
            return None
        return str(-(-self.input_size // self.jump_px))

    def encode_one(self, image: Image, role: Role) -> NearestFeatures:
        pixels = normalise(image.on_canvas()).to(self.device)
        height, width = image.canvas
        if self.input_size is not None:
            size = (self.input_size, self.input_size)
            pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
        levels = self.backbone.taps(pixels, self.layers)
        finest = levels[0].shape[2:]
        levels = [F.interpolate(x, finest, mode="bilinear", align_corners=True) for x in levels]
        ratio_x, ratio_y = width / pixels.shape[3], height / pixels.shape[2]
        return NearestFeatures(
            map=F.normalize(torch.cat(levels, 1)[0], dim=0),
            # Pixel edges, not centres, keep their place in a resize: hence the halves.
            first_px=(ratio_x * self.jump_px / 2 - 0.5, ratio_y * self.jump_px / 2 - 0.5),
            step_px=(ratio_x * self.jump_px, ratio_y * self.jump_px),
        )

    def match_one(
        self, query: NearestFeatures, reference: NearestFeatures, points: Tensor
    ) -> Matches:
        query_map, reference_map = query.map.to(self.device), reference.map.to(self.device)
        points = points.to(self.device, torch.float32)
        cells = (points - points.new_tensor(query.first_px)) / points.new_tensor(query.step_px)
        cosine = torch.einsum("nc,chw->nhw", _read(query_map, cells), reference_map)
        best = _argmax(cosine)
        answer = best.float() if self.window is None else self._soft_argmax(cosine, best)
        if self.mutual:
            back = reference_map[:, best[:, 1], best[:, 0]]
            returned = _argmax(torch.einsum("cn,chw->nhw", back, query_map))
            confidence = ((returned - cells).abs() <= 1).all(1).float()
        else:
            confidence = cosine.flatten(1).amax(1)
        first, step = points.new_tensor(reference.first_px), points.new_tensor(reference.step_px)
        return Matches(answer * step + first, confidence)

    def _soft_argmax(self, cosine: Tensor, best: Tensor) -> Tensor:
        """(N, 2) expected cell in the window around ``best``, as far as the map reaches."""
        rows = torch.arange(cosine.shape[1], device=cosine.device)
        cols = torch.arange(cosine.shape[2], device=cosine.device)
        radius = self.window // 2
        near_row = (rows - best[:, 1:]).abs() <= radius
        near_col = (cols - best[:, :1]).abs() <= radius
        outside = ~(near_row[:, :, None] & near_col[:, None, :])
        logits = (cosine / SOFTMAX_TEMPERATURE).masked_fill(outside, float("-inf"))
        weight = logits.flatten(1).softmax(1).view_as(cosine)
        return torch.stack([weight.sum(1) @ cols.float(), weight.sum(2) @ rows.float()], 1)


def _read(features: Tensor, cells: Tensor) -> Tensor:
    """Unit features (N, C) of a map (C, h, w) at fractional ``cells`` (N, 2), bilinear; beyond the
    outermost centres the border's feature."""
    extent = cells.new_tensor([features.shape[2] - 1, features.shape[1] - 1]).clamp_min(1)
    grid = (cells / extent * 2 - 1)[None, None]
    read = F.grid_sample(features[None], grid, padding_mode="border", align_corners=True)
    return F.normalize(read[0, :, 0].T, dim=1)


def _argmax(maps: Tensor) -> Tensor:
    """(N, 2) column and row of the maximum of each of ``maps`` (N, h, w)."""
    index = maps.flatten(1).argmax(1)
    return torch.stack([index % maps.shape[2], index // maps.shape[2]], 1)
