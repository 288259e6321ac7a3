"""Where a row comes from: versions of libraries, commit, machine."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .paths import root

_LIBRARIES = ("torch", "diffusers", "transformers", "torchmetrics", "numpy", "ecodiff")


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that numbers depend on."""
    found = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            pass
    return found


def commit() -> str | None:
    """The repository's commit (12 digits), with "+" where tracked files were changed; None outside a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=root(), capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}+" if changed else head


@lru_cache(maxsize=1)
def machine() -> dict:
    """Processor, cores, memory in GiB and accelerator; nothing that names the machine."""
    found = {"cpu": _processor(), "cores": os.cpu_count(), "system": platform.system()}
    memory = memory_bytes()
    if memory is not None:
        found["memory_gib"] = round(memory / 2**30)
    import torch

    if torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name()
    return found


def _processor() -> str:
    try:
        if platform.system() == "Darwin":
            return subprocess.run(
                ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, timeout=5
            ).stdout.strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except (OSError, subprocess.SubprocessError):
        pass
    return platform.processor() or platform.machine()


def memory_bytes() -> int | None:
    """Bytes of memory of this machine; None where the system does not say (Windows)."""
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
