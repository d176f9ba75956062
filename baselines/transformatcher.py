"""TransforMatcher (Kim et al., CVPR 2022): additive attention between all matches of two images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.soft_transfer import PAPER_CELLS, SoftTransfer, read_roles
from nemf.aggregation import at_least_float32, correlate
from nemf.backbones import check_ids, tap_table
from nemf.cards import MatcherCard
from nemf.checkpoints import check_given, check_sources
from nemf.convolution import doubled
from nemf.errors import NemfError
from nemf.matcher import Role

CARD = MatcherCard(
    name="transformatcher",
    title="TransforMatcher",
    paper="TransforMatcher: Match-to-Match Attention for Semantic Correspondence (CVPR)",
    year=2022,
    arxiv="2205.11634",
    licence_of_original="none stated",
    backbone="ResNet-101",
    input_size="240x240",
    training="keypoints of SPair-71k or PF-PASCAL",
    official_protocol="chm-paper@1",
    description="Correlations of many layers, one token a match, refined by additive attention.",
    flow_resolution="30",
    weights_at="none published",
)

PAPER_SIZES = {"width": 16, "depth": 6, "heads": 8}
HEAD_WIDTH = 4
FEATURE_STAGES = (3, 4)  # of the trunk
MLP_RATIO = 4
# Where training begins: scores are the mean correlation times this, the sharpness that the
# read-out's softmax over hundreds of cells needs.
FIRST_GAIN = 40.0
# In the official files, but in no computation, or constant.
UNUSED = ("match2match.posenc",)
CONSTANT = ".pos_emb.freqs"


class AdditiveAttention(nn.Module):
    """Attention of N matches with each other at a cost that grows with N only: all queries are
    summed up in one, all keys in another (sec. 3.2, after Fastformer).

    The parameters' names and shapes are the official code's.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        inner = heads * HEAD_WIDTH
        self.to_qkv = nn.Linear(width, 3 * inner, bias=False)
        self.to_q_attn_logits = nn.Linear(HEAD_WIDTH, 1, bias=False)
        self.to_k_attn_logits = nn.Linear(HEAD_WIDTH // 2, 1, bias=False)
        self.to_r = nn.Linear(HEAD_WIDTH // 2, HEAD_WIDTH)
        self.to_out = nn.Linear(inner, width)

    def forward(self, x: Tensor, sign: Tensor) -> Tensor:
        """Tokens (B, N, width), same shape out; ``sign`` (N,): what the position code makes of each
        (:func:`rotary_sign`)."""
        q, k, v = (y.unflatten(2, (-1, HEAD_WIDTH)) for y in self.to_qkv(x).chunk(3, 2))
        query = _summed_up(q, self.to_q_attn_logits(q), sign)
        key = _summed_up(k, self.to_k_attn_logits(_pair_sums(k * query)), sign)
        r = self.to_r(_pair_sums(v * key)) + q
        return self.to_out(r.flatten(2))


class PreNorm(nn.Module):
    """``fn`` of the normalised tokens."""

    def __init__(self, width: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fn = fn

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        return self.fn(self.norm(x), *more)


class MatchToMatch(nn.Module):
    """Correlations of several layers (B, h, w, h, w, levels) to a score a match (B, h, w, h, w).

    The parameters' names and shapes are the official code's.
    """

    def __init__(self, levels: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        # The position of a module in these is part of the official names.
        self.to_embedding = nn.Sequential(nn.Identity(), nn.Linear(levels, width))
        self.trans_nc = nn.ModuleList(
            nn.ModuleList([
                PreNorm(width, AdditiveAttention(width, heads)),
                PreNorm(
                    width,
                    nn.Sequential(
                        nn.Linear(width, MLP_RATIO * width),
                        nn.GELU(),
                        nn.Linear(MLP_RATIO * width, width),
                    ),
                ),
            ])
            for _ in range(depth)
        )  # fmt: skip
        self.to_original = nn.Sequential(nn.Linear(width, 1))

    def forward(self, correlations: Tensor) -> Tensor:
        shape = correlations.shape[:-1]
        sign = rotary_sign(shape[1:]).to(correlations)
        x = self.to_embedding(correlations.flatten(1, 4))
        for attention, mlp in self.trans_nc:
            x = x + attention(x, sign)
            x = x + mlp(x)
        return self.to_original(x).view(shape)


class TransforMatcher(SoftTransfer):
    """TransforMatcher: the correlations of a cell of the query image and one of the reference image
    in many layers are a token; all tokens attend to each other. The paper's "source" is our query
    image, its "target" our reference image; each has a trunk of its own.

    ``layers``: increasing hyperpixel ids of ``backbone`` (taken after the ReLU), by default every
    block of its third and fourth stage, as in the paper.

    Weights come from exactly one of these (none have been published):

    - ``weights``: a checkpoint of ours, or a file of the official code's names, whose trunk of
      twice the width is cut in two. ``width``, ``depth`` and ``heads`` are read from the tensors;
      given as keywords they must agree;
    - ``init``: "head", for training, draws the rest from ``init_seed``, sizes that are not given
      are the paper's; the scores begin as the mean correlation. Both trunks come from
      ``backbone_weights`` or from where :func:`nemf.backbones.build_backbone` looks. "random" draws
      them too, if ``backbone_weights`` does not give them.

    Training leaves the trunks as they are unless ``train_trunk``; their batch norms keep their
    statistics either way.

    How points are read: see :class:`baselines.soft_transfer.SoftTransfer`.

    Raises WeightsNotFound if neither ``weights`` nor ``init`` is given, NemfError for a file or
    sizes that do not fit.
    """

    card = CARD
    peak_sigma = 10 / PAPER_CELLS
    reach, training_reach = 0.05, 0.1

    def __init__(
        self,
        backbone: str = "resnet101",
        layers: Sequence[int] | None = None,
        width: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        weights: str | Path | None = None,
        init: Literal["head", "random"] | None = None,
        backbone_weights: str | Path | None = None,
        input_size: int = 240,
        train_trunk: bool = False,
        init_seed: int = 0,
    ) -> None:
        table = tap_table(backbone)
        if layers is None:
            layers = [k for k, tap in enumerate(table) if tap.stage in FEATURE_STAGES]
        ids = check_ids(backbone, layers)
        super().__init__(backbone, ids[-1], input_size)
        self.layers = ids
        check_sources("transformatcher", weights, init, backbone_weights)
        given = {"width": width, "depth": depth, "heads": heads}
        given = {name: value for name, value in given.items() if value is not None}
        if weights is not None:
            state = _read(Path(weights))
            sizes = _sizes(Path(weights), state, given)
        else:
            sizes = PAPER_SIZES | given
        for name, value in sizes.items():
            if value < 1:
                raise NemfError(f"{name} must be at least 1, not {value}")
        self.channels = [table[k].channels for k in self.layers]

        with torch.device("meta"):
            self.match2match = MatchToMatch(len(self.layers), **sizes)
        if weights is not None:
            self._take(Path(weights), state)
        else:
            self._begin_trunks(init, backbone_weights)
            self._draw_head(init_seed)
        self._freeze_trunks(train_trunk)

    def levels(self, frames: Tensor, role: Role) -> Tensor:
        """(B, C, S): the layers of ``frames`` (B, 3, input_size, input_size) from
        :func:`nemf.backbones.normalise`, each of unit length along its channels and then brought to
        the S cells of the grid (bilinear, align_corners=True), one after the other along C."""
        trunk = self.backbone.query if role == "query" else self.backbone.reference
        size = (self.cells, self.cells)
        found = []
        for tap in trunk.taps(frames, self.layers):
            features = F.normalize(at_least_float32(tap.relu()), dim=1)
            found.append(F.interpolate(features, size, mode="bilinear", align_corners=True))
        return torch.cat(found, 1).flatten(2)

    def scores(self, query: Tensor, reference: Tensor) -> Tensor:
        """(B, Q, R): the refined scores of every query cell (row) and reference cell, on grids of
        twice ``cells`` a side, from :meth:`levels` of both (sec. 3.1 to 3.3)."""
        n = self.cells
        with torch.autocast(query.device.type, enabled=False):
            sides = (x.split(self.channels, 1) for x in (query, reference))
            correlations = [correlate(*pair) for pair in zip(*sides, strict=True)]
            volume = torch.stack(correlations, 3).clamp_min(0)
            volume = volume.unflatten(2, (n, n)).unflatten(1, (n, n))
            return doubled(self.match2match(volume)).flatten(3).flatten(1, 2)

    @torch.no_grad()
    def _draw_head(self, seed: int) -> None:
        """Random weights as layers of torch begin, but for what makes the scores the mean
        correlation times ``FIRST_GAIN``: that is the first feature, alone in the result, and blocks
        add nothing yet."""
        generator = torch.Generator().manual_seed(seed)
        head = self.match2match.to_empty(device="cpu")
        head.is_random = True
        for module in head.modules():
            if isinstance(module, nn.Linear):
                bound = module.in_features**-0.5
                for parameter in module.parameters():
                    parameter.uniform_(-bound, bound, generator=generator)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        embedding, result = head.to_embedding[1], head.to_original[0]
        embedding.weight[0] = 1 / len(self.layers)
        embedding.bias[0] = 0
        result.weight.zero_()
        result.weight[0, 0] = FIRST_GAIN
        result.bias.zero_()
        for attention, mlp in head.trans_nc:
            for last in (attention.fn.to_out, mlp.fn[-1]):
                last.weight.zero_()
                last.bias.zero_()


def rotary_sign(sides: Sequence[int]) -> Tensor:
    """float32 (N,): what the rotary position code multiplies the N matches of a volume of these
    sides by, 1 or -1, those of neighbours differing (a chessboard in four dimensions).

    The official code turns the channels of token t, numbered through the volume, by t pi and
    5 t pi. For whole t that is (-1) ** t (its sines are rounding noise), and for odd sides, as the
    paper's 15, this chessboard. For even sides t's sign would be that of the last coordinate alone;
    the chessboard is kept.
    """
    sign = torch.ones(1)
    for side in sides:
        along = 1 - 2 * (torch.arange(side) % 2)
        sign = (sign[:, None] * along).flatten()
    return sign


def _summed_up(x: Tensor, logits: Tensor, sign: Tensor) -> Tensor:
    """(B, 1, heads, HEAD_WIDTH): the mean of ``x`` (B, N, heads, HEAD_WIDTH) under its position
    code, weighted by the softmax of ``logits`` (B, N, heads, 1) over the tokens."""
    weight = (logits * HEAD_WIDTH**-0.5).softmax(1) * sign[:, None, None]
    return (weight * x).sum(1, keepdim=True)


def _pair_sums(x: Tensor) -> Tensor:
    """Neighbouring channels added in pairs, (..., C) to (..., C / 2)."""
    return x.unflatten(-1, (-1, 2)).sum(-1)


def _read(path: Path) -> dict[str, Tensor]:
    state = read_roles(path, ("fc.",))
    return {k: v for k, v in state.items() if k not in UNUSED and not k.endswith(CONSTANT)}


def _sizes(path: Path, state: Mapping[str, Tensor], given: Mapping[str, int]) -> dict[str, int]:
    """The sizes that the tensors of a file have; NemfError where they disagree with those
    ``given``."""
    try:
        width = len(state["match2match.to_embedding.1.weight"])
        n_inner = len(state["match2match.trans_nc.0.0.fn.to_qkv.weight"]) // 3
    except (KeyError, TypeError) as problem:
        raise NemfError(f"{path} is no TransforMatcher checkpoint ({problem})") from None
    blocks = {key.split(".")[2] for key in state if key.startswith("match2match.trans_nc.")}
    found = {"width": width, "depth": len(blocks), "heads": n_inner // HEAD_WIDTH}
    check_given(path, found, given)
    return found
