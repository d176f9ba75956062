"""Hyperpixel Flow (Min et al., ICCV 2019): multi-layer features and regularised Hough matching."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from baselines.hyperpixels import Hyperpixels, frame, hyperpixels, likeness, transfer
from nemf.backbones import build_backbone, check_ids
from nemf.cards import MatcherCard
from nemf.matcher import Matcher, Role
from nemf.pairs import Image, Matches

CARD = MatcherCard(
    name="hpf",
    title="HPF",
    paper="Hyperpixel Flow: Semantic Correspondence with Multi-layer Neural Features (ICCV)",
    year=2019,
    arxiv="1908.06537",
    licence_of_original="Apache-2.0",
    backbone="ResNet-101",
    input_size="longer side <= 300",
    training="none",
    official_protocol="hpf-paper@1",
    description="Hyperpixel features, cosine votes regularised by a Hough space of offsets.",
    published_as="HPF",
    weights_at="torchvision's ImageNet files (download.pytorch.org/models)",
)

COSINE_POWER = 3


class HyperpixelFlow(Matcher):
    """HPF: every cell of the query image moves to the reference cell of highest confidence, votes
    times how many votes agree on that offset; a point moves with the mean of the cells over it.

    ``backbone``, ``weights``, ``init``: see :func:`nemf.backbones.build_backbone`. ``layers``:
    increasing hyperpixel ids; the default is the paper's for PF-PASCAL and PF-WILLOW, its SPair-71k
    set is (0, 8, 20, 21, 26, 28, 29, 30). A point that no cell covers gets NaN, no answer.
    """

    card = CARD

    def __init__(
        self,
        backbone: str = "resnet101",
        layers: Sequence[int] = (2, 17, 21, 22, 25, 26, 28),
        weights: str | Path | None = None,
        init: Literal["random"] | None = None,
    ) -> None:
        super().__init__()
        self.layers = check_ids(backbone, layers)
        self.backbone = build_backbone(backbone, weights, init, upto=self.layers[-1])

    def encode_one(self, image: Image, role: Role) -> Hyperpixels:
        pixels, ratio = frame(image, self.device, enlarge=False)
        return hyperpixels(self.backbone, self.layers, pixels, ratio, prune=True)

    def match_one(self, query: Hyperpixels, reference: Hyperpixels, points: Tensor) -> Matches:
        points = points.to(self.device, torch.float32)
        return Matches(transfer(points, query, reference, lambda: self.votes(query, reference)))

    def votes(self, query: Hyperpixels, reference: Hyperpixels) -> Tensor:
        """max(0, cosine)³ of all pairs of cells, float32 (query cells, reference cells)."""
        return likeness(query, reference, self.device).pow_(COSINE_POWER)
