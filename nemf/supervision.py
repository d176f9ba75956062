"""What trainable matchers learn from: batches of annotated pairs, and flow labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from nemf.errors import NemfError

CELL_REACH = 17 / 16  # a cell is taught by keypoints within so many cell widths of its centre


@dataclass(frozen=True, eq=False)
class PairBatch:
    """B annotated pairs, each image in a square frame of S pixels a side.

    ``src``, ``trg`` float32 (B, 3, S, S) as :func:`nemf.backbones.normalise` makes them;
    ``src_kps``, ``trg_kps`` float32 (B, K, 2) px of the frames, pixel centres at integers;
    ``valid`` bool (B, K), at least one a pair; ``seeds`` int64 (B,): whatever a loss draws for a
    pair, it draws from the pair's own seed, so that a batch equals its pairs one by one.
    ``following`` (1, 3, S, S): in a part of a batch, the source of the pair after it.
    """

    src: Tensor
    trg: Tensor
    src_kps: Tensor
    trg_kps: Tensor
    valid: Tensor
    seeds: Tensor
    following: Tensor | None = None

    def __len__(self) -> int:
        return len(self.valid)

    @property
    def side_px(self) -> int:
        return self.src.shape[-1]

    def check_side(self, side_px: int) -> None:
        """NemfError unless the frames are of ``side_px``, a matcher's ``input_size``."""
        if self.side_px != side_px:
            raise NemfError(f"frames of {self.side_px} px do not suit input_size {side_px}")

    def to(self, device: torch.device) -> PairBatch:
        following = None if self.following is None else self.following.to(device)
        return PairBatch(*(tensor.to(device) for tensor in self._per_pair()), following)

    def split(self, pairs: int) -> list[PairBatch]:
        """The batch in parts of at most ``pairs`` pairs, in order."""
        parts = list(zip(*(tensor.split(pairs) for tensor in self._per_pair()), strict=True))
        if len(parts) == 1:
            return [self]
        after = self.src[:1] if self.following is None else self.following
        following = [*(src[:1] for src, *_ in parts[1:]), after]
        return [PairBatch(*part, after) for part, after in zip(parts, following, strict=True)]

    @property
    def src_of_next(self) -> Tensor:
        """(B, 3, S, S): for every pair the source of the next one of the whole batch (in a circle),
        an image that it has nothing to do with. NemfError for a lone pair."""
        if self.following is not None:
            return torch.cat([self.src[1:], self.following])
        if len(self) == 1:
            raise NemfError(
                "pairs that are compared with each other come in batches of two or more"
            )
        return self.src.roll(-1, 0)

    def _per_pair(self) -> list[Tensor]:
        return [getattr(self, f.name) for f in fields(self) if f.name != "following"]


def collate_pairs(samples: Sequence[tuple[Tensor, Tensor, Tensor, Tensor, int]]) -> PairBatch:
    """A batch of (src, trg, src_kps (N, 2), trg_kps (N, 2), seed); keypoints are padded with zeros
    that ``valid`` leaves out."""
    src, trg, src_kps, trg_kps, seeds = zip(*samples, strict=True)
    most = max(len(kps) for kps in src_kps)
    valid = torch.zeros(len(samples), most, dtype=torch.bool)
    for row, kps in zip(valid, src_kps, strict=True):
        row[: len(kps)] = True
    padded = [
        torch.nn.utils.rnn.pad_sequence(list(kps), batch_first=True) for kps in (src_kps, trg_kps)
    ]
    return PairBatch(torch.stack(src), torch.stack(trg), *padded, valid, torch.tensor(seeds))


def flow_labels(
    batch: PairBatch, feature_size: int, official: bool = False
) -> tuple[Tensor, Tensor]:
    """What keypoints say of the flow on the target's grid: (B, 2, h, w) cells and bool (B, h, w).

    A cell is taught by all target keypoints no further than ``CELL_REACH`` cell widths from its
    centre on either axis (CATs' boxes, of the trunk's nominal receptive field): mean source minus
    mean target keypoint. ``official`` takes the source keypoint of the last of them instead of
    their mean, and a displacement of exactly (0, 0) as no label, as CATs' code does.

    Convention: the centre of cell c of jump j is at pixel (c + 1/2) j; displacements are x, y in
    cells.
    """
    jump = batch.side_px / feature_size
    kps = batch.trg_kps / jump
    centres = torch.arange(feature_size, device=kps.device) + 0.5
    near_x, near_y = ((kps[..., None, k] - centres).abs() <= CELL_REACH for k in (0, 1))
    inside = (near_y[..., :, None] & near_x[..., None, :]) & batch.valid[..., None, None]
    share = inside / inside.sum(1, keepdim=True).clamp_min(1)  # (B, K, h, w)
    target = torch.einsum("bkhw,bkc->bchw", share, kps)
    if official:
        number = torch.arange(1, inside.shape[1] + 1, device=kps.device)[:, None, None]
        last = (inside * number).amax(1, keepdim=True) == number
        share = (last & inside).to(share)
    flow = torch.einsum("bkhw,bkc->bchw", share, batch.src_kps / jump) - target
    labelled = inside.any(1)
    if official:
        labelled &= (flow != 0).any(1)
    return flow * labelled[:, None], labelled


def end_point_error(flow: Tensor, labels: Tensor, labelled: Tensor) -> Tensor:
    """Sum over ``labelled`` (B, h, w) cells of the distance between ``flow`` and ``labels``
    (B, 2, h, w). Its gradient is zero where they agree exactly."""
    apart = (flow.float() - labels).permute(0, 2, 3, 1)[labelled]
    return torch.linalg.vector_norm(apart, dim=1).sum()
