"""Names of a package that load when they are first used, so that importing the package is quick.

    __getattr__, __dir__, __all__ = names_of(__name__, {"distances": ("fid", "kid"), "similarity": ("ssim",)})

makes ``fid``, ``kid`` and ``ssim`` names of the package. The module that holds a name is imported when somebody asks
for the name (PEP 562). So whoever reads recorded rows never waits for torch or diffusers.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence


def names_of(package: str, modules: Mapping[str, Sequence[str]]) -> tuple[Callable, Callable, list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` of a package whose names live in other modules.

    modules: module, relative to the package and without a leading dot -> the names that it holds.
    """
    homes = {}
    for module, names in modules.items():
        homes.update(dict.fromkeys(names, module))

    def __getattr__(name: str):
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{homes[name]}", package), name)
        setattr(sys.modules[package], name, value)  # found there from now on: this function is not called again
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return __getattr__, __dir__, list(homes)
