"""SCOT (Liu et al., CVPR 2020): HPF's voting with optimal transport in place of raw cosines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from baselines.hyperpixels import CellGrid, Hyperpixels, frame, hyperpixels, likeness, transfer
from nemf.backbones import ResNet, build_backbone, check_ids, tap_table
from nemf.cards import MatcherCard
from nemf.errors import NemfError
from nemf.matcher import Matcher, Role
from nemf.pairs import Image, Matches

CARD = MatcherCard(
    name="scot",
    title="SCOT",
    paper="Semantic Correspondence as an Optimal Transport Problem (CVPR)",
    year=2020,
    arxiv=None,
    licence_of_original="none",
    backbone="ResNet-101",
    input_size="longer side 300",
    training="none",
    official_protocol="scot-paper@1",
    description="Hyperpixel features, optimal transport of cells weighted by class activation, "
    "votes regularised by a Hough space of offsets.",
    published_as="SCOT",
    weights_at="torchvision's ImageNet files (download.pytorch.org/models)",
)

EPSILON = 0.05  # strength of the entropy in the transport
MAP_SCALES = (1, 1.5, 2)
TOP_CLASSES = 2
# Weight of a cell whose class activation lies above a threshold; 0.5 below all of them.
WEIGHTS = ((0.4, 0.8), (0.5, 0.9), (0.6, 1.0))


@dataclass(frozen=True, eq=False)
class WeightedHyperpixels(Hyperpixels):
    """Hyperpixels and ``mass``, float32 (cells of the grid): how much of the transport each takes
    part in, not yet normalised."""

    mass: Tensor


class SCOT(Matcher):
    """SCOT: as HPF, but a vote is what optimal transport carries from one cell to the other.

    ``backbone``, ``weights``, ``init``: see :func:`nemf.backbones.build_backbone`. ``layers``:
    increasing hyperpixel ids. ``exponent``: of the votes. The defaults are the paper's for
    PF-PASCAL and PF-WILLOW; on SPair-71k its ResNet-101 uses (0, 19, 27, 28, 29, 30), its ResNet-50
    (0, 11, 12, 13), both exponent 1. ``classmap``: cells weigh more where one of the two likeliest
    ImageNet classes is seen, which needs the whole trunk and its classifier; off, all cells weigh
    the same. NemfError naming ``classmap=False`` if the weights hold no classifier.
    """

    card = CARD

    def __init__(
        self,
        backbone: str = "resnet101",
        layers: Sequence[int] = (2, 22, 24, 25, 27, 28, 29),
        weights: str | Path | None = None,
        init: Literal["random"] | None = None,
        exponent: float = 0.5,
        classmap: bool = True,
    ) -> None:
        super().__init__()
        if not exponent > 0:
            raise NemfError(f"exponent must be positive, not {exponent}")
        self.layers = check_ids(backbone, layers)
        self.exponent = exponent
        self.classmap = classmap
        upto = len(tap_table(backbone)) - 1 if classmap else self.layers[-1]
        try:
            self.backbone = build_backbone(backbone, weights, init, upto=upto, classifier=classmap)
        except NemfError as problem:
            if "classifier" not in str(problem):
                raise
            raise type(problem)(
                f"{problem}. SCOT's class maps need the whole trunk and its classifier; "
                "classmap=False does without them"
            ) from None

    def encode_one(self, image: Image, role: Role) -> WeightedHyperpixels:
        pixels, ratio = frame(image, self.device, enlarge=True)
        found = hyperpixels(self.backbone, self.layers, pixels, ratio, prune=False)
        if self.classmap:
            mass = cell_weights(class_map(self.backbone, pixels), found.grid)
        else:
            mass = torch.ones_like(found.norms)
        return WeightedHyperpixels(found.levels, found.norms, found.grid, found.ratio, mass)

    def match_one(
        self, query: WeightedHyperpixels, reference: WeightedHyperpixels, points: Tensor
    ) -> Matches:
        points = points.to(self.device, torch.float32)
        return Matches(transfer(points, query, reference, lambda: self.votes(query, reference)))

    def votes(self, query: WeightedHyperpixels, reference: WeightedHyperpixels) -> Tensor:
        """(query cells * transport plan) ** exponent, float32 (query cells, reference cells)."""
        cosine = likeness(query, reference, self.device)
        plan = transport(cosine, query.mass.to(self.device), reference.mass.to(self.device))
        return plan.mul_(len(plan)).pow_(self.exponent)


def transport(
    likeness: Tensor, query_mass: Tensor, reference_mass: Tensor, epsilon: float = EPSILON
) -> Tensor:
    """Entropic optimal transport between cells at cost 1 - ``likeness``, after one Sinkhorn step.

    ``likeness`` float32 (Q, R), at most 1; masses float32 (Q,) and (R,), positive, normalised here
    to sum 1. Returns the plan, float32 (Q, R): its rows sum to the query's masses, its columns only
    roughly to the reference's, as the official code stops after one step. Where exp(-cost /
    epsilon) is too small for float32, epsilon is doubled until the plan is a number. Raises
    ValueError for a likeness that is not finite, which no epsilon could mend.
    Source: Liu et al., CVPR 2020, section 3.2.
    """
    if not torch.isfinite(likeness).all():
        raise ValueError("the likeness of cells must be finite")
    mu, nu = query_mass / query_mass.sum(), reference_mass / reference_mass.sum()
    while True:
        plan = ((likeness - 1) / epsilon).exp_()
        # The first scaling of the rows is constant: 1 / Q each.
        columns = nu / plan.mean(0)
        rows = mu / (plan @ columns)
        plan.mul_(rows[:, None]).mul_(columns)
        if not plan.isnan().any():
            return plan
        epsilon *= 2


def class_map(backbone: ResNet, pixels: Tensor) -> Tensor:
    """Where the two likeliest ImageNet classes are seen, float32 (h, w) on the grid of ``pixels``,
    a normalised image (1, 3, h, w). At most about 1; sums the image at three sizes.

    ``backbone`` holds its whole trunk and the classifier.
    """
    size = tuple(pixels.shape[2:])
    total = torch.zeros(size, device=pixels.device)
    for scale in MAP_SCALES:
        if scale != 1:  # the largest is made from the middle one, as in the official code
            scaled = [max(int(side * scale), 1) for side in size]
            pixels = F.interpolate(pixels, scaled, mode="bilinear", align_corners=True)
        (last,) = backbone.taps(pixels, [backbone.upto])
        last = last.relu()
        classes = backbone.fc(last.mean((2, 3)))[0].topk(TOP_CLASSES).indices
        maps = torch.einsum("kc,chw->khw", backbone.fc.weight[classes], last[0])
        maps = F.interpolate(maps[None], size, mode="bilinear", align_corners=True)[0]
        # Divided by the largest value, not by the range: again the official code's.
        low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
        total += ((maps - low) / high).amax(0)
    return total / (total.max() + 1e-5)


def cell_weights(activation: Tensor, grid: CellGrid) -> Tensor:
    """Mass of every cell of ``grid``, float32 (rows * cols), from the class map (h, w) at its
    centre: 0.5, above 0.4 it is 0.8, above 0.5 0.9, above 0.6 1."""
    x, y = grid.centres_px().to(activation.device).long().unbind(1)
    at_centre = activation[y, x]
    mass = torch.full_like(at_centre, 0.5)
    for threshold, weight in WEIGHTS:
        mass[at_centre > threshold] = weight
    return mass
