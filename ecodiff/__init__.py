"""EcoDiff companion: learned structural pruning of diffusers pipelines.

pipe  = ecodiff.load("openmoji-sdxl")
gates = ecodiff.learn(pipe, prompts, ecodiff.LearnConfig(...))
small = ecodiff.prune(pipe, gates.mask(ratio=0.2))
small.save_pretrained("openmoji-sdxl-20")

Names load when first used, so that importing the package is quick. `PrunedXxx` is the pruned class of any diffusers
model class Xxx; with it and `ModelMixin` here, plain `DiffusionPipeline.from_pretrained` loads pruned pipelines.
"""

from __future__ import annotations

from . import stock as _stock
from .lazy import names_of

_HOMES = {
    "errors": ("EcoDiffError",),
    "pipelines.loading": ("load",),
    "pipelines.parts": ("denoiser",),
    "pipelines.prompt_files": ("read_prompts",),
    "method.sites": ("Site", "find_sites", "skipped_modules", "with_flops"),
    "method.hard_concrete": ("HardConcrete",),
    "method.gates": ("Gates",),
    "method.hooks": ("apply_gates",),
    "method.trajectory": ("final_latents",),
    "method.config": ("LearnConfig",),
    "method.learn": ("learn",),
    "method.check": ("check",),
    "method.mask": ("make_mask",),
    "method.surgery": ("prune", "mask_of", "save"),
    "method.generate": ("generate",),
    "scores.compensation": ("prune_adapted",),
    "comparison.compare": ("compare",),
    "method.published": ("published", "import_published"),
    "hub.push": ("push",),
    "retraining.config": ("RetrainConfig",),
    "retraining.retrain": ("retrain",),
}
_stock.tell_diffusers()
_named, __dir__, __all__ = names_of(__name__, _HOMES)


def __getattr__(name: str):
    # diffusers looks for ModelMixin in the package of a Pruned class, to learn how such classes are saved and loaded.
    if name == "ModelMixin":
        from diffusers import ModelMixin

        return ModelMixin
    if name.startswith("Pruned") and len(name) > len("Pruned"):
        from ecodiff.method.pruned import pruned_class

        from .errors import EcoDiffError

        try:
            return pruned_class(name.removeprefix("Pruned"))
        except EcoDiffError as error:
            raise AttributeError(str(error)) from error
    return _named(name)
