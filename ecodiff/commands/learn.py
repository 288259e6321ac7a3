"""Learn a mask through the whole denoising process, and save its gates.

An interrupted run goes on where it was, when the same command is given again. Processes that a launcher starts
(accelerate launch -m ecodiff learn ...) share the work.

example: python -m ecodiff learn openmoji-sdxl --prompts prompts.txt --updates 60 --out gates.safetensors
"""

from __future__ import annotations

import argparse
import shutil
from functools import partial
from pathlib import Path

from ecodiff import processes

from . import options as shared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ecodiff.method.config import LearnConfig

    shared.add_model(parser)
    shared.add_prompts(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help="the gates, a safetensors file")
    parser.add_argument(
        "--resume-dir", type=Path, help="folder for what a resumed run needs (default: OUT.run, removed at the end)"
    )
    parser.add_argument("--preset", choices=("sdxl", "flux"), help="begin with the paper's settings (Tables 2 and 3)")
    parser.add_argument("--exclude", nargs="+", default=(), metavar="SITE", help="sites that get no gates")
    shared.add_fields(parser, LearnConfig)


def run(options: argparse.Namespace) -> dict:
    from ecodiff.method.config import LearnConfig
    from ecodiff.method.learn import learn

    out = processes.of_first(partial(shared.check_target, options.out))
    if options.preset:
        config = LearnConfig.paper(options.preset, **shared.given_fields(options, LearnConfig))
    else:
        config = shared.settings_from(options, LearnConfig)
    prompts = shared.read(options)
    folder = options.resume_dir or out.with_name(out.name + ".run")
    gates = learn(shared.load_model(options), prompts, config, resume_dir=folder, exclude=options.exclude)
    if processes.is_first():
        gates.save(out)
        if options.resume_dir is None:
            shutil.rmtree(folder, ignore_errors=True)
    last = gates.history[-1]
    found: dict = {"gates": str(out), "updates": len(gates.history), "loss": last["loss"]}
    for name, value in last.items():
        if name.startswith("open_"):
            found[name] = value
    return found
