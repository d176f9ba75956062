"""MMEngine registries of the suite: what a config's ``type=`` can name.

Matchers are found by name through the entry-point group ``nemf.matchers``; datasets in
``nemf.datasets.CATALOGUE``. Importing this module imports mmengine and therefore torch.
"""

from __future__ import annotations

from importlib import import_module

from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry

from nemf.cards import matcher_entry_point
from nemf.datasets import CATALOGUE
from nemf.errors import NemfError

MATCHERS = Registry("matcher", parent=MMENGINE_MODELS, scope="nemf", locations=["nemf.matcher"])
DATASETS = Registry("dataset", parent=MMENGINE_DATASETS, scope="nemf", locations=["nemf.datasets"])


def matcher_class(name: str) -> type:
    """The class of a registered matcher, imported and entered in MATCHERS on first use.

    An import error of the matcher's module is raised as it is: a broken matcher is a failure.
    """
    point = matcher_entry_point(name)
    cls = MATCHERS.module_dict.get(name)
    if cls is None:
        try:
            cls = point.load()
        except AttributeError:
            if hasattr(import_module(point.module), point.attr):
                raise
            cls = None
        if not (isinstance(cls, type) and hasattr(cls, "match")):
            raise NemfError(
                f"matcher {name!r}: its entry point {point.value!r} names no matcher class; write "
                "MODULE:CLASS in pyproject.toml and `pip install -e .` once more"
            )
        MATCHERS.register_module(name=name, module=cls)
    return cls


def _register_datasets() -> None:
    for name, home in CATALOGUE.items():
        module, _, cls = home.partition(":")
        DATASETS.register_module(name=name, module=getattr(import_module(module), cls))


_register_datasets()
