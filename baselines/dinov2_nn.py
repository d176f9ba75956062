"""Nearest neighbour over DINOv2 features, as three public benchmarks measure it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor

from nemf.backbones import normalise
from nemf.cards import MatcherCard
from nemf.dinov2 import PATCH_PX, build_dinov2
from nemf.errors import NemfError
from nemf.matcher import Matcher, Role
from nemf.pairs import Image, Matches

CARD = MatcherCard(
    name="dinov2_nn",
    title="DINOv2 nearest neighbour",
    paper="DINOv2: Learning Robust Visual Features without Supervision (TMLR); read out by others",
    year=2023,
    arxiv="2304.07193",
    licence_of_original="Apache-2.0",
    backbone="ViT-B/14",
    input_size="840x840",
    training="none",
    official_protocol="canonical@1",
    description="Cosine nearest neighbour over DINOv2 patches, read out as SD-DINO, GeoAware-SC or "
    "the Visual-AI benchmark do.",
    weights_at="github.com/facebookresearch/dinov2, or facebook/dinov2-base at huggingface.co",
)

Readout = Literal["sd-dino", "geoaware", "nn", "bilinear", "softmax", "kernelsoftmax"]
LETTERBOXED = ("sd-dino", "geoaware")
SQUASHED = ("nn", "bilinear", "softmax", "kernelsoftmax")
GEOAWARE_RADIUS = 5  # cells
GEOAWARE_TEMPERATURE = 0.02
VISUAL_AI_TEMPERATURE = 0.03
VISUAL_AI_SIGMA = 7  # cells


@dataclass(frozen=True, eq=False)
class DinoFeatures:
    """``map`` float32 (C, n, n), unit length along C. Pixel p of the original image lies at
    ``first_px`` + p * ``factor`` in the network's input, all (x, y)."""

    map: Tensor
    first_px: tuple[float, float]
    factor: tuple[float, float]

    def to_input(self, points: Tensor) -> Tensor:
        return points * points.new_tensor(self.factor) + points.new_tensor(self.first_px)

    def to_image(self, points: Tensor) -> Tensor:
        return (points - points.new_tensor(self.first_px)) / points.new_tensor(self.factor)


