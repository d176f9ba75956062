"""CATs++ (Cho et al., TPAMI 2022): convolutions and attention over a pyramid of correlations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemf.aggregation import at_least_float32, correlate, follow, soft_argmax, to_flow
from nemf.backbones import (
    ResNet,
    check_finite,
    check_ids,
    fitting_model,
    squashed_frame,
    tap_table,
    trunk_of,
)
from nemf.cards import MatcherCard
from nemf.checkpoints import check_given, check_sources, read_state
from nemf.convolution import doubled
from nemf.errors import NemfError
from nemf.geometry import squash, unsquash
from nemf.matcher import Matcher, Role
from nemf.pairs import Image, Matches, Size
from nemf.supervision import PairBatch, end_point_error, flow_labels

CARD = MatcherCard(
    name="catspp",
    title="CATs++",
    paper="CATs++: Boosting Cost Aggregation with Convolutions and Transformers (TPAMI)",
    year=2022,
    arxiv="2202.06817",
    licence_of_original="none stated",
    backbone="ResNet-101",
    input_size="512x512",
    training="keypoints of SPair-71k or PF-PASCAL",
    official_protocol="catspp-paper@1",
    description="All correlations of three stages, refined coarse to fine into a 32x32 flow.",
    flow_resolution="32",
    weights_at="Google Drive, linked from github.com/KU-CVLAB/CATs-PlusPlus",
)

# As the official code sets them.
PAPER_SIZES = {"channels": 4, "affinity_dim": 128, "query_dim": 512, "input_size": 512}
MLP_RATIO = 4
FEATURE_EPS = 1e-5
# Side of the kernels over the first image's axes, by how much these are strided for attention.
KERNEL_OF_STRIDE = {1: 3, 2: 3, 4: 5}
# Where training begins: the deviation of what the first convolutions pass on.
FIRST_DEVIATION = 0.05
HEAD = "hpn_learner."


@dataclass(frozen=True, eq=False)
class CATsPPFeatures:
    """An image as the source or the target of a pair, per level, deepest first.

    ``taps``: float32 (taps, C, S), every layer of the level, unit length along C, its S cells row
    by row; ``affinities``: float32 (cells of the aggregated level, affinity_dim); ``canvas``
    (height, width) px, the frame that was squashed to the square input.
    """

    taps: list[Tensor]
    affinities: list[Tensor]
    canvas: Size


class Conv4d(nn.Module):
    """A convolution over the first image's axes plus one over the second's, each with a bias.

    ``kernels`` (odd) and ``strides``: of the first image's axes, of the second's. Along the other
    image's axes a summand takes the maximum over windows of their stride.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernels: tuple[int, int] = (3, 3),
        strides: tuple[int, int] = (1, 1),
    ) -> None:
        super().__init__()
        self.query_conv, self.supp_conv = (
            nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2)
            for kernel, stride in zip(kernels, strides, strict=True)
        )

    def forward(self, volume: Tensor) -> Tensor:
        """(B, O, h', w', u', v') from (B, C, h, w, u, v), sides divided by strides, rounded up."""
        first = _along_first(self.query_conv, volume, self.supp_conv.stride[0])
        second = _along_first(self.supp_conv, exchanged(volume), self.query_conv.stride[0])
        return first + exchanged(second)


