"""EcoDiff companion: learned structural pruning of diffusers pipelines.

pipe  = ecodiff.load("openmoji-sdxl")
gates = ecodiff.learn(pipe, prompts, ecodiff.LearnConfig(...))
small = ecodiff.prune(pipe, gates.mask(ratio=0.2))
small.save_pretrained("openmoji-sdxl-20")

Names load when first used, so that importing the package is quick. `PrunedXxx` is the pruned class of any diffusers
model class Xxx; with it and `ModelMixin` here, plain `DiffusionPipeline.from_pretrained` loads pruned pipelines.
"""

from __future__ import annotations

import importlib
import sys
import types

_HOME = {
    "EcoDiffError": "errors",
    "load": "pipelines",
    "denoiser": "pipelines",
    "Site": "sites",
    "find_sites": "sites",
    "skipped_modules": "sites",
    "with_flops": "sites",
    "HardConcrete": "gates",
    "Gates": "gates",
    "apply_gates": "gates",
    "final_latents": "trajectory",
    "LearnConfig": "learn",
    "RetrainConfig": "retrain",
    "make_mask": "mask",
    "prune": "surgery",
    "prune_adapted": "methods.obs",
    "save": "surgery",
}
_SAME_NAME = ("learn", "generate", "retrain")  # functions in modules of their own name

__all__ = [*_HOME, *_SAME_NAME]


class _Package(types.ModuleType):
    """Keeps `ecodiff.learn` the function: importing the module `ecodiff.learn` would put the module in its place."""

    def __setattr__(self, name, value):
        if name in _SAME_NAME and isinstance(value, types.ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str):
    if name in _SAME_NAME:
        return getattr(importlib.import_module(f".{name}", __name__), name)
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    if name == "ModelMixin":  # diffusers looks for it here to learn how Pruned classes are saved and loaded
        from diffusers import ModelMixin

        return ModelMixin
    if name.startswith("Pruned") and len(name) > len("Pruned"):
        from .surgery import EcoDiffError, pruned_class

        try:
            return pruned_class(name.removeprefix("Pruned"))
        except EcoDiffError as error:
            raise AttributeError(str(error)) from error
    raise AttributeError(f"module 'ecodiff' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})
