"""EcoDiff companion: learned structural pruning of diffusers pipelines.

pipe  = ecodiff.load("openmoji-sdxl")
gates = ecodiff.learn(pipe, prompts, ecodiff.LearnConfig(...))
small = ecodiff.prune(pipe, gates.mask(ratio=0.2))
small.save_pretrained("openmoji-sdxl-20")

Names load when first used, so that importing the package is quick. `PrunedXxx` is the pruned class of any diffusers
model class Xxx; with it and `ModelMixin` here, plain `DiffusionPipeline.from_pretrained` loads pruned pipelines.
"""

from __future__ import annotations

from .lazy import names_of

_HOMES = {
    "EcoDiffError": "errors",
    "load": "pipelines.loading",
    "denoiser": "pipelines.loading",
    "Site": "method.sites",
    "find_sites": "method.sites",
    "skipped_modules": "method.sites",
    "with_flops": "method.sites",
    "HardConcrete": "method.gates",
    "Gates": "method.gates",
    "apply_gates": "method.gates",
    "final_latents": "method.trajectory",
    "LearnConfig": "method.config",
    "learn": "method.learn",
    "make_mask": "method.mask",
    "prune": "method.surgery",
    "save": "method.surgery",
    "generate": "method.generate",
    "prune_adapted": "scores.obs",
    "RetrainConfig": "retraining.config",
    "retrain": "retraining.retrain",
}
_named, __dir__, __all__ = names_of(__name__, _HOMES)


def __getattr__(name: str):
    if name == "ModelMixin":  # diffusers looks for it here to learn how Pruned classes are saved and loaded
        from diffusers import ModelMixin

        return ModelMixin
    if name.startswith("Pruned") and len(name) > len("Pruned"):
        from .errors import EcoDiffError
        from .method.surgery import pruned_class

        try:
            return pruned_class(name.removeprefix("Pruned"))
        except EcoDiffError as error:
            raise AttributeError(str(error)) from error
    return _named(name)
