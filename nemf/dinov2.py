"""DINOv2 vision transformers and where their weights come from.

Source: Oquab et al., DINOv2 (arXiv 2304.07193). Own code rather than a library's, for the same
reasons as the ResNets: features before or after the last norm, both of the key layouts in which the
weights are published, every key checked, and nothing that could download. Models without register
tokens whose MLP is plain: ViT-S, ViT-B and ViT-L, all with patches of 14 px.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemf.checkpoints import fitting_state, read_content, read_state
from nemf.errors import NemfError, WeightsNotFound

log = logging.getLogger(__name__)

PATCH_PX = 14
PRETRAINED_PATCHES = 37  # the position embeddings are those of 37 x 37 patches, 518 px
FINETUNED_BLOCKS = 2


@dataclass(frozen=True)
class Architecture:
    """A vision transformer by its numbers: ``width`` channels, ``depth`` blocks."""

    width: int
    depth: int
    heads: int


ARCHITECTURES = {
    "dinov2_vits14": Architecture(384, 12, 6),
    "dinov2_vitb14": Architecture(768, 12, 12),
    "dinov2_vitl14": Architecture(1024, 24, 16),
    "dinov2_tiny": Architecture(24, 3, 2),  # nothing is published for it; for tests
}


class _Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        split = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*split)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))


class _Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = _Attention(width, heads)
        self.ls1 = _Scale(width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = _Mlp(width)
        self.ls2 = _Scale(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1.gamma * self.attn(self.norm1(x))
        return x + self.ls2.gamma * self.mlp(self.norm2(x))


class _Patches(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH_PX, PATCH_PX)


class DinoV2(nn.Module):
    """A DINOv2 transformer ``name``; its modules are named as the official code's.

    ``is_random`` says that weights were drawn, not learned (``Matcher.random_weights`` reads it).
    """

    is_random = False
    weights_file: Path | None = None  # where its weights came from

    def __init__(self, name: str) -> None:
        super().__init__()
        if name not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise NemfError(f"unknown transformer {name!r}: choose one of {known}")
        arch = ARCHITECTURES[name]
        self.name = name
        self.cls_token = nn.Parameter(torch.zeros(1, 1, arch.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + PRETRAINED_PATCHES**2, arch.width))
        self.patch_embed = _Patches(arch.width)
        self.blocks = nn.ModuleList(_Block(arch.width, arch.heads) for _ in range(arch.depth))
        self.norm = nn.LayerNorm(arch.width, eps=1e-6)

    def features(self, images: Tensor, *, normed: bool) -> Tensor:
        """Patch tokens of the last block, float32 (B, width, H / 14, W / 14), after the final
        LayerNorm if ``normed``, of ``images`` (B, 3, H, W) from :func:`nemf.backbones.normalise`.

        Position embeddings are resized bicubically to the very number of patches, as current
        versions of the transformers library do; the official code's factor is (n + 0.1) / 37, a
        small difference. ValueError for sides that are no multiple of 14 px.
        """
        batch, _, height, width = images.shape
        if height % PATCH_PX or width % PATCH_PX:
            raise ValueError(f"sides must be multiples of {PATCH_PX} px, not {height} x {width}")
        patches = self.patch_embed.proj(images)
        rows, cols = patches.shape[2:]
        patches = (patches + self._positions(rows, cols)).flatten(2).transpose(1, 2)
        first = (self.cls_token + self.pos_embed[:, :1]).expand(batch, -1, -1)
        x = torch.cat([first, patches], 1)
        for block in self.blocks:
            x = block(x)
        if normed:
            x = self.norm(x)
        return x[:, 1:].transpose(1, 2).unflatten(2, (rows, cols))

    def _positions(self, rows: int, cols: int) -> Tensor:
        """(1, width, rows, cols)"""
        side = PRETRAINED_PATCHES
        grid = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        if (rows, cols) == (side, side):
            return grid
        return F.interpolate(grid, (rows, cols), mode="bicubic", align_corners=False)


def build_dinov2(
    name: str,
    weights: str | Path | None = None,
    init: Literal["random"] | None = None,
    *,
    finetuned_weights: str | Path | None = None,
    seed: int = 0,
) -> DinoV2:
    """A DINOv2 transformer in evaluation mode, without gradients. Nothing is downloaded.

    Its weights come from ``weights``, a file written by torch with the official keys or those of
    the transformers library (``pytorch_model.bin``); from ``init="random"``, drawn from ``seed``
    without touching the global random state; or from the one file ``<name>*.pth`` in the folder
    ``$NEMF_WEIGHTS``. ``finetuned_weights``: a file of the Visual-AI benchmark, whose tensors
    replace those of the last two blocks.

    Raises NemfError for an unknown name, a file that does not fit (naming it and its keys) or a
    choice between several, WeightsNotFound when there is none.
    """
    if init not in (None, "random"):
        raise NemfError(f"init must be 'random' or left out, not {init!r}")
    if init and weights is not None:
        raise NemfError(f"give either weights={str(weights)!r} or init='random', not both")
    with torch.device("meta"):  # allocates nothing and draws no random numbers
        model = DinoV2(name)
    if init:
        model.is_random = True
        state = _random_state(model, seed)
    else:
        path = _found(name) if weights is None else Path(weights)
        state = _fitting_state(path, model)
        model.weights_file = path
    if finetuned_weights is not None:
        state |= _finetuned_state(Path(finetuned_weights), model)
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


def _found(name: str) -> Path:
    """The one file of ``name`` in $NEMF_WEIGHTS."""
    folder = os.environ.get("NEMF_WEIGHTS")
    if folder and not Path(folder).is_dir():
        raise NemfError(f"NEMF_WEIGHTS={folder} is not a folder: correct or unset it")
    paths = sorted(Path(folder).glob(f"{name}*.pth")) if folder else []
    if len(paths) > 1:
        names = ", ".join(map(str, paths))
        raise NemfError(f"several files could be the {name}: choose by weights= from {names}")
    if not paths:
        raise WeightsNotFound(
            f"no weights for {name}: put {name}*.pth (the official {name}_pretrain.pth or the "
            "pytorch_model.bin of the transformers library) into the folder of --weights "
            f"({f'NEMF_WEIGHTS={folder}' if folder else 'or set NEMF_WEIGHTS'}), or in Python pass "
            "weights=FILE or init='random'"
        )
    log.info("%s: weights from %s", name, paths[0])
    return paths[0]


def _random_state(model: DinoV2, seed: int) -> dict[str, Tensor]:
    """Normal weights that keep the size of what they are applied to, norms and scales of one."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, meta in model.state_dict().items():
        if key.endswith(("bias", "gamma")) or "norm" in key:
            state[key] = torch.full(meta.shape, 0.0 if key.endswith("bias") else 1.0)
        else:
            fan_in = meta[0].numel() if key.endswith("weight") else 4
            state[key] = torch.randn(meta.shape, generator=generator) * fan_in**-0.5
    return state


