"""Seconds of drawing pictures with the embedded pipelines, each as its evaluation draws it.

    python -m ecodiff benchmark generation                    # 512 pictures with each model that is trained; recorded
    python -m ecodiff benchmark generation --models openmoji-sd2 --batch-sizes 32 --dtypes fp32
    python -m ecodiff benchmark generation --pictures 8 --dry # only to see that it works

Each combination of dtype and batch size draws a quarter of the pictures; the fastest of them then draws all. ``bf16``
is autocast: weights and noise stay in fp32. Recorded results of the book are drawn in fp32, 32 at a time. Nothing is
read from or left in the cache of pictures. Each run is a row of ``data/results/generation.jsonl``; one that is there is
not measured again without ``--recompute``. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import os
import time
from contextlib import nullcontext

import torch

import ecodiff
from ecodiff.errors import EcoDiffError
from ecodiff.lab import openmoji
from ecodiff.lab.studies.protocol import Protocol
from ecodiff.lab.studies.redundancy import in_bf16
from ecodiff.lab.zoo import store
from ecodiff.lab.zoo.card import SECONDS_FOR_512
from ecodiff.method.generate import generate
from ecodiff.pipelines.contents import weights_hash
from ecodiff.pipelines.parts import denoiser
from ecodiff.storage import provenance, records

DTYPES = {"fp32": lambda pipe: nullcontext(), "bf16": in_bf16}


def timed(pipe, pictures: int, batch_size: int, dtype: str, sampling: dict) -> dict:
    """Seconds for ``pictures`` captions after one small batch that warms up."""
    captions = openmoji.prompts("seen", pictures, start=4_000_000)

    def draw(number: int) -> None:
        generate(pipe, captions[:number], range(number), batch_size=batch_size, progress=False, **sampling)

    with DTYPES[dtype](pipe):
        draw(min(2, pictures))
        started, worked = time.perf_counter(), time.process_time()
        draw(pictures)
        seconds = time.perf_counter() - started
    return {"seconds": round(seconds, 2), "processor_seconds": round(time.process_time() - worked, 2)}


def rows(model: str, options: argparse.Namespace):
    """A recorded row for each batch size and dtype of one model, then one of all pictures drawn the fastest way."""
    pipe, sampling = ecodiff.load(model), Protocol.of(model).sampling
    described = {"what": "generation", "model": model, "weights": weights_hash(denoiser(pipe)), "sampling": sampling}
    described |= {"threads": torch.get_num_threads(), "machine": provenance.machine(), "seed": 0, "version": 1}

    def row(number: int, size: int, dtype: str) -> dict:
        config = {**described, "pictures": number, "batch_size": size, "dtype": dtype}
        arguments = (pipe, number, size, dtype, sampling)
        return records.measure(config, lambda: timed(*arguments), name="generation", recompute=options.recompute)

    tried = []
    for dtype in options.dtypes:
        for size in options.batch_sizes:
            tried.append(row(max(1, options.pictures // 4), size, dtype))
            yield tried[-1]
    fastest = min(tried, key=lambda found: found["values"]["seconds"])["config"]
    if fastest["pictures"] < options.pictures:
        yield row(options.pictures, fastest["batch_size"], fastest["dtype"])


def run(options: argparse.Namespace) -> int:
    """The command ``python -m ecodiff benchmark generation``."""
    models = options.models or [
        name for name in store.stored_ids() if not store.is_judge(store.recipe_of(name)["recipe"])
    ]
    if options.pictures < 1:
        raise EcoDiffError(f"--pictures {options.pictures}: at least one picture must be drawn.")
    if options.dry:
        os.environ["ECODIFF_RECORDS"] = "off"
    print(f"{torch.get_num_threads()} threads")
    print(f"{'model':22} {'dtype':>5} {'batch':>5} {'pictures':>8} {'seconds':>8} {'ms a picture':>12}")
    full = {}
    for model in models:
        for row in rows(model, options):
            c, seconds = row["config"], row["values"]["seconds"]
            each = 1000 * seconds / c["pictures"]
            print(
                f"{model:22} {c['dtype']:>5} {c['batch_size']:5d} {c['pictures']:8d} {seconds:8.1f} {each:12.1f}"
                f"{'  (recorded)' if row['recorded'] else ''}",
                flush=True,
            )
            full[model] = seconds  # the last row is of all pictures
    if options.pictures == 512 and full:
        slowest = max(full, key=full.get)
        word = "holds" if full[slowest] <= SECONDS_FOR_512 else "DOES NOT HOLD"
        print(f"512 pictures in {SECONDS_FOR_512:.0f} s: {full[slowest]:.0f} s with {slowest}, the slowest ({word})")
    return 0
