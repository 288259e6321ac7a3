"""Seconds of generating images with the embedded pipelines, each as its evaluation generates them.

    python -m ecodiff benchmark generation                    # 512 images with each model that is trained; recorded
    python -m ecodiff benchmark generation --models openmoji-sd2 --batch-sizes 32 --dtypes fp32
    python -m ecodiff benchmark generation --pictures 8 --dry # only to see that it works

Each combination of dtype and batch size generates a quarter of the images; the fastest of them then generates all.
``bf16`` is autocast: weights and noise stay in fp32. Recorded results of the book are made in fp32, 32 images at a
time. Nothing is read from or left in the cache of images. Each run is a row of ``data/results/generation.jsonl``; one
that is there is not measured again without ``--recompute``. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial

import torch

import ecodiff
from ecodiff.errors import EcoDiffError
from ecodiff.lab import openmoji
from ecodiff.lab.studies.protocol import Protocol
from ecodiff.lab.studies.redundancy import in_bf16
from ecodiff.lab.zoo import store
from ecodiff.lab.zoo.card import SECONDS_FOR_512
from ecodiff.lab.zoo.recipes import VIDEO
from ecodiff.method.generate import generate
from ecodiff.pipelines.contents import weights_hash
from ecodiff.pipelines.parts import denoiser
from ecodiff.storage import provenance, records

DTYPES = {"fp32": nullcontext, "bf16": in_bf16}


def timed(pipe, images: int, batch_size: int, dtype: str, sampling: dict) -> dict:
    """Seconds for so many images, after one small batch that warms up."""
    prompts = openmoji.prompts("seen", images, start=4_000_000)

    def run(number: int) -> None:
        generate(pipe, prompts[:number], range(number), batch_size=batch_size, progress=False, **sampling)

    with DTYPES[dtype](pipe):
        run(min(2, images))
        started, worked = time.perf_counter(), time.process_time()
        run(images)
        seconds = time.perf_counter() - started
    return {"seconds": round(seconds, 2), "processor_seconds": round(time.process_time() - worked, 2)}


def rows(model: str, options: argparse.Namespace) -> Iterator[dict]:
    """A recorded row for each batch size and dtype of one model, then one of all images, generated the fastest way."""
    pipe, sampling = ecodiff.load(model), Protocol.of(model).sampling
    described = {"what": "generation", "model": model, "weights": weights_hash(denoiser(pipe)), "sampling": sampling}
    described |= {"threads": torch.get_num_threads(), "machine": provenance.machine(), "seed": 0, "version": 1}

    def row(number: int, size: int, dtype: str) -> dict:
        config = {**described, "pictures": number, "batch_size": size, "dtype": dtype}
        measured = partial(timed, pipe, number, size, dtype, sampling)
        return records.measure(config, measured, name="generation", recompute=options.recompute)

    quarter = max(1, options.pictures // 4)
    fastest = None
    for dtype in options.dtypes:
        for size in options.batch_sizes:
            tried = row(quarter, size, dtype)
            if fastest is None or tried["values"]["seconds"] < fastest["values"]["seconds"]:
                fastest = tried
            yield tried
    if quarter < options.pictures:
        yield row(options.pictures, fastest["config"]["batch_size"], fastest["config"]["dtype"])


def run(options: argparse.Namespace) -> int:
    """The command ``python -m ecodiff benchmark generation``."""
    models = options.models
    if not models:
        models = []
        for name in store.stored_ids():
            if store.recipe_of(name)["recipe"]["pipeline"] not in ("CLIPModel", VIDEO):
                models.append(name)
    if options.pictures < 1:
        raise EcoDiffError(f"--pictures {options.pictures}: at least one image must be generated.")
    if options.dry:
        os.environ["ECODIFF_RECORDS"] = "off"
    print(f"{torch.get_num_threads()} threads")
    print(f"{'model':22} {'dtype':>5} {'batch':>5} {'images':>8} {'seconds':>8} {'ms per image':>12}")
    seconds_of_all = {}
    for model in models:
        for row in rows(model, options):
            c, seconds = row["config"], row["values"]["seconds"]
            each = 1000 * seconds / c["pictures"]
            line = f"{model:22} {c['dtype']:>5} {c['batch_size']:5d} {c['pictures']:8d} {seconds:8.1f} {each:12.1f}"
            if row["recorded"]:
                line += "  (recorded)"
            print(line, flush=True)
            seconds_of_all[model] = seconds  # the last row is of all images
    if options.pictures == 512 and seconds_of_all:
        slowest = max(seconds_of_all, key=seconds_of_all.__getitem__)
        seconds = seconds_of_all[slowest]
        word = "holds" if seconds <= SECONDS_FOR_512 else "DOES NOT HOLD"
        print(f"512 images in {SECONDS_FOR_512:.0f} s: {seconds:.0f} s with {slowest}, the slowest ({word})")
    return 0
