"""Parameters, operations and memory of a model before and after pruning, counted without its weights.

With --fits or --time, the smallest ratio that is enough is found.

example: python -m ecodiff cost sdxl --ratio 0.2 --gpu 24GB
example: python -m ecodiff cost sdxl --fits 8GB
"""

from __future__ import annotations

import argparse
import json

from ecodiff.errors import EcoDiffError

from .options import add_round_to


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="a preset (see --list), an id, or a folder with a pipeline")
    parser.add_argument("--list", action="store_true", help="name the full-size presets")
    parser.add_argument("--size", help="HEIGHTxWIDTH in pixels, or one number")
    parser.add_argument("--frames", type=int, help="frames, for video")
    parser.add_argument("--batch", type=int, default=1, help="images (for learning: samples) at a time")
    parser.add_argument("--steps", type=int, help="denoising steps")
    parser.add_argument("--guidance", type=float, help="guidance scale; above 1 the work may double")
    parser.add_argument("--dtype", help="bf16, fp16 or fp32")
    parser.add_argument("--text-tokens", type=int, help="tokens of text")
    parser.add_argument("--ratio", type=float, help="share of the units of each kind to remove, such as 0.2")
    add_round_to(parser)
    parser.add_argument("--gpu", metavar="SIZE", help="memory to fit into, such as 24GB or 8GiB")
    parser.add_argument("--fits", metavar="SIZE", help="find the smallest ratio that generates within this, as 8GB")
    parser.add_argument("--time", type=float, help="find the smallest ratio with this share of operations, as 0.8")
    parser.add_argument("--offload", action="store_true", help="with --fits: one component on the device at a time")
    parser.add_argument("--scores", metavar="FILE", help="with --fits or --time: which units go (`learn`, `score`)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(options: argparse.Namespace) -> int:
    # Imported here so that --help answers at once.
    from ecodiff.cost import presets
    from ecodiff.cost.counting import cost
    from ecodiff.cost.report import table, verdict
    from ecodiff.cost.setting import subject_of
    from ecodiff.cost.solve import solve
    from ecodiff.cost.units import parse_bytes
    from ecodiff.scores.files import load_scores

    if options.list or not options.model:
        for name in presets.names():
            preset = presets.preset(name)
            print(f"{name:14} {preset.parameters / 1e9:6.2f} B parameters  {preset.title} ({preset.id})")
        return 0
    budget = None if options.gpu is None else parse_bytes(options.gpu)
    setting = {
        "size": _size(options.size),
        "frames": options.frames,
        "batch": options.batch,
        "steps": options.steps,
        "guidance": options.guidance,
        "dtype": options.dtype,
        "text_tokens": options.text_tokens,
        "round_to": options.round_to,
    }
    if options.fits is not None or options.time is not None:
        if options.ratio is not None:
            raise EcoDiffError("--fits and --time find the ratio: leave --ratio out.")
        model, scores = options.model, None
        if options.scores is not None:
            model = subject_of(options.model)
            scores = load_scores(options.scores, model.network)
        goal = {"fits": options.fits, "time": options.time, "offload": options.offload}
        found = solve(model, scores=scores, **goal, **setting)
        counted, ratio = found.cost, found.ratio
    else:
        if options.scores is not None or options.offload:
            raise EcoDiffError("--scores and --offload say how a ratio is found: give them with --fits or --time.")
        counted, ratio = cost(options.model, ratio=options.ratio, **setting), options.ratio
    if options.json:
        figures = counted.to_dict() | {"ratio": ratio}
        if budget:
            figures["verdict"] = verdict(counted, budget)
        print(json.dumps(figures, indent=1))
        return 0
    print(table(counted, budget))
    if options.ratio is None and ratio is not None:
        print(f"\nThe smallest ratio that is enough: {ratio:.2f}")
    if budget:
        print()
        print(*verdict(counted, budget), sep="\n")
    return 0


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    parts = text.lower().split("x")  # one number stands for both sides
    if not 1 <= len(parts) <= 2 or not all(part.isdigit() for part in parts):
        raise EcoDiffError(f"--size {text!r}: write it as 1024, or as HEIGHTxWIDTH such as 768x1024.")
    return (int(parts[0]), int(parts[-1]))
