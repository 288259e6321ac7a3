"""What is shipped: a wheel that prunes a pipeline by itself, without the lab."""

import os
import subprocess
import sys
import zipfile

import pytest

from ecodiff.storage.paths import root


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=root(), check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_a_wheel_is_the_library_and_its_licence(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "ecodiff/cost/presets/sdxl.json" in names and any(name.endswith("licenses/LICENSE") for name in names)
    assert [name for name in names if name.startswith("ecodiff/lab") or not name.startswith("ecodiff")] == []
    assert sum(info.file_size for info in zipfile.ZipFile(wheel).infolist()) < 2 * 1024**2


@pytest.mark.slow
def test_a_wheel_prunes_a_pipeline_by_itself(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "ECODIFF_DATA": str(tmp_path / "none")}
    smoke = [sys.executable, str(root() / "tests" / "project" / "wheel_smoke.py")]
    run = subprocess.run(smoke, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert str(tmp_path) in run.stdout.splitlines()[-1]
