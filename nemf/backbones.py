"""ResNet trunks, what can be tapped from them, and where their weights come from.

A *tap* is named by a hyperpixel id: 0 is the output of the stem's max-pool, k >= 1 the k-th
residual block counted over all stages, taken as the sum branch + identity before the block's last
ReLU (Min et al., Hyperpixel Flow, ICCV 2019). Module and key names are torchvision's, so that its
ImageNet files load; a strided bottleneck strides on its 3x3 convolution, as torchvision's do.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import sys
import urllib.error
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn

from nemf.checkpoints import fitting_state, is_counter, one_line, read_state
from nemf.datasets.index import default_cache
from nemf.errors import NemfError, WeightsNotFound
from nemf.pairs import Image, check_pixels

log = logging.getLogger(__name__)

PUBLISHED_URL = "https://download.pytorch.org/models/"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Architecture:
    """A ResNet by its numbers: ``blocks`` per stage, ``width`` channels of the first stage's 3x3
    convolutions. ``published``: file name of torchvision's V1 ImageNet weights; it ends in the
    start of their SHA-256. ``fcn``: as below GluonCV's segmentation networks, a stem of three 3x3
    convolutions to twice the width, stages from the third on dilated instead of strided."""

    bottleneck: bool
    blocks: tuple[int, ...]
    width: int = 64
    published: str | None = None
    fcn: bool = False

    def dilation(self, stage: int, block: int) -> int:
        """Of the 3x3 convolution of a bottleneck; the first block of a stage has its input's."""
        if not self.fcn or stage < 3:
            return 1
        return 2 ** (stage - 2 - (block == 0))


ARCHITECTURES = {
    "resnet18": Architecture(False, (2, 2, 2, 2), published="resnet18-f37072fd.pth"),
    "resnet50": Architecture(True, (3, 4, 6, 3), published="resnet50-0676ba61.pth"),
    "resnet101": Architecture(True, (3, 4, 23, 3), published="resnet101-63fe2227.pth"),
    # Small enough to be trained and to run anywhere; for the synthetic stand-ins.
    "resnet_small": Architecture(False, (2, 2, 2), width=24),
    "fcn_resnet101": Architecture(True, (3, 4, 23, 3), fcn=True),
}


@dataclass(frozen=True)
class Tap:
    """One tappable layer: its ``stage`` (0 = stem), ``channels``, and, in pixels of the network's
    input, its ``jump_px`` (distance of neighbouring cells) and ``field_px`` (receptive field).

    The receptive field of cell (row y, column x) has its middle exactly at input pixel
    (x * jump_px, y * jump_px): all strided kernels are odd and padded by half their size.
    """

    stage: int
    channels: int
    jump_px: int
    field_px: int


@cache
def tap_table(name: str) -> tuple[Tap, ...]:
    """Every tap of an architecture, indexed by hyperpixel id. NemfError for an unknown name."""
    arch = _architecture(name)
    jump, field = 2, 7  # after the 7x7 stride-2 convolution
    if arch.fcn:
        field = 3 + 2 * 2 * jump  # after three 3x3, the first of stride 2
    field += 2 * jump
    jump *= 2  # after the 3x3 stride-2 max-pool
    table = [Tap(0, arch.width * (2 if arch.fcn else 1), jump, field)]
    for stage, n_blocks in enumerate(arch.blocks, start=1):
        channels = arch.width * 2 ** (stage - 1) * (4 if arch.bottleneck else 1)
        for block in range(n_blocks):
            field += 2 * jump * arch.dilation(stage, block)  # the 3x3 that may stride
            if stage > 1 and block == 0 and not (arch.fcn and stage > 2):
                jump *= 2
            if not arch.bottleneck:
                field += 2 * jump  # the second 3x3
            table.append(Tap(stage, channels, jump, field))
    return tuple(table)


def last_of_stage(name: str, stage: int) -> int:
    """The hyperpixel id with which a stage of ``name`` ends."""
    return max(k for k, tap in enumerate(tap_table(name)) if tap.stage == stage)