def _fitting_state(path: Path, model: DinoV2) -> dict[str, Tensor]:
    state = official_keys(read_state(path))
    state.pop("mask_token", None)  # used in training only
    wanted = model.state_dict()
    registers = ". Models with register tokens are not supported"
    return fitting_state(
        path,
        state,
        wanted,
        unexpected=[key for key in state if key not in wanted],
        holds=model.name,
        remark=registers if "register_tokens" in state else "",
    )


_RENAMED = [  # of the transformers library, to the official code's
    (r"^dinov2\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.(\w+)$", r"\1"),
    (r"^encoder\.layer\.", "blocks."),
    (r"^layernorm\.", "norm."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.attention\.", ".attn."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
]


def official_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` under the official code's keys, where it has those of the transformers library:
    queries, keys and values are one tensor there. Keys of neither stay as they are."""
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in _RENAMED:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    for key in [k for k in renamed if ".attn.query." in k]:
        parts = [key.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        shapes = {renamed[part].shape for part in parts if part in renamed}
        if len(shapes) == 1 and all(part in renamed for part in parts):
            joined = torch.cat([renamed.pop(part) for part in parts])
            renamed[key.replace(".query.", ".qkv.")] = joined
    return renamed


# One block's parameters in the order in which the transformers library's module lists them.
_BLOCK_ORDER = [
    f"{module}.{kind}"
    for module in (
        *("norm1", "attention.attention.query", "attention.attention.key"),
        *("attention.attention.value", "attention.output.dense", "layer_scale1"),
        *("norm2", "mlp.fc1", "mlp.fc2", "layer_scale2"),
    )
    for kind in (("lambda1",) if "scale" in module else ("weight", "bias"))
]


def _finetuned_state(path: Path, model: DinoV2) -> dict[str, Tensor]:
    """The last blocks out of a file {"dino": [tensor, ...]}, a list without names."""
    content = read_content(path)
    tensors = content.get("dino") if isinstance(content, dict) else None
    count = FINETUNED_BLOCKS * len(_BLOCK_ORDER)
    if (
        not isinstance(tensors, list)
        or len(tensors) != count
        or not all(isinstance(tensor, Tensor) for tensor in tensors)
    ):
        raise NemfError(f"{path}: holds no list 'dino' of {count} tensors, two blocks' parameters")
    depth = len(model.blocks)
    blocks = range(depth - FINETUNED_BLOCKS, depth)
    names = [f"encoder.layer.{b}.{key}" for b in blocks for key in _BLOCK_ORDER]
    state = official_keys(dict(zip(names, (t.detach() for t in tensors), strict=True)))
    prefixes = tuple(f"blocks.{b}." for b in blocks)
    wanted = {k: v for k, v in model.state_dict().items() if k.startswith(prefixes)}
    return fitting_state(
        path, state, wanted, unexpected=[], holds=f"the last two blocks of {model.name}"
    )
