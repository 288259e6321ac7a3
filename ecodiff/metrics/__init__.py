"""How good images are (§3.1, App. E.1): SSIM and PSNR against a reference, FID and KID of sets, CLIP, intervals."""

from ..lazy import names_of

_SIMILARITY = ("ssim", "ssim_map", "psnr", "fid", "kid")
_INTERVALS = (
    "SMALLEST_EFFECT",
    "EFFECTS",
    "Interval",
    "bootstrap_interval",
    "nested_interval",
    "difference_interval",
    "share_interval",
    "mean_interval",
)

__getattr__, __dir__, __all__ = names_of(
    __name__, dict.fromkeys(_SIMILARITY, "similarity") | dict.fromkeys(_INTERVALS, "similarity")
)