def check_ids(name: str, ids: Sequence[int]) -> tuple[int, ...]:
    """``ids`` as a tuple; NemfError unless they are increasing hyperpixel ids of ``name``."""
    last = len(tap_table(name)) - 1
    if (
        not isinstance(ids, Sequence)
        or not ids
        or not all(isinstance(k, int) and 0 <= k <= last for k in ids)
        or any(a >= b for a, b in pairwise(ids))
    ):
        raise NemfError(
            f"layers must be increasing ids from 0 to {last} of {name}, not {ids!r}; "
            "give ones of this backbone by layers="
        )
    return tuple(ids)


class _Block(nn.Module):
    """Residual block. ``forward`` returns branch + identity *before* the final ReLU."""

    def __init__(
        self, c_in: int, c_mid: int, stride: int, bottleneck: bool, dilation: int = 1
    ) -> None:
        super().__init__()
        c_out = c_mid * (4 if bottleneck else 1)
        kernels = (1, 3, 1) if bottleneck else (3, 3)
        strides = (1, stride, 1) if bottleneck else (stride, 1)
        channels = (c_in, c_mid, c_mid, c_out) if bottleneck else (c_in, c_mid, c_out)
        self.depth = len(kernels)
        for i, (kernel, step) in enumerate(zip(kernels, strides, strict=True)):
            reach = dilation if kernel == 3 else 1
            conv = nn.Conv2d(
                *(channels[i], channels[i + 1], kernel, step),
                padding=kernel // 2 * reach,
                dilation=reach,
                bias=False,
            )
            self.add_module(f"conv{i + 1}", conv)
            self.add_module(f"bn{i + 1}", nn.BatchNorm2d(channels[i + 1]))
        self.downsample = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        branch = x
        for i in range(1, self.depth + 1):
            branch = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(branch))
            if i < self.depth:
                branch = branch.relu()
        return branch + (x if self.downsample is None else self.downsample(x))


class ResNet(nn.Module):
    """Stem and residual blocks of ``name`` up to hyperpixel id ``upto`` (None: all).

    ``classifier`` adds ``fc``, the ImageNet classifier of the mean of the last block's output after
    its ReLU; ValueError for a trunk that ends earlier. An ordinary trainable module until
    :meth:`freeze` is called. ``is_random`` says that its weights were drawn, not learned
    (``Matcher.random_weights`` reads it).
    """

    is_random = False
    weights_file: Path | None = None  # where its weights came from

    def __init__(self, name: str, upto: int | None = None, classifier: bool = False) -> None:
        super().__init__()
        table, arch = tap_table(name), _architecture(name)
        self.name = name
        self.upto = len(table) - 1 if upto is None else upto
        self.frozen = False
        check_ids(name, [self.upto])
        self.conv1 = (
            _deep_stem(arch.width)
            if arch.fcn
            else nn.Conv2d(3, arch.width, 7, 2, padding=3, bias=False)
        )
        self.bn1 = nn.BatchNorm2d(table[0].channels)
        for k in range(1, self.upto + 1):
            tap, before = table[k], table[k - 1]
            layer = f"layer{tap.stage}"
            if tap.stage != before.stage:
                self.add_module(layer, nn.Sequential())
            block = _Block(
                before.channels,
                arch.width * 2 ** (tap.stage - 1),
                tap.jump_px // before.jump_px,
                arch.bottleneck,
                arch.dilation(tap.stage, len(getattr(self, layer))),
            )
            getattr(self, layer).append(block)
        if classifier:
            if self.upto != len(table) - 1:
                raise ValueError(f"a classifier needs all of {name}, not only id {self.upto}")
            self.fc = nn.Linear(table[-1].channels, IMAGENET_CLASSES)

    def freeze(self, weights: bool = True) -> ResNet:
        """Stay in evaluation mode (batch norm uses its running statistics), even when a surrounding
        module is put into training mode, and stop gradients; without ``weights`` they flow."""
        self.requires_grad_(not weights)
        self.eval()
        self.frozen = True
        return self

    def train(self, mode: bool = True) -> ResNet:
        return super().train(mode and not self.frozen)

    def taps(self, images: Tensor, ids: Sequence[int]) -> list[Tensor]:
        """The taps ``ids``, in that order, of ``images`` (B, 3, H, W) from :func:`normalise`.

        Tap k is (B, channels, ceil(H / jump), ceil(W / jump)) by :func:`tap_table`. Computes no
        deeper than the largest id. ValueError for ids that this trunk does not hold.
        """
        wanted = set(ids)
        if not wanted or not wanted <= set(range(self.upto + 1)):
            raise ValueError(f"this {self.name} holds the taps 0 to {self.upto}, not {list(ids)}")
        x = self.bn1(self.conv1(images)).relu()
        x = nn.functional.max_pool2d(x, 3, 2, padding=1)
        found = {0: x}
        for k, block in enumerate(self._blocks(max(wanted)), start=1):
            total = block(x)
            if k in wanted:
                found[k] = total
            x = total.relu()
        return [found[k] for k in ids]

    def _blocks(self, count: int) -> Iterator[nn.Module]:
        for k in range(1, count + 1):
            tap = tap_table(self.name)[k]
            first = next(i for i, t in enumerate(tap_table(self.name)) if t.stage == tap.stage)
            yield getattr(self, f"layer{tap.stage}")[k - first]


