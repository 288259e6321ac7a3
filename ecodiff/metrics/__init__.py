"""How good images are (§3.1, App. E.1): SSIM and PSNR against a reference, FID and KID of sets, CLIP, intervals."""

from ecodiff.lazy import names_of

_HOMES = {
    "similarity": ("psnr", "ssim", "ssim_map"),
    "distances": ("Statistics", "fid", "kid"),
    "real": ("RealImages", "real_images"),
    "clip": ("Judge", "clip_score", "clip_score_metric"),
    "inception": ("inception_features",),
    "intervals": (
        "EFFECTS",
        "SMALLEST_EFFECT",
        "Interval",
        "bootstrap_interval",
        "difference",
        "difference_interval",
        "mean_interval",
        "nested_interval",
        "share_interval",
    ),
}

__getattr__, __dir__, __all__ = names_of(__name__, _HOMES)
