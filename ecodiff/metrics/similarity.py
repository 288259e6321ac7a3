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

    Pictures are uint8, or float in [0, 1], [N, C, H, W] of at least 11x11 pixels. Compared as they are, not resized:
    Gaussian window of 11 pixels (sigma 1.5), data range 1; in double precision, because in single precision equal
    pictures of even colour fall some ten-thousandths short of 1. Raises EcoDiffError for pictures that do not match.
    """
    a, b = _pair(a, b)
    if min(a.shape[-2:]) < len(_WINDOW):
        raise EcoDiffError(
            f"SSIM compares windows of 11x11 pixels: pictures of {a.shape[-2]}x{a.shape[-1]} are too small."
        )
    return _similarity(a, b).mean((1, 2, 3)).float()


def ssim_map(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of the window around each pixel, mean over channels: float [N, H, W].

    Input as for ``ssim``, which is the mean over the pixels. At the border the pictures are mirrored, as torchmetrics
    does.
    """
    return _similarity(*_pair(a, b)).mean(1).float()


def _similarity(a: Tensor, b: Tensor) -> Tensor:
    """SSIM (Wang et al. 2004, eq. 13) of the window around each pixel: float64 [N, C, H, W].

    torchmetrics convolves with the window as a square, which takes ten times as long in double precision.
    """
    a, b = (nn.functional.pad(x, (len(_WINDOW) // 2,) * 4, mode="reflect") for x in (a, b))
    mean_a, mean_b = _smooth(a), _smooth(b)
    var_a, var_b = (_smooth(x * x) - mean**2 for x, mean in ((a, mean_a), (b, mean_b)))
    covariance = _smooth(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    alike = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return alike / ((mean_a**2 + mean_b**2 + c1) * (var_a.clamp(min=0) + var_b.clamp(min=0) + c2))


def _smooth(x: Tensor) -> Tensor:
    """Weighted means of the windows that are in the pictures, along one axis and then the other."""
    for dim in (-1, -2):
        size = x.shape[dim] - len(_WINDOW) + 1
        x = sum(weight * x.narrow(dim, at, size) for at, weight in enumerate(_WINDOW.tolist()))
    return x


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair in dB, float [N]; infinite for equal ones. Input as for ``ssim``."""
    a, b = _pair(a, b)
    return peak_signal_noise_ratio(a, b, data_range=1.0, reduction="none", dim=(1, 2, 3)).float()


def _pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.shape != b.shape or a.dim() != 4 or not len(a):
        raise EcoDiffError(
            f"Two sets of pictures of the same shape [N, C, H, W] are compared, not {list(a.shape)} and "
            f"{list(b.shape)}."
        )
    if a.dtype != b.dtype or not (a.dtype == torch.uint8 or a.is_floating_point()):
        raise EcoDiffError(f"Pictures are both uint8 or both float in [0, 1], not {a.dtype} and {b.dtype}.")
    return (a.double() / 255, b.double() / 255) if a.dtype == torch.uint8 else (a.double(), b.double())
