"""What a learning run keeps on disk, so that one that was interrupted continues to the same λ, bit for bit.

    teacher.safetensors            final latents of the unmasked model, one row a sample
    state.safetensors              λ, optimiser state; in its metadata the run's description, history, update reached
    snapshots/000010.safetensors   λ after 10 updates

All files are safetensors, written under a temporary name and renamed. Random states need no saving: a draw is a
function of the seed and the number of the update. Each file names the run it belongs to; a folder never mixes two, and
one run at a time writes to it. Of many processes the first reads and writes, so that no other needs to see the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from functools import partial

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ecodiff import processes
from ecodiff.errors import EcoDiffError
from ecodiff.storage import fingerprint
from ecodiff.storage.files import alone_in, write_whole
from ecodiff.storage.paths import checked_path


class Folder:
    """One run's folder, a context in which no other process has it.

    Raises EcoDiffError for files of another run, damaged files, where it cannot write, and while another run is on.
    """

    def __init__(self, path: str | os.PathLike, run: dict):
        self.path, self.run = checked_path(path, "resume_dir"), run
        processes.of_first(self._make)
        self._lock = alone_in(self.path)

    def _make(self) -> None:
        try:
            (self.path / "snapshots").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EcoDiffError(f"resume_dir {self.path} cannot be made ({error}): choose another folder.") from error

    def __enter__(self) -> Folder:
        processes.of_first(self._take)
        return self

    def __exit__(self, *error) -> None:
        if processes.is_first():
            self._lock.__exit__(*error)

    def _take(self) -> None:
        self._lock.__enter__()

    def save_teacher(self, latents: Tensor, seconds_a_sample: float) -> None:
        self._write("teacher.safetensors", {"latents": latents}, {"seconds_a_sample": seconds_a_sample})

    def load_teacher(self) -> tuple[Tensor, float] | None:
        """What `save_teacher` wrote; None where it did not get so far."""
        tensors, metadata = self._read("teacher.safetensors")
        if not tensors:
            return None
        return tensors["latents"], metadata["seconds_a_sample"]

    def save_state(self, gates, optimizer: torch.optim.Optimizer) -> None:
        """Write λ, optimiser state and history as one file, and snapshots that are not there yet."""
        if not processes.is_first():
            return
        for update, values in gates.snapshots.items():
            if not (self.path / _snapshot(update)).exists():
                self._write(_snapshot(update), values, {})
        tensors = {f"log_alpha/{name}": value for name, value in gates.log_alpha.items()}
        names = {value: name for name, value in gates.log_alpha.items()}
        for parameter, values in optimizer.state.items():
            for slot, value in values.items():
                tensors[f"optimizer/{slot}/{names[parameter]}"] = torch.as_tensor(value)
        self._write("state.safetensors", tensors, {"history": gates.history})

    def site_names(self) -> set[str] | None:
        """Names of the sites whose λ is on disk; None where no update was saved yet."""
        tensors, _ = self._read("state.safetensors")
        names = {key.partition("/")[2] for key in tensors if key.startswith("log_alpha/")}
        return names or None

    def load_state(self, gates, optimizer: torch.optim.Optimizer) -> int:
        """Bring gates and optimiser to the state on disk; returns the number of updates done (0 without a state)."""
        tensors, metadata = self._read("state.safetensors")
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            if kind == "log_alpha":
                gates.log_alpha[name].data.copy_(value)
            else:
                slot, _, name = name.partition("/")
                parameter = gates.log_alpha[name]
                # Adam keeps its step counter on the CPU.
                optimizer.state[parameter][slot] = value if value.dim() == 0 else value.to(parameter.device)
        if not tensors:
            return 0
        gates.history = metadata["history"]
        for update in range(len(gates.history) + 1):
            snapshot, _ = self._read(_snapshot(update))
            if snapshot:
                gates.snapshots[update] = snapshot
        return len(gates.history)

    def _write(self, name: str, tensors: dict[str, Tensor], metadata: dict) -> None:
        if not processes.is_first():
            return
        path = self.path / name
        contents = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        try:
            about = json.dumps({"run": self.run, **metadata})
            write_whole(path, save(contents, {"ecodiff": about, "sha256": _digest(contents, about)}))
        except OSError as error:
            raise EcoDiffError(
                f"{path} could not be written ({error}): what was saved before is still there."
            ) from error

    def _read(self, name: str) -> tuple[dict[str, Tensor], dict]:
        """Tensors and metadata of a file, ({}, {}) where it does not exist."""
        return processes.of_first(partial(self._read_here, name))

    def _read_here(self, name: str) -> tuple[dict[str, Tensor], dict]:
        path = self.path / name
        if not path.exists():
            return {}, {}
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata()
                tensors = {key: file.get_tensor(key) for key in file.keys()}
            metadata = json.loads(about["ecodiff"])
            if about.get("sha256") != _digest(tensors, about["ecodiff"]):
                raise ValueError("its contents do not fit their checksum")
        except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
            raise EcoDiffError(
                f"{path} is not a readable file of a run ({error}): delete it or choose another resume_dir."
            ) from error
        difference = _difference(_without_private(metadata["run"]), _without_private(self.run))
        if difference:
            raise EcoDiffError(f"{path} belongs to another run ({difference}): choose another resume_dir.")
        return tensors, metadata


def _snapshot(update: int) -> str:
    return f"snapshots/{update:06d}.safetensors"


def _digest(tensors: dict[str, Tensor], about: str) -> str:
    """SHA-256 over a file's metadata and tensors."""
    total = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        total.update(f"{name} {fingerprint.tensor_hash(tensors[name])}\n".encode())
    return total.hexdigest()


def _without_private(run: dict) -> dict:
    """A description without the scheduler's names that a save adds or drops: versions, which values are defaults."""
    scheduler = {name: value for name, value in run["scheduler"].items() if not name.startswith("_")}
    return run | {"scheduler": scheduler}


def _difference(there: dict, here: dict, prefix: str = "") -> str | None:
    """The first entry in which two descriptions differ, in words."""
    for key in {**there, **here}:
        a, b = there.get(key), here.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            inner = _difference(a, b, f"{prefix}{key}.")
            if inner:
                return inner
        elif a != b:
            return f"{prefix}{key} was {a!r}, is {b!r}"
    return None
