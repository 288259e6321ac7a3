"""Files written whole, folders that one process has for itself, and paths that are none."""

import os

import pytest
import torch

from ecodiff import EcoDiffError
from ecodiff.storage.files import alone_in, locked, write_whole
from ecodiff.storage.images import About, ImageFolder, read_image, read_images
from ecodiff.storage.paths import checked_path


def test_what_a_killed_process_left_of_a_file_goes_and_what_another_is_writing_stays(tmp_path):
    dead, living = tmp_path / ".rows.jsonl.1.1.tmp", tmp_path / ".rows.jsonl.2.2.tmp"
    other = tmp_path / ".images.json.1.1.tmp"
    young = tmp_path / ".rows.jsonl.3.3.tmp"  # its process may be about to lock it
    for path in (dead, living, other, young):
        path.write_text("half")
        if path != young:
            os.utime(path, (0, 0))
    with locked(living, wait=True):
        write_whole(tmp_path / "rows.jsonl", b"all")
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", living.name, other.name, young.name}
    assert (tmp_path / "rows.jsonl").read_bytes() == b"all"


def test_a_folder_is_for_one_run_at_a_time(tmp_path):
    with alone_in(tmp_path):
        with pytest.raises(EcoDiffError, match="another run is writing there"):
            with alone_in(tmp_path):
                pass
    with alone_in(tmp_path):  # it is free again
        pass


def test_without_locks_nobody_is_kept_away(tmp_path, monkeypatch):
    monkeypatch.setattr("ecodiff.storage.files.fcntl", None)
    with alone_in(tmp_path), alone_in(tmp_path):
        write_whole(tmp_path / "a", b"all")
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    "path", [None, 3, b"folder", ["folder"], "a\0b", "x" * 300, "/".join(["x" * 200] * 30), "\ud800"]
)
def test_what_no_file_system_has_is_named(path):
    with pytest.raises(EcoDiffError, match="^--out: ") as caught:
        checked_path(path, "--out")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("kind", ["noise", "frames that repeat", "one frame"])
def test_clips_are_kept_frame_by_frame(tmp_path, kind):
    frames = torch.randint(256, (2, 6, 3, 16, 24), dtype=torch.uint8)
    if kind == "frames that repeat":
        frames[0], frames[1, 2:5] = 7, frames[1, 1]
    if kind == "one frame":
        frames = frames[:, :1]
    with ImageFolder(tmp_path / "clips", About(["a", "b"], [0, 1], {}, "model")) as folder:
        for number, clip in enumerate(frames):
            folder.write(number, clip)
    found, _ = read_images(tmp_path / "clips")
    assert torch.equal(found, frames[:, 0] if kind == "one frame" else frames)
    assert torch.equal(read_image(tmp_path / "clips" / "00001.png"), frames[1, 0])


@pytest.mark.parametrize("shape", [(2, 400), (1, 16, 16), (4, 16, 16), (5, 1, 16, 16)])
def test_what_is_no_image_and_no_clip_is_refused(tmp_path, shape):
    with ImageFolder(tmp_path / "sounds", About(["a"], [0], {}, "model")) as folder:
        with pytest.raises(EcoDiffError, match="of three colours"):
            folder.write(0, torch.zeros(shape, dtype=torch.uint8))
        assert folder.missing() == [0]
