"""All classes of the installed diffusers, each tried in a process of its own; results kept whole in one file."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
import multiprocessing
import re
import time
import traceback
from collections.abc import Iterable
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path

from ecodiff.errors import EcoDiffError
from ecodiff.storage.files import write_whole
from ecodiff.storage.paths import data_dir, root

DENOISER = re.compile(r"(Transformer|UNet|UVit|DiT)")
NO_DENOISER = re.compile(
    r"(Control|Autoencoder|Adapter|Mixin|Output|Pipeline|Scheduler|Encoder|Vae|TransformerTemporal)"
)
# Pipelines that are only put together from others, or run in other libraries.
NO_PIPELINE = re.compile(r"(Onnx|Flax|Modular|^DiffusionPipeline$)")


def results_file() -> Path:
    """``data/results/support.json``."""
    return data_dir() / "results" / "support.json"


@cache
def classes() -> dict[str, str]:
    """{class name: "denoiser" or "pipeline"} of the installed diffusers, in alphabetical order, denoisers first."""
    import diffusers
    from diffusers import DiffusionPipeline, ModelMixin

    names: dict[str, str] = {}
    for kind in ("denoiser", "pipeline"):
        for name in sorted(dir(diffusers)):
            wanted = DENOISER.search(name) and not NO_DENOISER.search(name)
            if kind == "pipeline":
                wanted = "Pipeline" in name and not NO_PIPELINE.search(name)
            if not wanted:
                continue
            try:
                cls = getattr(diffusers, name)
            except Exception:  # needs a library that is not installed
                names[name] = kind
                continue
            base = ModelMixin if kind == "denoiser" else DiffusionPipeline
            # Names that are kept for classes which are gone stand for nothing that can be built. Where a library is
            # missing, a class of diffusers stands for the right one and says which library that is (`_backends`).
            if inspect.isclass(cls) and (issubclass(cls, base) or hasattr(cls, "_backends")) and cls.__name__ == name:
                names[name] = kind
    return names


def installed() -> str:
    """The version of diffusers that is installed."""
    return importlib.metadata.version("diffusers")


def read() -> dict:
    """What is recorded: {"diffusers": version, "classes": {class: kind}, "rows": {class: row}}.

    A class without a row has not been tried yet. All is empty where nothing is recorded.
    """
    try:
        return json.loads(results_file().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"diffusers": installed(), "classes": {}, "rows": {}}


@cache
def code() -> str:
    """A hash of what rows depend on: the library, the trials, and the tiny configurations."""
    package = root() / "ecodiff"
    files = [path for path in package.rglob("*.py") if (package / "lab") not in path.parents]
    files += [path for path in (package / "lab" / "support").iterdir() if path.suffix in (".py", ".yaml")]
    content = b"".join(path.read_bytes() for path in sorted(files))
    return hashlib.sha256(content).hexdigest()[:12]


def measure(names: Iterable[str], seconds: float) -> Iterable[tuple[str, dict]]:
    """Yield (class name, row) for each name.

    A class that takes longer than so many seconds, or ends its process, gets a row that says so.
    """
    kinds = classes()
    context = multiprocessing.get_context("forkserver")
    # The libraries are loaded once, in the process from which all others are forked.
    context.set_forkserver_preload(["ecodiff.lab.support.trying"])
    names = list(names)
    for name in names:
        if name not in kinds:
            raise EcoDiffError(f"support: {name} is no denoiser and no pipeline class of the installed diffusers.")
    warm = context.Process(target=_nothing)  # so that the first class does not wait for the libraries
    warm.start()
    warm.join()
    for name in names:
        started = time.perf_counter()
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(kinds[name], name, there), daemon=True)
        process.start()
        there.close()
        row = _received(here, process, kinds[name], seconds)
        yield name, row | {"seconds": round(time.perf_counter() - started, 1)}


def _received(here: Connection, process, kind: str, seconds: float) -> dict:
    row = {"kind": kind, "stages": {}, "broken": f"it took longer than {seconds:g} seconds"}
    if here.poll(seconds):
        try:
            row = here.recv()
        except EOFError:
            process.join()
            row["broken"] = f"its process ended with exit code {process.exitcode}"
    if process.is_alive():
        process.kill()
    process.join()
    here.close()
    return row


def _nothing() -> None:
    pass


def _work(kind: str, name: str, there: Connection) -> None:
    """Runs in the process of one class."""
    import torch

    from . import trying

    torch.set_num_threads(1)
    try:
        row = trying.try_denoiser(name) if kind == "denoiser" else trying.try_pipeline(name)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        row = {"kind": kind, "stages": {}, "broken": f"unexpected {type(error).__name__} in {place}: {error}"[:300]}
    there.send(row)
    there.close()


def record(name: str, row: dict) -> None:
    """Put one row into the file of results; the rows of another version of diffusers are dropped."""
    recorded = read()
    rows = recorded["rows"] if recorded["diffusers"] == installed() else {}
    rows[name] = row | {"code": code()}
    content = {"diffusers": installed(), "classes": classes(), "rows": rows}
    write_whole(results_file(), (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


def left(names: Iterable[str]) -> list[str]:
    """The classes without a row that was made with the code and the diffusers at hand."""
    recorded, now = read(), code()
    rows = recorded["rows"] if recorded["diffusers"] == installed() else {}
    return [name for name in names if rows.get(name, {}).get("code") != now]


def estimate(names: Iterable[str]) -> float:
    """Seconds that these classes will take: what they took before, or the mean of all that are recorded."""
    taken = {name: row["seconds"] for name, row in read()["rows"].items()}
    mean = sum(taken.values()) / len(taken) if taken else 15.0
    return sum(taken.get(name, mean) for name in names)


def differences(before: dict, after: dict) -> list[str]:
    """A line for each stage or share in which two rows of a class differ."""
    lines = []
    for field in ("parameters", "in_parts", "denoiser", "form", "broken", "sites"):
        if before.get(field) != after.get(field):
            lines.append(f"{field}: {before.get(field)!r} became {after.get(field)!r}")
    for kind in before.get("reached", {}) | after.get("reached", {}):
        shares = before.get("reached", {}).get(kind, 0.0), after.get("reached", {}).get(kind, 0.0)
        if abs(shares[0] - shares[1]) > 0.001:
            lines.append(f"reached by {kind}: {shares[0]:.1%} became {shares[1]:.1%}")
    for stage in before["stages"] | after["stages"]:
        old, new = before["stages"].get(stage), after["stages"].get(stage)
        # Sentences hold numbers that differ from machine to machine; whether a stage holds does not.
        if (old is True, old is None) != (new is True, new is None):
            lines.append(f"{stage}: {_in_words(old)} became {_in_words(new)}")
    return lines


def _in_words(stage: bool | str | None) -> str:
    if stage is None:
        return "not reached"
    return "yes" if stage is True else f"no ({stage})"
