"""Shared by all tests: one thread (the pipelines are tiny), and where files outside the project may lie."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start, such as a chapter's kernel
import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_file():
    """A function from a name to the path of a file in ECODIFF_SHARED (or ../shared); skips where it is absent."""
    folder = Path(os.environ.get("ECODIFF_SHARED") or Path(__file__).resolve().parents[2] / "shared")

    def find(name: str) -> Path:
        if not (folder / name).is_file():
            pytest.skip(f"{name} is not in {folder} (set ECODIFF_SHARED to the folder that holds it)")
        return folder / name

    return find


@pytest.fixture
def refused(capsys):
    """A function that gives a command which must be refused, and returns the one line that it says."""
    from ecodiff.__main__ import WRONG, main

    def command(*arguments) -> str:
        capsys.readouterr()
        assert main([*map(str, arguments)]) == WRONG
        shown = capsys.readouterr()
        assert shown.err.startswith("error: ") and shown.err.count("\n") == 1 and shown.out == ""
        return shown.err

    return command