def _deep_stem(width: int) -> nn.Sequential:
    """Three 3x3 convolutions in place of the 7x7, the last without its batch norm (bn1 follows)."""
    channels, layers = (3, width, width, 2 * width), []
    for i, (c_in, c_out) in enumerate(pairwise(channels)):
        layers.append(nn.Conv2d(c_in, c_out, 3, 1 if i else 2, padding=1, bias=False))
        layers += [nn.BatchNorm2d(c_out), nn.ReLU()] if i < 2 else []
    return nn.Sequential(*layers)


def normalise(pixels: np.ndarray) -> Tensor:
    """uint8 (H, W, 3) RGB to float32 (1, 3, H, W): scaled to 0..1, ImageNet mean and deviation.

    Raises ValueError for any other array.
    """
    check_pixels(pixels)
    chw = torch.tensor(np.ascontiguousarray(pixels)).permute(2, 0, 1).float() / 255
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return ((chw - mean[:, None, None]) / std[:, None, None])[None].contiguous()


def squashed_frame(image: Image, side_px: int) -> Tensor:
    """float32 (1, 3, side_px, side_px): the canvas of ``image``, squashed by Pillow (bilinear; it
    smooths where it shrinks) and :func:`normalise`-d."""
    picture = PIL.Image.fromarray(np.ascontiguousarray(image.on_canvas()))
    squashed = picture.resize((side_px, side_px), PIL.Image.Resampling.BILINEAR)
    return normalise(np.asarray(squashed))


def build_backbone(
    name: str,
    weights: str | Path | None = None,
    init: Literal["random"] | None = None,
    *,
    upto: int,
    seed: int = 0,
    classifier: bool = False,
) -> ResNet:
    """A frozen trunk of ``name``, deep enough for hyperpixel id ``upto``; ``classifier``: with
    ``fc``, which only the whole trunk can have.

    Its weights come from the first of these that is given:

    1. ``weights``: a file with torchvision's keys, bare or under "state_dict". It must hold every
       tensor up to ``upto`` and the classifier if it is wanted; anything else of the architecture
       may be there or not;
    2. ``init="random"``: drawn from ``seed``; the global random state is not touched;
    3. the one file ``<name>*.pth`` in the folder ``$NEMF_WEIGHTS`` that holds enough;
    4. torchvision's ImageNet file from the cache, or downloaded if ``NEMF_DOWNLOAD=1``.

    Raises NemfError for an unknown name, a file that does not fit (naming it and its keys), a
    choice between several files, and when there is none.
    """
    if init not in (None, "random"):
        raise NemfError(f"init must be 'random' or left out, not {init!r}")
    if init and weights is not None:
        raise NemfError(f"give either weights={str(weights)!r} or init='random', not both")
    with torch.device("meta"):  # allocates nothing and draws no random numbers
        model = ResNet(name, upto, classifier)
    if init:
        model.is_random = True
        state = _random_state(model, seed)
    elif weights is not None:
        state = _fitting_state(Path(weights), model)
        model.weights_file = Path(weights)
    else:
        state = _found_state(model)
    model.load_state_dict(state, assign=True)
    return model.freeze()


