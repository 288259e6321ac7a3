"""What a chapter can be given as its model: sentences for models that it cannot look at."""

from __future__ import annotations

from ecodiff.errors import EcoDiffError
from ecodiff.pipelines.parts import denoiser
from ecodiff.storage.paths import embedded


def require_sdxl_class(pipe) -> None:
    """Raise EcoDiffError for a pipeline whose denoiser is no U-Net of SDXL's kind."""
    config = denoiser(pipe).config
    if config.get("addition_embed_type") != "text_time":
        raise EcoDiffError(
            f"This chapter looks at a U-Net of SDXL's kind, and {type(pipe).__name__} has none: give it an SDXL "
            "pipeline, or leave its model as it is."
        )


def require_embedded(model: str) -> None:
    """Raise EcoDiffError for a model whose images the judges of this book were not made for."""
    if model not in embedded():
        raise EcoDiffError(
            f"{model}: this chapter judges images of OpenMoji scenes, so its model is an embedded one "
            f"({', '.join(embedded())}); the command `evaluate` measures others."
        )
