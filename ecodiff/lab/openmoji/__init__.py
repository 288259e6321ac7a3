"""OpenMoji scenes: images with captions that are drawn here without end, and what tells whether an image shows them."""

from ecodiff.lazy import names_of

_HOMES = {
    "drawing": (
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
    ),
    "probe": ("ObjectProbe", "background_colour", "background_correct"),
}

__getattr__, __dir__, __all__ = names_of(__name__, _HOMES)
