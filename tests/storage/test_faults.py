"""Damaged files of every kind, and runs that are killed: a sample of what `tests/faults.py` tries."""

import subprocess
import sys
from pathlib import Path

import pytest
from fuzzed import fuzz

QUICK = ("gates", "scores", "run/", "images", "rows", "list", "settings")


def test_damaged_files_are_refused_and_run_no_code():
    wrong, counts = fuzz(200, only=lambda target: target.file.startswith(QUICK))
    assert not wrong
    assert sum(outcomes["refused"] for outcomes in counts.values()) > 100


def test_damaged_configs_and_weights_of_models_are_refused_and_run_no_code():
    wrong, counts = fuzz(25, only=lambda target: target.file.startswith("pipe/unet"))
    assert not wrong and len(counts) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["learn", "generate", "evaluate", "retrain", "save", "study"])
def test_killed_runs_end_as_others_do(name):
    script = Path(__file__).parents[1] / "faults.py"
    subprocess.run([sys.executable, script, "--times", "2", "--only", name], check=True, timeout=1800)
