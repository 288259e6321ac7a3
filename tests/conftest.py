"""Shared by all tests: one thread (the pipelines are tiny), where files outside the project lie, which slow ones run.

A slow test with many parameters (all models, all methods, all exercises) runs with a third of them, which the commit
decides: three commits in a row run them all on average, and each commit runs every test function. `--all` runs all
parameters; so does naming tests or giving `-k`.
"""

import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start, such as a chapter's kernel
import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
torch.set_num_threads(1)


SHARE = 3
"""One of so many parameters of a slow test runs."""


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run slow tests with all parameters, not with a third of them")
    parser.addoption("--draw", type=int, help="a number that decides which third (default: the commit does)")


def pytest_collection_modifyitems(config, items):
    chosen = any("::" in argument for argument in config.args) or config.option.keyword
    if config.option.all or chosen:
        return
    families = defaultdict(list)
    for item in items:
        if item.get_closest_marker("slow") and hasattr(item, "callspec"):
            families[item.nodeid.partition("[")[0]].append(item)
    draw, left_out = drawn(config), set()
    for members in families.values():
        kept = [item for number, item in enumerate(members) if (number + draw) % SHARE == 0] or members[:1]
        left_out |= {item.nodeid for item in members} - {item.nodeid for item in kept}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in left_out])
    items[:] = [item for item in items if item.nodeid not in left_out]


def drawn(config) -> int:
    """The number of --draw, or one that the commit decides; 0 where there is no commit."""
    if config.option.draw is not None:
        return config.option.draw
    command = ["git", "rev-parse", "--short=6", "HEAD"]
    told = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return int(told.stdout[:6], 16) if told.returncode == 0 else 0


def pytest_report_header(config):
    if not config.option.all:
        return f"slow tests run with a third of their parameters (--draw {drawn(config) % SHARE}); --all runs all"


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