class DinoNearest(Matcher):
    """Each query goes where the reference image's DINOv2 patches resemble its own most (cosine).

    ``backbone``, ``weights``, ``init``, ``finetuned_weights``: see
    :func:`nemf.dinov2.build_dinov2`. ``input_size``: side of the network's square input, a multiple
    of 14 px; the published one is 840. ``readout``: whose,

    - "sd-dino" (Zhang et al., NeurIPS 2023) and "geoaware" (Zhang et al., CVPR 2024): the canvas is
      letterboxed, features are taken before the final LayerNorm, a query has the feature of the
      patch it lies on. The answer is the middle of the best patch (half a pixel apart in the two);
      "geoaware" refines it by a soft-argmax over all cosines, of which those more than 5 patches
      from the best are set to 0;
    - "nn", "bilinear", "softmax", "kernelsoftmax" (Visual-AI benchmark, arXiv 2505.18060): the
      canvas is squashed (bilinear, antialiased), features are taken after the final LayerNorm,
      corner pixels, corner patches and corner points coincide, queries are rounded down (as there
      on the PF datasets; those of SPair-71k are whole numbers) and read bilinearly. The answer is
      the best patch; the best patches of the four around the query, mixed like them; the
      soft-argmax; or the soft-argmax of cosines weighted by a Gaussian around the best.

    ``finetuned_weights`` go with the second group. Everything is float32, the benchmark's own
    GPU runs are half precision. Confidence is the cosine of the best patch.
    """

    card = CARD

    def __init__(
        self,
        backbone: str = "dinov2_vitb14",
        readout: Readout = "geoaware",
        weights: str | Path | None = None,
        init: Literal["random"] | None = None,
        finetuned_weights: str | Path | None = None,
        input_size: int = 840,
    ) -> None:
        super().__init__()
        if readout not in LETTERBOXED + SQUASHED:
            known = ", ".join(LETTERBOXED + SQUASHED)
            raise NemfError(f"readout must be one of {known}, not {readout!r}")
        if finetuned_weights is not None and readout not in SQUASHED:
            raise NemfError(f"finetuned_weights go with readout {', '.join(SQUASHED)} only")
        if input_size < 2 * PATCH_PX or input_size % PATCH_PX:
            raise NemfError(
                f"input_size must be a multiple of {PATCH_PX} px, at least two, not {input_size}"
            )
        self.readout = readout
        self.input_size = input_size
        self.backbone = build_dinov2(backbone, weights, init, finetuned_weights=finetuned_weights)

    @property
    def flow_resolution(self) -> str:
        """Patches on a side, as tables print it."""
        return str(self.input_size // PATCH_PX)

    def encode_one(self, image: Image, role: Role) -> DinoFeatures:
        return self._squashed(image) if self.readout in SQUASHED else self._letterboxed(image)

    def _letterboxed(self, image: Image) -> DinoFeatures:
        """The canvas in the middle of a black square, its longer side filling it (Lanczos)."""
        side, longer = self.input_size, max(image.canvas)
        height, width = (max(round(side * s / longer), 1) for s in image.canvas)
        top, left = (side - height) // 2, (side - width) // 2
        picture = PIL.Image.fromarray(np.ascontiguousarray(image.on_canvas()))
        square = np.zeros((side, side, 3), np.uint8)
        square[top : top + height, left : left + width] = np.asarray(
            picture.resize((width, height), PIL.Image.Resampling.LANCZOS)
        )
        maps = self.backbone.features(normalise(square).to(self.device), normed=False)
        ratio = side / longer
        return DinoFeatures(F.normalize(maps[0], dim=0), (left, top), (ratio, ratio))

    def _squashed(self, image: Image) -> DinoFeatures:
        side, (height, width) = self.input_size, image.canvas
        pixels = normalise(image.on_canvas()).to(self.device)
        pixels = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
        maps = self.backbone.features(pixels, normed=True)
        factor = ((side - 1) / max(width - 1, 1), (side - 1) / max(height - 1, 1))
        return DinoFeatures(_unit(maps[0]), (0, 0), factor)

    def match_one(self, query: DinoFeatures, reference: DinoFeatures, points: Tensor) -> Matches:
        points = points.to(self.device, torch.float32)
        query_map, reference_map = query.map.to(self.device), reference.map.to(self.device)
        last, edge = query_map.shape[1] - 1, self.input_size - 1
        if self.readout in LETTERBOXED:
            cells = (query.to_input(points) / PATCH_PX).long().clamp(0, last)
            features = query_map[:, cells[:, 1], cells[:, 0]]
        else:
            cells = query.to_input(points.floor()).clamp(1e-4, edge - 1e-4) * last / edge
            grid = (cells / last * 2 - 1)[None, None]
            features = _unit(F.grid_sample(query_map[None], grid, align_corners=True)[0, :, 0])
        cosine = torch.einsum("cn,chw->nhw", features, reference_map)
        best = _argmax(cosine)
        match self.readout:
            case "sd-dino":
                answer = best * PATCH_PX + (PATCH_PX // 2 - 0.5)
            case "geoaware":
                near = cosine.where(_near(cosine, best, GEOAWARE_RADIUS), 0)
                answer = _expected_cell(near / GEOAWARE_TEMPERATURE) * PATCH_PX + PATCH_PX // 2
            case "nn":
                answer = best * edge / last
            case "bilinear":
                answer = _mixed(query_map, reference_map, cells) * edge / last
            case "softmax":
                answer = _expected_cell(cosine / VISUAL_AI_TEMPERATURE) * edge / last
            case "kernelsoftmax":
                weighted = cosine * _gaussian(cosine, best, VISUAL_AI_SIGMA)
                answer = _expected_cell(weighted / VISUAL_AI_TEMPERATURE) * edge / last
        return Matches(reference.to_image(answer), cosine.flatten(1).amax(1))


def _unit(maps: Tensor) -> Tensor:
    """Divided by its length along the first axis, plus 1e-6 as in the Visual-AI benchmark."""
    return maps / (maps.norm(dim=0, keepdim=True) + 1e-6)


def _argmax(maps: Tensor) -> Tensor:
    """int64 (N, 2): column and row of the maximum of each of ``maps`` (N, h, w)."""
    index = maps.flatten(1).argmax(1)
    return torch.stack([index % maps.shape[2], index // maps.shape[2]], 1)


def _away(maps: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """How far the rows (N, h) and columns (N, w) of ``maps`` are from ``cells`` (N, 2)."""
    rows = torch.arange(maps.shape[1], device=maps.device)
    cols = torch.arange(maps.shape[2], device=maps.device)
    return rows - cells[:, 1:], cols - cells[:, :1]


def _near(maps: Tensor, cells: Tensor, radius: int) -> Tensor:
    """bool (N, h, w): at most ``radius`` rows and columns away."""
    rows, cols = _away(maps, cells)
    return (rows.abs() <= radius)[:, :, None] & (cols.abs() <= radius)[:, None]


def _gaussian(maps: Tensor, cells: Tensor, sigma: float) -> Tensor:
    """(N, h, w), 1 at the cells."""
    rows, cols = _away(maps, cells)
    squared = rows.square()[:, :, None] + cols.square()[:, None]
    return (-squared / (2 * sigma**2)).exp()


def _expected_cell(logits: Tensor) -> Tensor:
    """(N, 2) column and row, averaged with the softmax of ``logits`` (N, h, w)."""
    weight = logits.flatten(1).softmax(1).view_as(logits)
    rows = torch.arange(logits.shape[1], device=logits.device, dtype=logits.dtype)
    cols = torch.arange(logits.shape[2], device=logits.device, dtype=logits.dtype)
    return torch.stack([weight.sum(1) @ cols, weight.sum(2) @ rows], 1)


def _mixed(query_map: Tensor, reference_map: Tensor, cells: Tensor) -> Tensor:
    """(N, 2): the best reference cells of the four query cells around fractional ``cells`` (N, 2),
    mixed by bilinear weights."""
    low = cells.floor().long().clamp(0, query_map.shape[1] - 2)
    share = cells - low
    total = torch.zeros_like(cells)
    for right in (0, 1):
        for down in (0, 1):
            features = query_map[:, low[:, 1] + down, low[:, 0] + right]
            best = _argmax(torch.einsum("cn,chw->nhw", features, reference_map))
            weight_x = share[:, 0] if right else 1 - share[:, 0]
            weight_y = share[:, 1] if down else 1 - share[:, 1]
            total += (weight_x * weight_y)[:, None] * best
    return total
