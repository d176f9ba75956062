"""The datasets of the suite by name. Torch-free."""

from __future__ import annotations

from importlib import import_module
from typing import Any

CATALOGUE = {
    "spair": "nemf.datasets.spair:SPair71k",
    "pfpascal": "nemf.datasets.pfpascal:PFPascal",
    "pfwillow": "nemf.datasets.pfwillow:PFWillow",
    "animalpose": "nemf.datasets.spair:AnimalPose",
    "folder": "nemf.datasets.folder:FolderOfPairs",
}


def dataset_class(name: str) -> type:
    """The reader registered under that name; NemfError naming the known ones otherwise."""
    from nemf.errors import NemfError, did_you_mean

    if name not in CATALOGUE:
        raise NemfError(
            f"unknown dataset {name!r}{did_you_mean(name, CATALOGUE)}: choose one of "
            f"{', '.join(CATALOGUE)}"
        )
    module, _, cls = CATALOGUE[name].partition(":")
    return getattr(import_module(module), cls)


def available_datasets() -> dict[str, dict[str, Any]]:
    """Title, layout, folder names, splits and official sizes of every dataset, by name."""
    described = {}
    for name in CATALOGUE:
        cls = dataset_class(name)
        described[name] = {
            "title": cls.title,
            "layout": getattr(cls, "layout", None),
            "folders": list(cls.folders),
            "splits": list(cls.splits),
            "official_pairs": dict(cls.official),
        }
    return described
