"""NC-Net (Rocco et al., NeurIPS 2018): correlations filtered by neighbourhood consensus."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemf.aggregation import correlate, mutual_filter, unit
from nemf.backbones import ResNet, check_finite, last_of_stage, normalise, trunk_of
from nemf.cards import MatcherCard
from nemf.checkpoints import check_given, check_sources, fitting_state, read_state
from nemf.convolution import convolve
from nemf.errors import NemfError
from nemf.geometry import to_norm, to_pixels
from nemf.matcher import Matcher, Role
from nemf.pairs import Image, Matches, Size
from nemf.supervision import PairBatch

CARD = MatcherCard(
    name="ncnet",
    title="NC-Net",
    paper="Neighbourhood Consensus Networks (NeurIPS)",
    year=2018,
    arxiv="1810.10510",
    licence_of_original="MIT",
    backbone="ResNet-101",
    input_size="400x400",
    training="pairs of PF-PASCAL or IVD, no keypoints",
    official_protocol="ncnet-paper@1",
    description="All correlations of two images, filtered by 4-D convolutions and mutual maxima.",
    published_as="NC-Net",
    flow_resolution="25",
    weights_at="www.di.ens.fr/willow/research/ncnet/models/ (ncnet_pfpascal.pth.tar)",
)

PAPER_SIZES = {"kernel_sizes": (5, 5, 5), "channels": (16, 16, 1)}
FILTER_EPS = 1e-5
TRUNK = "FeatureExtraction.model."
HEAD = "NeighConsensus.conv."
# What the official files number: the trunk is a sequence there, with ReLU and pooling as 2 and 3.
STAGES = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3"}
# The official files also hold the settings and the curves of their training: plain data.
_OFFICIAL_CONTENT = [
    argparse.Namespace,
    np.ndarray,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64")),
    *(
        (getattr(np._core.multiarray, name), f"numpy.{core}.multiarray.{name}")
        for name in ("_reconstruct", "scalar")
        for core in ("core", "_core")
    ),
]


@dataclass(frozen=True, eq=False)
class NCNetFeatures:
    """``map`` float32 (C, h, w), unit length along C; ``canvas`` (height, width) px, the frame that
    was resized to the square input."""

    map: Tensor
    canvas: Size


class ConsensusLayer(nn.Module):
    """A 4-D convolution, its weight stored as in the official files: (k, O, C, k, k, k), the first
    axis of the source in front."""

    def __init__(self, c_in: int, c_out: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(kernel, c_out, c_in, kernel, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(c_out))

    def forward(self, volume: Tensor) -> Tensor:
        """(B, C, hs, ws, ht, wt) to (B, O, hs, ws, ht, wt)."""
        return convolve(volume, self.weight.permute(1, 2, 0, 3, 4, 5), self.bias)


class NCNet(Matcher):
    """NC-Net: every cell of the query image moves to the reference cell of highest filtered score,
    a point with the cells around it. The paper's "target" (B) is our query image, its "source" (A)
    our reference image.

    Weights come from exactly one of these:

    - ``weights``: an official file or a checkpoint of ours. ``kernel_sizes`` and ``channels`` (of
      each layer's output) are read from the tensors; given as keywords they must agree;
    - ``init``: "head", for training, draws the consensus layers from ``init_seed``, the paper's
      sizes where none are given. The trunk comes from ``backbone_weights`` or from where
      :func:`nemf.backbones.build_backbone` looks. "random" draws everything, but the trunk if
      ``backbone_weights`` gives it.

    The trunk ends with layer3; training leaves it as it is unless ``train_trunk``, and its batch
    norms keep their statistics. The canvas is resized to ``input_size`` with its corner pixels in
    the corners. A point is read between the four cells around it (bilinear; beyond the outermost
    cells as on them); ``official=True`` takes coordinates as 1-based, so that pixel 1 of the
    annotation is the first, and mixes cells beyond the upper left border as the official code does.
    Relocalisation (the paper's fine grid for localisation) is not part of this.

    Raises WeightsNotFound if neither ``weights`` nor ``init`` is given, NemfError for a file or
    sizes that do not fit.
    """

    card = CARD

    def __init__(
        self,
        backbone: str = "resnet101",
        kernel_sizes: Sequence[int] | None = None,
        channels: Sequence[int] | None = None,
        weights: str | Path | None = None,
        init: Literal["head", "random"] | None = None,
        backbone_weights: str | Path | None = None,
        official: bool = False,
        input_size: int = 400,
        train_trunk: bool = False,
        init_seed: int = 0,
    ) -> None:
        super().__init__()
        check_sources("ncnet", weights, init, backbone_weights)
        if input_size < 32:
            raise NemfError(f"input_size must be at least 32 px, not {input_size}")
        self.input_size = input_size
        self.official = official
        self.last_id = last_of_stage(backbone, 3)
        given = {"kernel_sizes": kernel_sizes, "channels": channels}
        given = {name: tuple(value) for name, value in given.items() if value is not None}
        if weights is not None:
            state = _read(Path(weights))
            sizes = _sizes(Path(weights), state, given)
        else:
            sizes = PAPER_SIZES | given
        _check(**sizes)

        self.FeatureExtraction, self.NeighConsensus = nn.Module(), nn.Module()
        with torch.device("meta"):  # allocates nothing and draws no random numbers
            self.NeighConsensus.conv = _consensus(**sizes)
            self.FeatureExtraction.model = ResNet(backbone, self.last_id)
        if weights is not None:
            wanted = self.state_dict()
            unexpected = [key for key in state if key not in wanted]
            holds = f"this NC-Net on {backbone}"
            fitting = fitting_state(
                Path(weights), state, wanted, unexpected=unexpected, holds=holds
            )
            self.load_state_dict(fitting, assign=True)
        else:
            trunk = trunk_of(backbone, init, backbone_weights, self.last_id)
            self.FeatureExtraction.model = trunk
            self._draw_head(init_seed)
        self.FeatureExtraction.model.freeze(weights=not train_trunk)

    def features(self, frames: Tensor) -> Tensor:
        """(B, C, h, w) of unit length along C: layer3 of ``frames`` (B, 3, input_size, input_size)
        from :func:`nemf.backbones.normalise`."""
        (tap,) = self.FeatureExtraction.model.taps(frames, [self.last_id])
        return unit(tap.relu())

    def volume(self, src: Tensor, trg: Tensor) -> Tensor:
        """(B, hs, ws, ht, wt): the filtered scores of unit features (B, C, hs, ws) and
        (B, C, ht, wt): mutual filter, consensus layers in both orders, mutual filter (sec. 3)."""
        shape = (-1, *src.shape[2:], *trg.shape[2:])
        with torch.autocast(src.device.type, enabled=False):  # rounded scores would tie
            scores = mutual_filter(correlate(src, trg), FILTER_EPS)
            scores = self.consensus(scores.view(shape)).flatten(3).flatten(1, 2)
            return mutual_filter(scores, FILTER_EPS).view(shape)

    def consensus(self, volume: Tensor) -> Tensor:
        """The layers over ``volume`` (B, hs, ws, ht, wt) and over it with the images exchanged,
        exchanged back, added: the result does not depend on which image is which."""
        swapped = volume.permute(0, 3, 4, 1, 2)
        return self._layers(volume) + self._layers(swapped).permute(0, 3, 4, 1, 2)

    def supervised(self, batch: PairBatch) -> dict[str, Tensor]:
        """Pairs, whatever their keypoints."""
        pairs = torch.tensor(len(batch), device=batch.src.device)
        return {"loss_positive": pairs, "loss_negative": pairs.clone()}

    def loss(
        self, batch: PairBatch, counts: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Weak supervision (sec. 3.4): one minus the mean score of the pairs, and the mean score of
        their targets with the next pair's source. Keypoints are not used.

        A pair's score is the mean over cells of the highest softmax probability, over both
        directions. The frames' side is ``input_size``. NemfError for a lone pair.
        """
        batch.check_side(self.input_size)
        counts = counts or self.supervised(batch)
        src, trg, others = (self.features(x) for x in (batch.src, batch.trg, batch.src_of_next))
        positive, negative = (self._score(self.volume(x, trg)) for x in (src, others))
        return {
            "loss_positive": (1 - positive).sum() / counts["loss_positive"],
            "loss_negative": negative.sum() / counts["loss_negative"],
        }

    def transfer(self, points: Tensor, positions: Tensor) -> Tensor:
        """(N, 2): where normalised ``points`` (N, 2) of the query go, if its cells, on a grid
        (h, w) from corner to corner, go to ``positions`` (h, w, D); D values are mixed alike."""
        size = points.new_tensor([positions.shape[1], positions.shape[0]])
        if not self.official:
            points = points.clamp(-1, 1)
        cells = (points + 1) / 2 * (size - 1)
        low = (cells.ceil() - 1).clamp_min(0).minimum((size - 2).clamp_min(0))
        # Beyond the border the official code mixes by absolute distances.
        to_low, to_high = (cells - low).abs(), (low + 1 - cells).abs()
        high = (low + 1).minimum(size - 1).long()
        low = low.long()
        total, mixed = 0, 0
        for x, share_x in ((low[:, 0], to_high[:, 0]), (high[:, 0], to_low[:, 0])):
            for y, share_y in ((low[:, 1], to_high[:, 1]), (high[:, 1], to_low[:, 1])):
                share = (share_x * share_y)[:, None]
                mixed = mixed + share * positions[y, x]
                total = total + share
        return mixed / total

    def _layers(self, volume: Tensor) -> Tensor:
        return self.NeighConsensus.conv(volume[:, None])[:, 0]

    def encode_one(self, image: Image, role: Role) -> NCNetFeatures:
        pixels = normalise(image.on_canvas()).to(self.device)
        size = (self.input_size, self.input_size)
        frame = F.interpolate(pixels, size, mode="bilinear", align_corners=True)
        features = self.features(frame)[0]
        check_finite(features, image)
        return NCNetFeatures(features, image.canvas)

    def match_one(self, query: NCNetFeatures, reference: NCNetFeatures, points: Tensor) -> Matches:
        target, source = (side.map[None].to(self.device) for side in (query, reference))
        scores = self.volume(source, target)[0].flatten(0, 1).softmax(0)  # (S, h, w)
        best, index = scores.max(0)
        rows, cols = source.shape[2:]
        x, y = index % cols / max(cols - 1, 1), index // cols / max(rows - 1, 1)
        found = torch.stack([2 * x - 1, 2 * y - 1, best], 2)  # (h, w, 3)
        first = 1 if self.official else 0
        moved = self.transfer(to_norm(points.to(found) - first, query.canvas), found)
        return Matches(to_pixels(moved[:, :2], reference.canvas) + first, moved[:, 2])

    def _score(self, volume: Tensor) -> Tensor:
        """(B,) from (B, hs, ws, ht, wt)."""
        scores = volume.flatten(3).flatten(1, 2)
        both = [scores.softmax(axis).amax(axis).mean(1) for axis in (1, 2)]
        return (both[0] + both[1]) / 2

    @torch.no_grad()
    def _draw_head(self, seed: int) -> None:
        """Random weights, uniform as a convolution of torch begins."""
        generator = torch.Generator().manual_seed(seed)
        for layer in self.NeighConsensus.conv.to_empty(device="cpu"):
            if isinstance(layer, ConsensusLayer):
                bound = (layer.weight[:, 0].numel()) ** -0.5
                layer.weight.uniform_(-bound, bound, generator=generator)
                layer.bias.uniform_(-bound, bound, generator=generator)
                layer.is_random = True


def _consensus(kernel_sizes: Sequence[int], channels: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for kernel, (c_in, c_out) in zip(kernel_sizes, pairwise((1, *channels)), strict=True):
        layers += [ConsensusLayer(c_in, c_out, kernel), nn.ReLU()]
    return nn.Sequential(*layers)


def _check(kernel_sizes: Sequence[int], channels: Sequence[int]) -> None:
    if (
        not kernel_sizes
        or len(kernel_sizes) != len(channels)
        or any(side < 1 or side % 2 == 0 for side in kernel_sizes)
        or min(channels) < 1
        or channels[-1] != 1
    ):
        raise NemfError(
            f"kernel_sizes={kernel_sizes} must be odd and as many as channels={channels}, the last "
            "of which is 1"
        )


def _read(path: Path) -> dict[str, Tensor]:
    """The state of an official file or of ours, under our names."""
    with torch.serialization.safe_globals(_OFFICIAL_CONTENT):
        state = read_state(path)
    renamed = {}
    for key, value in state.items():
        name = re.sub(r"^FeatureExtraction\.vgg\.", TRUNK, key)
        stage = re.match(rf"{re.escape(TRUNK)}(\d+)\.", name)
        if stage and stage[1] in STAGES:
            name = TRUNK + STAGES[stage[1]] + name[stage.end() - 1 :]
        renamed[name] = value
    return renamed


def _sizes(
    path: Path, state: Mapping[str, Tensor], given: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """The sizes that the tensors of a file have; NemfError where they disagree with ``given``."""
    named = {key: re.fullmatch(rf"{re.escape(HEAD)}(\d+)\.weight", key) for key in state}
    numbers = sorted(int(match[1]) for match in named.values() if match)
    weights = [state[f"{HEAD}{number}.weight"] for number in numbers]
    if not weights or any(weight.ndim != 6 for weight in weights):
        raise NemfError(f"{path} is no NC-Net checkpoint (no 4-D convolutions {HEAD}0.weight ...)")
    found = {
        "kernel_sizes": tuple(weight.shape[0] for weight in weights),
        "channels": tuple(weight.shape[1] for weight in weights),
    }
    check_given(path, found, given)
    return found
