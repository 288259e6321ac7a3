"""OpenMoji scenes: images with captions that are drawn here without end, and what tells whether an image shows them."""

from ...lazy import names_of

_DRAWING = (
    "COLOURS",
    "CREDIT",
    "LICENSE",
    "RELATIONS",
    "SIZE",
    "SPLITS",
    "Scene",
    "caption",
    "dataset",
    "images",
    "is_heldout",
    "object_names",
    "object_table",
    "prompts",
    "render",
    "scene",
    "scenes",
)

__getattr__, __dir__, __all__ = names_of(__name__, dict.fromkeys(_DRAWING, "drawing"))
