"""OpenMoji scenes and clips: images and videos with captions, drawn here without end, and what tells whether a
generated one shows what its caption says."""

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
    "motion": ("clip_facts", "clip_verdicts"),
    "moving": (
        "CLIP_OBJECTS",
        "CLIP_SIZE",
        "FRAMES",
        "MOTIONS",
        "Clip",
        "clip",
        "clip_caption",
        "clips",
        "videos",
    ),
    "probe": ("ObjectProbe", "background_colour", "background_correct"),
}

__getattr__, __dir__, __all__ = names_of(__name__, _HOMES)
