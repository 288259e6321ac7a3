"""Fewer units or fewer bits: the images of models whose denoisers take the same number of bytes.

    python -m ecodiff benchmark bits                # openmoji-flux-schnell; recorded in data/results/bits.jsonl

The weights are rounded as weight-only quantisation rounds them, and the arithmetic stays in fp32: what is measured is
what rounding does to images, not how fast a kernel for so many bits would be. Bytes are counted, not measured: weights
of linear layers and convolutions at so many bits, with one scale of 16 bits for each output channel, and all other
parameters at 16 bits.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from functools import cache

import torch
from torch import nn

from ecodiff import metrics
from ecodiff.lab.identities import judge_hash
from ecodiff.lab.studies.images import draw, judge_pictures, similarity
from ecodiff.lab.studies.measure import learned_gates
from ecodiff.lab.studies.plan import base
from ecodiff.method.surgery import prune
from ecodiff.pipelines.contents import weights_hash
from ecodiff.pipelines.loading import load_once
from ecodiff.pipelines.parts import denoiser, with_denoiser
from ecodiff.storage import records

ROUNDED = (nn.Linear, nn.Conv2d)
FULL = 8  # bits at which units are taken away
FEWER = (6, 5, 4)  # bits of all units


@torch.no_grad()
def rounded(network: nn.Module, bits: int) -> nn.Module:
    """A copy whose weights of linear layers and convolutions have 2^bits - 1 values in each output channel.

    Symmetric, to the nearest value, with the scale of a channel such that its largest weight is the last value. This
    is the plainest way: no calibration, no groups, no outliers apart. Better ones lose less at the same bits.
    """
    network = copy.deepcopy(network)
    last = 2 ** (bits - 1) - 1
    for module in network.modules():
        if isinstance(module, ROUNDED) and module.weight.numel():
            channels = module.weight.flatten(1)
            scale = (channels.abs().amax(1, keepdim=True) / last).half().float().clamp(min=2**-24)
            channels.copy_((channels / scale).round().clamp(-last, last) * scale)
    return network


def size(network: nn.Module, bits: int) -> int:
    """Bytes of the network's parameters with weights of so many bits; see the module's docstring."""
    in_bits = 0
    weights = set()
    for module in network.modules():
        if isinstance(module, ROUNDED):
            in_bits += bits * module.weight.numel() + 16 * len(module.weight)
            weights.add(module.weight)
    in_bits += sum(16 * parameter.numel() for parameter in network.parameters() if parameter not in weights)
    return in_bits // 8


def smallest_ratio(pipe, gates, bits: int, budget: int) -> float:
    """The smallest ratio, in hundredths, at which the pruned denoiser fits into the bytes at so many bits."""
    low, high = 0, 99  # hundredths: too little, enough
    while high - low > 1:
        middle = (low + high) // 2
        if size(denoiser(prune(pipe, gates.mask(middle / 100))), bits) <= budget:
            high = middle
        else:
            low = middle
    return high / 100


def cells(pipe, gates) -> list[tuple[float, int]]:
    """(ratio, bits) of what is compared: all units at fewer bits, and fewer units at more bits in as many bytes."""
    chosen = [(0.0, FULL), (0.2, FULL)]
    for bits in FEWER:
        budget = size(denoiser(pipe), bits)
        chosen += [(0.0, bits), (smallest_ratio(pipe, gates, FULL, budget), FULL)]
    chosen.append((smallest_ratio(pipe, gates, FEWER[0], size(denoiser(pipe), FEWER[-1])), FEWER[0]))
    return chosen


def rows(model: str, pictures: int, recompute: bool = False) -> Iterator[dict]:
    """A recorded row for each cell: its bytes, and of each image the SSIM to the original's and whether it is right."""
    pipe, cell = load_once(model), base(model)
    gates = learned_gates(pipe, cell.captions(), cell.seeded)
    scenes = cell.protocol.scenes()[:pictures]
    described = {"what": "bits", "weights": weights_hash(denoiser(pipe)), "judge": judge_hash(), "version": 1}
    described |= {"sampling": cell.protocol.sampling, "split": cell.protocol.split, "pictures": pictures, "seed": 0}
    described["gates"] = dict(gates.log_alpha)

    @cache
    def original():
        return draw(pipe, scenes, 0, cell.protocol)

    for ratio, bits in cells(pipe, gates):

        def measured(ratio=ratio, bits=bits) -> dict:
            network = denoiser(prune(pipe, gates.mask(ratio)))
            smaller = with_denoiser(pipe, rounded(network, bits))
            drawn = draw(smaller, scenes, 0, cell.protocol)
            values: dict = {"bytes": size(network, bits)}
            values["ssim"] = similarity(drawn, original())
            return values | judge_pictures(drawn, scenes, features=False)

        yield records.measure(described | {"ratio": ratio, "bits": bits}, measured, name="bits", recompute=recompute)


HEADER = ("| units removed | bits of a weight | bytes | SSIM to the original | right images |", "|---|---|---|---|---|")


def line(row: dict) -> str:
    """A recorded row as one of a table, with 95 % intervals over the images."""
    config, values = row["config"], row["values"]
    ssim = metrics.bootstrap_interval(values["ssim"])
    right = metrics.share_interval(values["facts"])
    return (
        f"| {config['ratio']:.0%} | {config['bits']} | {values['bytes']:,} | "
        f"{ssim.mean:.3f} ({ssim.low:.3f} to {ssim.high:.3f}) | "
        f"{100 * right.mean:.1f} % ({100 * right.low:.1f} to {100 * right.high:.1f}) |"
    )


def run(options: argparse.Namespace) -> int:
    """The command ``python -m ecodiff benchmark bits``."""
    print(*HEADER, sep="\n")
    for row in rows(options.model, options.pictures, options.recompute):
        print(line(row), flush=True)
    return 0