def trunk_of(
    name: str, init: Literal["head", "random"], weights: str | Path | None, upto: int
) -> ResNet:
    """The trunk of a model whose head is drawn: from ``weights``, else, for "head", from where
    :func:`build_backbone` looks, else drawn as well."""
    draw = init == "random" and weights is None
    return build_backbone(name, weights, "random" if draw else None, upto=upto)


def published_weights(name: str, download: bool, cache_dir: Path) -> Path:
    """torchvision's ImageNet (V1) file of ``name`` in ``cache_dir``, its SHA-256 verified.

    Fetched from ``PUBLISHED_URL`` only if it is absent and ``download`` is true. NemfError if there
    is no such file, the download fails, or the file is not the published one.
    """
    file_name = _architecture(name).published
    if file_name is None:
        raise NemfError(f"no weights are published for {name}: give a file with weights=")
    path = cache_dir / file_name
    prefix = path.stem.rsplit("-", 1)[1]
    if not path.exists():
        if not download:
            raise NemfError(f"{path} is not there and downloading is off: use --download")
        cache_dir.mkdir(parents=True, exist_ok=True)
        url = PUBLISHED_URL + file_name
        log.info("downloading %s to %s", url, cache_dir)
        try:
            torch.hub.download_url_to_file(url, str(path), prefix, sys.stderr.isatty())
        except (urllib.error.URLError, OSError, RuntimeError) as problem:
            raise NemfError(
                f"{url} could not be downloaded ({one_line(problem)}): fetch it by hand and "
                "pass it as weights="
            ) from None
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if not digest.startswith(prefix):
        raise NemfError(
            f"{path} is damaged: its SHA-256 starts with {digest[: len(prefix)]}, not {prefix}; "
            "delete it"
        )
    return path


