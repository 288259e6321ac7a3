"""Timings and memory of this machine: drawing images, mask updates, full-size denoisers with random weights.

    python -m ecodiff benchmark generation              512 images with each embedded model; recorded
    python -m ecodiff benchmark mask-update             one mask update against T; ten minutes on two cores
    python -m ecodiff benchmark full-size sd2           what fits this machine, with random weights; recorded
    python -m ecodiff benchmark bits                    fewer units or fewer bits in as many bytes; recorded

Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import importlib

STEPS = (1, 2, 5, 10, 20, 50)  # of full-size, as are the ratios
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)
MODULES = {"generation": "generation", "mask-update": "mask_update", "full-size": "full_size", "bits": "bits"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)
    _add_generation(benchmarks.add_parser("generation", help="seconds of drawing with the embedded pipelines"))
    _add_mask_update(benchmarks.add_parser("mask-update", help="seconds and peak memory of a mask update against T"))
    _add_bits(benchmarks.add_parser("bits", help="images of fewer units or fewer bits at equal bytes"))
    _add_full_size(benchmarks.add_parser("full-size", help="mask updates and steps of full-size denoisers"))


def run(options: argparse.Namespace) -> int:
    # Imported here so that --help answers at once.
    return importlib.import_module(f".{MODULES[options.benchmark]}", __package__).run(options)


def _add_generation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", help="ids (default: all that are trained)")
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--dtypes", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--recompute", action="store_true", help="measure anew and replace recorded rows")
    parser.add_argument("--dry", action="store_true", help="record nothing")


def _add_mask_update(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="openmoji-sdxl", help="an SDXL pipeline (default: openmoji-sdxl)")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 5, 10, 20], help="values of T")
    parser.add_argument(
        "--batch", type=int, default=4, help="samples an update (guidance doubles them inside the denoiser)"
    )
    parser.add_argument("--turns", type=int, default=5, help="timed rounds; each runs every variant once")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--json", help="write one JSON row a variant and T to this file")


def _add_bits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="openmoji-flux-schnell", help="an embedded pipeline")
    parser.add_argument("--pictures", type=int, default=100, help="images of each cell (default: 100)")
    parser.add_argument("--recompute", action="store_true", help="measure again what is recorded")


def _add_full_size(parser: argparse.ArgumentParser) -> None:
    parts = ["update", "inference", "round"]
    parser.add_argument("models", nargs="+", help="tiny, or presets (`python -m ecodiff cost --list` names them)")
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument(
        "--samples", type=int, default=1, help="samples in a denoiser call (guidance makes 2 of an image)"
    )
    parser.add_argument("--size", type=int, help="pixels a side (default: the model's own)")
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS), help="values of T")
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS), help="of --parts inference")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--measure", default="both", choices=["both", "peak", "time"])
    parser.add_argument("--minutes", type=float, default=1e9, help="start no measurement after so long")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], help="default: bf16 on CUDA, fp32 elsewhere")
    parser.add_argument("--recompute", action="store_true", help="measure again what is recorded")
