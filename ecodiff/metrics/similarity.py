"""How near images are to a reference, one by one (§3.1, App. E.1): SSIM and PSNR.

The formulas are torchmetrics', SSIM in a form that is faster in double precision.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio

from ecodiff.errors import EcoDiffError

_WINDOW = torch.exp(-((torch.arange(-5.0, 6.0, dtype=torch.float64) / 1.5) ** 2) / 2)  # 11 pixels, sigma 1.5
_WINDOW /= _WINDOW.sum()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each pair of pictures, float [N]; ``.mean()`` is the figure the paper reports.

    Images are uint8, or float in [0, 1], [N, C, H, W] of at least 11x11 pixels; clips [N, frames, C, H, W] have the
    mean over their frames. They are compared as they are, not resized, with a Gaussian window of 11 pixels (sigma 1.5)
    and data range 1. Raises EcoDiffError for images that do not match.
    """
    a, b = _pair(a, b)
    if min(a.shape[-2:]) < len(_WINDOW):
        raise EcoDiffError(
            f"SSIM compares windows of 11x11 pixels: pictures of {a.shape[-2]}x{a.shape[-1]} are too small."
        )
    each = _similarity(*(images.flatten(0, -4) for images in (a, b))).mean((1, 2, 3))
    return each.view(len(a), -1).mean(1).float()


def ssim_map(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of the window around each pixel, mean over channels: float [N, H, W]; images only.

    The input is images as for ``ssim``, which is the mean over the pixels. At the border images are mirrored, as in
    torchmetrics.
    """
    return _similarity(*_pair(a, b)).mean(1).float()


def _similarity(a: Tensor, b: Tensor) -> Tensor:
    """SSIM (Wang et al. 2004, eq. 13) of the window around each pixel: float64 [N, C, H, W]."""
    border = (len(_WINDOW) // 2,) * 4
    a = nn.functional.pad(a, border, mode="reflect")
    b = nn.functional.pad(b, border, mode="reflect")
    mean_a, mean_b = _smooth(a), _smooth(b)
    var_a = _smooth(a * a) - mean_a**2
    var_b = _smooth(b * b) - mean_b**2
    covariance = _smooth(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2  # the paper's K1 and K2, for data range 1
    # Rounding may leave a variance slightly below zero, where the colour is even.
    var_a, var_b = var_a.clamp(min=0), var_b.clamp(min=0)
    alike = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return alike / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))


def _smooth(x: Tensor) -> Tensor:
    """Weighted means of the windows that are in the images."""
    # A Gaussian window is a product of two, so one axis can follow the other. torchmetrics convolves with the window as
    # a square, which takes ten times as long in double precision.
    for dim in (-1, -2):
        size = x.shape[dim] - len(_WINDOW) + 1
        x = sum(weight * x.narrow(dim, at, size) for at, weight in enumerate(_WINDOW.tolist()))
    return x


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair in dB, float [N]; infinite for equal ones. Input as for ``ssim``."""
    a, b = _pair(a, b)
    return peak_signal_noise_ratio(a, b, data_range=1.0, reduction="none", dim=tuple(range(1, a.dim()))).float()


def _pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets of images in float64 and [0, 1]. Raises EcoDiffError where they do not match."""
    if a.shape != b.shape or a.dim() not in (4, 5) or not len(a):
        raise EcoDiffError(
            f"Two sets of pictures of the same shape [N, C, H, W] are compared, or of clips [N, frames, C, H, W], not "
            f"{list(a.shape)} and {list(b.shape)}."
        )
    if a.dtype != b.dtype or not (a.dtype == torch.uint8 or a.is_floating_point()):
        raise EcoDiffError(f"Pictures are both uint8 or both float in [0, 1], not {a.dtype} and {b.dtype}.")
    # In single precision equal images of even colour would fall some ten-thousandths short of an SSIM of 1.
    if a.dtype == torch.uint8:
        return a.double() / 255, b.double() / 255
    return a.double(), b.double()