def _architecture(name: str) -> Architecture:
    if name not in ARCHITECTURES:
        raise NemfError(f"unknown backbone {name!r}: choose one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def _found_state(model: ResNet) -> dict[str, Tensor]:
    """The state from $NEMF_WEIGHTS, the cache or a permitted download."""
    folder = os.environ.get("NEMF_WEIGHTS")
    problems: list[str] = []
    states: dict[Path, dict[str, Tensor]] = {}
    if folder:
        if not Path(folder).is_dir():
            raise NemfError(f"NEMF_WEIGHTS={folder} is not a folder: correct or unset it")
        for path in sorted(Path(folder).glob(f"{model.name}*.pth")):
            read_state(path)  # a file that cannot be read is an error, one that ends early is not
            try:
                states[path] = _fitting_state(path, model)
            except NemfError as problem:
                problems.append(str(problem))
    if len(states) > 1:
        names = ", ".join(map(str, states))
        raise NemfError(
            f"several files could be the {model.name}: leave one of them in that folder, or choose "
            f"by weights= from {names}"
        )
    if states:
        path, state = states.popitem()
        log.info("%s: weights from %s", model.name, path)
        model.weights_file = path
        return state
    published = ARCHITECTURES[model.name].published
    cache_dir = Path(folder) if folder else default_cache() / "weights"
    download = os.environ.get("NEMF_DOWNLOAD") == "1"
    if published and (download or (cache_dir / published).exists()):
        model.weights_file = published_weights(model.name, download, cache_dir)
        return _fitting_state(model.weights_file, model)
    given = f"NEMF_WEIGHTS={folder}" if folder else "or set NEMF_WEIGHTS"
    ways = [f"put {model.name}*.pth into the folder of --weights ({given})"]
    if published:
        ways.append("allow the download with --download (NEMF_DOWNLOAD=1)")
    ways.append("in Python pass weights=FILE or init='random'")
    found = f" ({'; '.join(problems)})" if problems else ""
    raise WeightsNotFound(f"no weights for {model.name}{found}: {', or '.join(ways)}")


def _random_state(model: ResNet, seed: int) -> dict[str, Tensor]:
    """He-initialised convolutions, identity batch norms, a scaled normal classifier. Drawn in the
    order of the layers, so a deeper trunk of the same seed begins with the same weights."""
    generator = torch.Generator().manual_seed(seed)
    last_norm = "bn3.weight" if ARCHITECTURES[model.name].bottleneck else "bn2.weight"
    state = {}
    for key, meta in model.state_dict().items():
        if meta.ndim == 4:
            std = math.sqrt(2 / math.prod(meta.shape[1:]))
            state[key] = torch.randn(meta.shape, generator=generator) * std
        elif meta.ndim == 2:
            state[key] = torch.randn(meta.shape, generator=generator) / math.sqrt(meta.shape[1])
        elif key.endswith(("running_var", "weight")):
            # Half-weight branches: the sums of a deep trunk stay of moderate size.
            state[key] = torch.full(meta.shape, 0.5 if key.endswith(last_norm) else 1.0)
        else:
            state[key] = torch.zeros(meta.shape, dtype=meta.dtype)
    return state


def _fitting_state(path: Path, model: ResNet) -> dict[str, Tensor]:
    """The tensors of a file that ``model`` needs, float32; NemfError if it does not fit."""
    state = read_state(path)
    wanted, shapes = model.state_dict(), _shapes(model.name)
    parts, known = {key.split(".")[0] for key in wanted}, shapes.keys() | wanted.keys()
    classifier = " and its classifier" if "fc" in parts else ""
    return fitting_state(
        path,
        state,
        wanted,
        unexpected=[k for k in state if k.split(".")[0] in parts and k not in known],
        holds=f"{model.name} up to layer id {model.upto}{classifier}",
        remark=". " + _resemblance(state, model.name),
    )


def fitting_model(
    path: Path,
    state: Mapping[str, Tensor],
    model: nn.Module,
    trunk: ResNet,
    prefix: str,
    holds: str,
    dropped: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """The tensors of a whole model's checkpoint that ``model`` needs, float32.

    Its ``trunk`` lies under ``prefix``; layers of the trunk that are deeper than the model's, the
    trunk's classifier and keys that begin with one of ``dropped`` may be there and are left out.
    NemfError "<path> does not hold <holds>" for anything else that does not fit.
    """
    wanted = model.state_dict()
    known = wanted.keys() | {prefix + key for key in _shapes(trunk.name)}
    may_be_there = (f"{prefix}fc.", *dropped)
    unexpected = [k for k in state if k not in known and not k.startswith(may_be_there)]
    return fitting_state(path, state, wanted, unexpected=unexpected, holds=holds)


def backbone_of(
    path: Path, fitting: Sequence[str], given: str | None, default: str = "resnet101"
) -> str:
    """The name of the trunk of a model's checkpoint whose tensors suit the architectures
    ``fitting``: the one ``given``, else the first of them, else ``default`` (what does not fit is
    then for the check key by key to say). NemfError where ``given`` is unknown or none of them."""
    if given is not None:
        _architecture(given)
        if fitting and given not in fitting:
            raise NemfError(
                f"{path} was made with {' or '.join(fitting)}, not {given}: leave backbone out"
            )
        return given
    return fitting[0] if fitting else default


def check_finite(features: Tensor, image: Image) -> None:
    """NemfError naming the image if its features are not all finite."""
    if not torch.isfinite(features).all():
        raise NemfError(
            f"the features of image {image.hash[:12]} are not finite: the weights are damaged or "
            "their values too large"
        )


def resembling(state: Mapping[str, Tensor]) -> list[str]:
    """The architectures that every tensor of a trunk (a classifier aside) fits; none if there is no
    tensor."""
    trunk = {k: v.shape for k, v in state.items() if not k.startswith("fc.") and not is_counter(k)}
    return [
        name
        for name in ARCHITECTURES
        if trunk and all(_shapes(name).get(k) == shape for k, shape in trunk.items())
    ]


def _resemblance(state: dict[str, Tensor], asked: str) -> str:
    """Which architectures every trunk tensor of the file fits, in words."""
    alike = resembling(state)
    if not alike:
        return "It resembles none of " + ", ".join(ARCHITECTURES)
    if asked in alike:
        return f"It looks like a {asked} that ends earlier"
    return f"It looks like {' or '.join(alike)}"


@cache
def _shapes(name: str) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {k: v.shape for k, v in ResNet(name).state_dict().items()}