class Attention(nn.Module):
    """What a cell of the second image corresponds to, mixed over all cells of that image.

    Cells attend to each other by their correlations (over the first image, strided) beside their
    ``affinity``; every channel of the volume is a head.
    """

    def __init__(self, n_tokens: int, stride: int, sizes: Mapping[str, int], width: int) -> None:
        super().__init__()
        channels, query_dim = sizes["channels"], sizes["query_dim"]
        kernels = (KERNEL_OF_STRIDE[stride], 3)
        self.qk = nn.Module()
        self.qk.conv = nn.Sequential(
            Conv4d(channels, channels, kernels, (stride, 1)), nn.GroupNorm(1, channels)
        )
        self.qk.linear = nn.Linear(width + sizes["affinity_dim"], 2 * query_dim)
        self.v = nn.Sequential(Conv4d(channels, channels, kernels), nn.GroupNorm(1, channels))
        self.pos_embed = nn.Parameter(torch.empty(1, n_tokens, 1, query_dim // channels))

    def attend(self, volume: Tensor, affinity: Tensor) -> Tensor:
        """(B, C, h, w, u, v), same shape out; ``affinity`` (B, u * v, affinity_dim)."""
        heads = volume.shape[1]
        tokens = self.qk.conv(volume).flatten(4).flatten(1, 3).transpose(1, 2)
        both = self.qk.linear(torch.cat([tokens, affinity], 2))
        # In the official layout the head is the fastest of a query's channels.
        q, k = (x.unflatten(2, (-1, heads)).transpose(2, 3) for x in both.chunk(2, 2))
        q, k = ((x + self.pos_embed).transpose(1, 2) for x in (q, k))  # (B, heads, tokens, d)
        v = self.v(volume).flatten(4).flatten(2, 3).transpose(2, 3)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return mixed.transpose(2, 3).reshape(volume.shape)


class Block(Attention):
    """:class:`Attention`, then a convolutional MLP, both residual and with a norm before.

    The parameters' names are the official code's, which keeps attention's beside the others.
    """

    def __init__(self, n_tokens: int, stride: int, sizes: Mapping[str, int], width: int) -> None:
        super().__init__(n_tokens, stride, sizes, width)
        channels, kernels = sizes["channels"], (KERNEL_OF_STRIDE[stride], 3)
        self.norm1, self.norm2 = (nn.GroupNorm(1, channels) for _ in range(2))
        self.mlp = nn.Module()
        self.mlp.mlp = nn.Sequential(
            Conv4d(channels, MLP_RATIO * channels, kernels),
            nn.GELU(),
            Conv4d(MLP_RATIO * channels, channels, kernels),
        )

    def forward(self, volume: Tensor, affinity: Tensor) -> Tensor:
        """As :meth:`Attention.attend`."""
        volume = volume + self.attend(self.norm1(volume), affinity)
        return volume + self.mlp.mlp(self.norm2(volume))


class CATsPP(Matcher):
    """CATs++: a flow from every cell of the query image into the reference image, read at the
    points. The paper's "target" is our query image, its "source" our reference image.

    ``layers``: increasing hyperpixel ids of ``backbone`` in up to three successive stages after the
    stem, by default all of the paper's layer2 to layer4. Each stage is a level of the pyramid.

    Weights come from exactly one of these:

    - ``weights``: an official file (``model_best.pth`` of the folder that the paper's repository
      KU-CVLAB/CATs-PlusPlus links to; its ``args.pkl`` is not needed) or a checkpoint of ours.
      Deeper layers and the classifier of its trunk may be there or not; they are not kept.
      ``channels`` of the volumes, ``affinity_dim``, ``query_dim`` and ``input_size`` are read from
      the tensors; given as keywords they must agree;
    - ``init``: "head", for training, draws all but the trunk from ``init_seed``, sizes that are
      not given are the paper's; the aggregation begins at the mean correlation of each level, added
      up. The trunk comes from ``backbone_weights`` or from where
      :func:`nemf.backbones.build_backbone` looks. "random" draws everything, but the trunk if
      ``backbone_weights`` gives it.

    Training leaves the trunk as it is unless ``train_trunk``; its batch norms keep their
    statistics either way. In training mode :meth:`loss` drops half of the affinity's channels,
    drawn from the pairs' own seeds.

    Points move in the frame of the image squashed to ``input_size``: x * input_size / width,
    without a half-pixel term, as :func:`nemf.aggregation.follow` says; with ``official=True`` at
    truncated points, as in the official code.

    The features of an image are large: 136 MB with the paper's layers.

    Raises WeightsNotFound if neither ``weights`` nor ``init`` is given, NemfError for a file or
    sizes that do not fit.
    """

    card = CARD

    def __init__(
        self,
        backbone: str = "resnet101",
        layers: Sequence[int] = tuple(range(4, 34)),
        channels: int | None = None,
        affinity_dim: int | None = None,
        query_dim: int | None = None,
        weights: str | Path | None = None,
        init: Literal["head", "random"] | None = None,
        backbone_weights: str | Path | None = None,
        official: bool = False,
        input_size: int | None = None,
        train_trunk: bool = False,
        init_seed: int = 0,
    ) -> None:
        super().__init__()
        self.layers = check_ids(backbone, layers)
        self.of_level = _levels(backbone, self.layers)
        self.official = official
        check_sources("catspp", weights, init, backbone_weights)
        given = {
            "channels": channels,
            "affinity_dim": affinity_dim,
            "query_dim": query_dim,
            "input_size": input_size,
        }
        given = {name: value for name, value in given.items() if value is not None}
        taps = [[tap_table(backbone)[k] for k in ids] for ids in self.of_level]
        jumps = [level[-1].jump_px for level in taps]
        if weights is not None:
            state = read_state(Path(weights))
            sizes = _sizes(Path(weights), state, given, jumps)
            _check_levels(Path(weights), state, backbone, self.of_level)
        else:
            sizes = PAPER_SIZES | given
        _check(sizes, jumps[0])
        self.input_size, self.affinity_dim = sizes["input_size"], sizes["affinity_dim"]
        self.sides = [self.input_size // jump for jump in jumps]  # of the correlations
        self.feature_size = self.sides[-1] // 2

        self.hpn_learner = nn.Module()
        with torch.device("meta"):  # allocates nothing and draws no random numbers
            self._build_head([len(level) for level in taps], [x[-1].channels for x in taps], sizes)
            self.backbone = ResNet(backbone, self.layers[-1])
        if weights is not None:
            holds = f"this CATs++ on {backbone}"
            fitting = fitting_model(Path(weights), state, self, self.backbone, "backbone.", holds)
            self.load_state_dict(fitting, assign=True)
        else:
            self.backbone = trunk_of(backbone, init, backbone_weights, self.layers[-1])
            self._draw_head(init_seed)
            if init == "head":
                self._begin_at_the_correlation()
        self.backbone.freeze(weights=not train_trunk)

    def embed(self, frames: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """``taps`` (B, taps, C, S) and ``affinities`` (B, S / 4, affinity_dim) per level, deepest
        first, of ``frames`` (B, 3, input_size, input_size) from :func:`nemf.backbones.normalise`.
        """
        found = dict(zip(self.layers, self.backbone.taps(frames, self.layers), strict=True))
        taps, affinities = [], []
        for ids, project in zip(self.of_level, self.hpn_learner.affinity_proj, strict=True):
            level = [found[k] for k in ids]
            taps.append(torch.stack([_unit(x.flatten(2)) for x in level], 1))
            affinities.append(at_least_float32(project(level[-1])).flatten(2).transpose(1, 2))
        return taps, affinities

    def aggregate(
        self,
        src_taps: Sequence[Tensor],
        src_affinities: Sequence[Tensor],
        trg_taps: Sequence[Tensor],
        trg_affinities: Sequence[Tensor],
    ) -> Tensor:
        """(B, S, T): the aggregated cost of source and target, S = T = feature_size ** 2, from
        :meth:`embed` of both."""
        with torch.autocast(src_taps[0].device.type, enabled=False):  # rounded costs would tie
            coarser = None
            for level, early_conv in enumerate(self.hpn_learner.early_conv):
                side = self.sides[level]
                src, trg = (x[level].flatten(0, 1) for x in (src_taps, trg_taps))
                volume = correlate(trg, src).clamp_min(0)  # target first, as all volumes here
                volume = volume.view(len(src_taps[level]), -1, *[side] * 4)
                volume = early_conv.conv4d(volume)
                if coarser is not None:
                    volume = volume + doubled(coarser)
                refine = self.hpn_learner.transformers[level].layer[0]
                by_source = refine(volume, src_affinities[level])
                by_target = refine(exchanged(volume), trg_affinities[level])
                coarser = volume + by_source + exchanged(by_target)
            return coarser.mean(1).flatten(3).flatten(1, 2).transpose(1, 2)

    def flow(self, cost: Tensor) -> Tensor:
        """(B, 2, feature_size, feature_size): x and y displacement, in cells, of every target cell
        into the source, from ``cost`` (B, S, T)."""
        learner = self.hpn_learner
        return to_flow(soft_argmax(cost, learner.x_normal, learner.y_normal))

    def transfer(self, points: Tensor, flow: Tensor) -> Tensor:
        """(N, 2): where ``points`` (N, 2) of the target go by ``flow`` (2, h, w), in pixels of the
        squashed frame, read as ``official`` says."""
        return follow(points, flow, self.input_size, whole_pixels=self.official)

    def supervised(self, batch: PairBatch) -> dict[str, Tensor]:
        """Labelled cells."""
        _, labelled = flow_labels(batch, self.feature_size, self.official)
        return {"loss_flow": labelled.sum()}

    def loss(
        self, batch: PairBatch, counts: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The end-point error of the flow in cells, mean over the labelled ones.

        The frames' side is ``input_size``. ``official`` labels as CATs' official code does.
        """
        batch.check_side(self.input_size)
        (src_taps, src_affinities), (trg_taps, trg_affinities) = map(
            self.embed, (batch.src, batch.trg)
        )
        if self.training:
            kept = self._kept_channels(batch.seeds).to(batch.src)
            src_affinities, trg_affinities = (
                [x * share[:, None] for x, share in zip(side, kept[:, i].unbind(1), strict=True)]
                for i, side in enumerate((src_affinities, trg_affinities))
            )
        cost = self.aggregate(src_taps, src_affinities, trg_taps, trg_affinities)
        labels, labelled = flow_labels(batch, self.feature_size, self.official)
        count = (counts or {"loss_flow": labelled.sum()})["loss_flow"]
        error = end_point_error(self.flow(cost), labels, labelled)
        return {"loss_flow": error / count.clamp_min(1)}

    def _kept_channels(self, seeds: Tensor) -> Tensor:
        """(B, 2, levels, affinity_dim): 2 for a channel of the affinity of a pair's source or
        target that is kept, 0 for one that is dropped."""
        shape = (2, len(self.of_level), self.affinity_dim)
        drawn = []
        for seed in seeds.tolist():
            generator = torch.Generator().manual_seed(seed)
            drawn.append(torch.randint(0, 2, shape, generator=generator))
        return 2.0 * torch.stack(drawn)

    def encode_one(self, image: Image, role: Role) -> CATsPPFeatures:
        frame = squashed_frame(image, self.input_size).to(self.hpn_learner.x_normal)
        taps, affinities = self.embed(frame)
        for affinity in affinities:
            check_finite(affinity, image)
        return CATsPPFeatures([x[0] for x in taps], [x[0] for x in affinities], image.canvas)

    def match_one(
        self, query: CATsPPFeatures, reference: CATsPPFeatures, points: Tensor
    ) -> Matches:
        lists = (reference.taps, reference.affinities, query.taps, query.affinities)
        cost = self.aggregate(*([x[None].to(self.device) for x in each] for each in lists))
        (flow,) = self.flow(cost)
        frame = (self.input_size, self.input_size)
        moved = self.transfer(squash(points.to(flow), query.canvas, frame), flow)
        return Matches(unsquash(moved, reference.canvas, frame).float())

    def _build_head(
        self, n_taps: Sequence[int], tap_channels: Sequence[int], sizes: Mapping[str, int]
    ) -> None:
        """Everything but the trunk, under the official names."""
        channels, learner = sizes["channels"], self.hpn_learner
        width = channels * (self.sides[0] // 2) ** 2  # of a strided token
        early, transformers, projections = [], [], []
        for level, side in enumerate(self.sides):
            step = nn.Module()
            step.conv4d = nn.Sequential(
                nn.Sequential(
                    Conv4d(n_taps[level], channels, strides=(2, 2)),
                    nn.GroupNorm(1, channels),
                    nn.ReLU(),
                )
            )
            early.append(step)
            transformer = nn.Module()
            transformer.layer = nn.ModuleList([Block((side // 2) ** 2, 2**level, sizes, width)])
            transformers.append(transformer)
            project = nn.Conv2d(tap_channels[level], sizes["affinity_dim"], 3, 2, padding=1)
            projections.append(nn.Sequential(project, nn.ReLU()))
        learner.early_conv = nn.ModuleList(early)
        learner.transformers = nn.ModuleList(transformers)
        learner.affinity_proj = nn.ModuleList(projections)
        learner.x_normal = nn.Parameter(torch.empty(self.feature_size))
        learner.y_normal = nn.Parameter(torch.empty(self.feature_size))

    @torch.no_grad()
    def _draw_head(self, seed: int) -> None:
        """Random weights: layers as torch begins them, position codes of deviation 0.02."""
        generator = torch.Generator().manual_seed(seed)
        learner = self.hpn_learner.to_empty(device="cpu")
        for module in learner.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                bound = module.weight[0].numel() ** -0.5
                module.weight.uniform_(-bound, bound, generator=generator)
                module.bias.uniform_(-bound, bound, generator=generator)
            elif isinstance(module, nn.GroupNorm):
                module.weight.fill_(1)
                module.bias.zero_()
            elif isinstance(module, Attention):
                module.pos_embed.normal_(0, 0.02, generator=generator)
        for line in (learner.x_normal, learner.y_normal):
            line.copy_(torch.linspace(-1, 1, self.feature_size))
        learner.is_random = True

    @torch.no_grad()
    def _begin_at_the_correlation(self) -> None:
        """The residual branches give nothing, the first convolutions the mean correlation."""
        for step in self.hpn_learner.early_conv:
            conv, norm, _ = step.conv4d[0]
            for plane in (conv.query_conv, conv.supp_conv):
                plane.weight *= 0.1
                plane.weight[:, :, 1, 1] += 1 / plane.in_channels
            norm.weight.fill_(FIRST_DEVIATION)
        for transformer in self.hpn_learner.transformers:
            block = transformer.layer[0]
            block.v[1].weight.zero_()
            for plane in (block.mlp.mlp[2].query_conv, block.mlp.mlp[2].supp_conv):
                plane.weight.zero_()
                plane.bias.zero_()


def exchanged(volume: Tensor) -> Tensor:
    """(B, C, u, v, h, w) from (B, C, h, w, u, v): the images in the other order."""
    return volume.permute(0, 1, 4, 5, 2, 3)


def _along_first(conv: nn.Conv2d, volume: Tensor, window: int) -> Tensor:
    """``conv`` over h and w of ``volume`` (B, C, h, w, u, v), after the maximum over squares of
    ``window`` cells along u and v."""
    if window > 1:
        outer = volume.shape[:4]
        volume = F.max_pool2d(volume.flatten(0, 2), window, ceil_mode=True)
        volume = volume.unflatten(0, outer[:3])
    planes = volume.permute(0, 4, 5, 1, 2, 3)
    found = conv(planes.flatten(0, 2)).unflatten(0, planes.shape[:3])
    return found.permute(0, 3, 4, 5, 1, 2)


def _unit(features: Tensor) -> Tensor:
    """``features`` (B, C, S) divided by their length along C plus 1e-5."""
    features = at_least_float32(features)
    return features / (features.norm(dim=1, keepdim=True) + FEATURE_EPS)


def _levels(backbone: str, layers: Sequence[int]) -> list[list[int]]:
    """``layers`` by stage, the deepest first; NemfError for stages that make no pyramid."""
    table = tap_table(backbone)
    stages = sorted({table[k].stage for k in layers}, reverse=True)
    jumps = [next(table[k].jump_px for k in layers if table[k].stage == stage) for stage in stages]
    halving = all(a == 2 * b for a, b in pairwise(jumps))
    if stages[-1] == 0 or not halving or len(stages) > len(KERNEL_OF_STRIDE):
        raise NemfError(
            f"layers of CATs++ must lie in one to {len(KERNEL_OF_STRIDE)} stages of {backbone} "
            "after its stem, each of half the resolution of the one before, not in the stages "
            f"{sorted(stages)}"
        )
    return [[k for k in layers if table[k].stage == stage] for stage in stages]


def _check(sizes: Mapping[str, int], coarsest_jump: int) -> None:
    """NemfError for sizes that mean nothing."""
    for name, value in sizes.items():
        if not value >= 1:
            raise NemfError(f"{name} must be at least 1, not {value}")
    if sizes["query_dim"] % sizes["channels"]:
        raise NemfError(
            f"query_dim {sizes['query_dim']} must be a multiple of channels {sizes['channels']}"
        )
    if sizes["input_size"] % (2 * coarsest_jump):
        raise NemfError(
            f"input_size must be a multiple of {2 * coarsest_jump} px, twice the jump of the "
            f"deepest layer, not {sizes['input_size']}"
        )


def _sizes(
    path: Path, state: Mapping[str, Tensor], given: Mapping[str, int], jumps: Sequence[int]
) -> dict[str, int]:
    """The sizes that the tensors of a file have; NemfError where they disagree with ``given``."""
    try:
        found = {
            "channels": len(state[f"{HEAD}early_conv.0.conv4d.0.0.query_conv.weight"]),
            "affinity_dim": len(state[f"{HEAD}affinity_proj.0.0.weight"]),
            "query_dim": len(state[f"{HEAD}transformers.0.layer.0.qk.linear.weight"]) // 2,
            "input_size": len(state[f"{HEAD}x_normal"]) * 2 * jumps[-1],
        }
    except (KeyError, TypeError) as problem:
        raise NemfError(f"{path} is no CATs++ checkpoint ({problem})") from None
    check_given(path, found, given)
    return found


def _check_levels(
    path: Path, state: Mapping[str, Tensor], backbone: str, of_level: Sequence[Sequence[int]]
) -> None:
    """NemfError if a file was not trained on these layers: by the layers of each level and the
    channels of their last."""
    held = []
    while f"{HEAD}affinity_proj.{len(held)}.0.weight" in state:
        early = state.get(f"{HEAD}early_conv.{len(held)}.conv4d.0.0.query_conv.weight")
        project = state[f"{HEAD}affinity_proj.{len(held)}.0.weight"]
        if early is None or early.ndim != 4 or project.ndim != 4:
            raise NemfError(f"{path} is no CATs++ checkpoint (level {len(held)} is not whole)")
        held.append((early.shape[1], project.shape[1]))
    wanted = [(len(ids), tap_table(backbone)[ids[-1]].channels) for ids in of_level]
    if held != wanted:
        layers = [list(ids) for ids in of_level]
        raise NemfError(
            f"{path} was trained on levels of (layers, channels) {held}, but {layers} of "
            f"{backbone} are {wanted}: pass the backbone and layers it was trained with"
        )
