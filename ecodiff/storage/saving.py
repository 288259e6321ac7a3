"""Saving into a folder that may hold other things: the files of one save are replaced together, all others stay.

A model is several files, and a system renames one at a time. So that a kill never leaves half of two models, each name
that is about to change becomes, for a moment, a symbolic link that leads through *one* other link:

    unet/config.json  ->  .ecodiff-save-1f3a/now/unet/config.json        now -> old

As long as `now` leads to `old`, a reader finds what was there before. Renaming one link, so that `now` leads to `new`,
changes all files at once. After that the new files move to their names and the hidden folder goes. Killed before the
change, the folder holds the earlier model; killed after it, the new one; in both cases for any reader that follows
links, without this package. `finish_interrupted` moves the files to their names; every save and load begins with it.
(Who deletes the hidden folder by hand before that deletes what the links lead to.)

The hidden folder lies inside the one that is saved to, so that renaming never crosses disks:

    .ecodiff-save-1f3a/new/     what this save wrote
                       old/     what lay under the same names (hard links, which need no space)
                       now      a link to one of the two
                       made/    the folders that this save had to make
"""

from __future__ import annotations

import errno
import inspect
import os
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path

from ecodiff.errors import EcoDiffError

from .files import locked, sync
from .paths import checked_path

_PREFIX = ".ecodiff-save-"


@contextmanager
def replaced_files(path: str | os.PathLike, outdated: Collection[str] = (), main: bool = True) -> Iterator[str]:
    """A folder to write to; when the context ends without an error, its files take their places in `path`, all at once.

    Everything else in `path` stays, with two exceptions: weight files of the same name and variant that a loader would
    read in the place of the new ones, such as shards of an earlier save and their index; and the names in `outdated`,
    which belong to the earlier model. `main=False` (a process that writes only its share) leaves those, too.

    Links to folders are followed. A file that is a link, as in the cache of a model hub, is replaced by a file: what it
    led to may be others' as well and stays as it is. A file keeps the permissions of the one that it replaces. A
    new file has those that the process gives to new files, also where a library let nobody but the owner read it.

    Raises EcoDiffError where saving fails (disk full, no permission, a file where a folder should be); `path` is then
    as it was before.
    """
    checked_path(path, "saving")
    if not os.fspath(path):
        raise EcoDiffError("Saving needs the name of a folder; '.' is the working directory.")
    try:
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_dir():
            raise EcoDiffError(f"{path}: is a file; give a folder to save to.")
        finish_interrupted(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        with _staging(target if target.is_dir() else target.parent) as staging:
            yield str(staging / "new")
            _permit(staging / "new")
            _sync_tree(staging / "new")
            if target.is_dir() or not _appears(staging / "new", target):
                _replace(target, staging, outdated, main)
    except Exception as error:  # a full disk is an OSError, a SafetensorError or, from tokenizers, a bare Exception
        if isinstance(error, EcoDiffError) and error.__cause__ is None:
            raise
        cause = error.__cause__ if isinstance(error, EcoDiffError) else error
        raise EcoDiffError(f"{path}: saving failed ({cause}); nothing was written.") from cause


def finish_interrupted(folder: str | os.PathLike) -> None:
    """Finish, or undo, what killed saves left in this folder and in the one that holds it.

    The model that loads from there stays the same: a save that had changed over is finished, another one undone. Saves
    that are still running are left alone, and so is a folder that cannot be written.
    """
    here = Path(os.path.realpath(folder))
    # The folder that holds the name, not the one that a link leads to.
    above = Path(os.path.realpath(Path(folder).absolute().parent))
    for place in (here, above):
        with suppress(OSError):
            if _stagings(place):
                with locked(place, wait=False) as alone:
                    if alone:
                        _settle_the_dead(place)


def whole(method: Callable) -> Callable:
    """A library's `save_pretrained` (a function of the object and its arguments) that replaces its files all at once.

    It takes what the library's takes, by position and by keyword, and does what the library's does, `push_to_hub`
    included: that begins once the files are in their places, and a README.md that is there already stays. Only
    `safe_serialization=False` is refused. `replaced_files` says what becomes of other files. Raises EcoDiffError.
    """
    method = getattr(method, "of_library", method)
    signature = inspect.signature(method)

    @wraps(method)
    def save_pretrained(self, save_directory, *args, **kwargs):
        checked_path(save_directory, "save_pretrained")
        given = signature.bind(self, save_directory, *args, **kwargs)
        given.apply_defaults()
        named = {**given.arguments, **kwargs}
        if not named.get("safe_serialization", True):
            raise EcoDiffError(
                f"{save_directory}: safe_serialization=False would write pickle files, which run code when they are "
                "loaded; leave it out and the weights are saved as safetensors."
            )
        push = bool(named.get("push_to_hub"))
        if push and named.get("repo_id") is None:
            kwargs["repo_id"] = Path(os.path.abspath(save_directory)).name  # the library would take the hidden folder's
        with _uploads_afterwards(self, save_directory, push):
            with replaced_files(save_directory, main=named.get("is_main_process", True)) as folder:
                method(self, folder, *args, **kwargs)
                if (Path(save_directory) / "README.md").exists():
                    (Path(folder) / "README.md").unlink(missing_ok=True)

    vars(save_pretrained)["of_library"] = method
    return save_pretrained


@contextmanager
def _uploads_afterwards(model, folder, push: bool) -> Iterator[None]:
    """Holds diffusers' upload back until the files are in `folder`, then uploads from there.

    diffusers writes and uploads in one method. Its upload would be of the hidden folder, and a connection that breaks
    would undo the save.
    """
    if not push or not hasattr(model, "_upload_folder"):
        yield
        return
    uploads = []

    def hold(working_dir, *args, **kwargs):
        uploads.append((args, kwargs))

    model._upload_folder = hold  # hides the method of the class for a moment
    try:
        yield
    finally:
        del model._upload_folder
    for args, kwargs in uploads:
        model._upload_folder(os.fspath(folder), *args, **kwargs)


@contextmanager
def _staging(place: Path) -> Iterator[Path]:
    """A hidden folder in `place` with an empty folder `new`; locked, so that others see that its process lives."""
    staging = place / f"{_PREFIX}{uuid.uuid4().hex[:12]}"
    before = place.stat()
    staging.mkdir()  # not by tempfile: after a kill others must be able to read the files in it
    try:
        with locked(staging, wait=True):
            (staging / "new").mkdir()
            yield staging
    except BaseException:
        _settle_or_leave(staging)
        with suppress(OSError):  # as it was before, the time of its last change included
            os.utime(place, ns=(before.st_atime_ns, before.st_mtime_ns))
        raise
    _settle_or_leave(staging)


def _appears(new: Path, target: Path) -> bool:
    """Make `new` the folder `target`, which did not exist: one rename. False where it has come into being meanwhile."""
    try:
        new.rename(target)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            return False
        raise
    sync(target.parent)
    return True


def _replace(target: Path, staging: Path, outdated: Collection[str], main: bool) -> None:
    """Put the files of `staging` in their places in the folder `target`, all or none."""
    with locked(target, wait=True) as alone:
        if alone:
            _settle_the_dead(target)
        if staging.parent != target:  # two processes saved to the same new folder
            with _staging(target) as inside:
                (staging / "new").rename(inside / "new")
                _change_over(target, inside, outdated, main)
        else:
            _change_over(target, staging, outdated, main)


def _change_over(target: Path, staging: Path, outdated: Collection[str], main: bool) -> None:
    try:
        _lead(staging, "old")
        written = _files(staging / "new")
        removed: set[str] = set()
        if main:
            removed = _stale(target, written) | _present(target, outdated)
        changing = sorted(written | removed)
        for folder in sorted({os.path.dirname(name) for name in changing}):
            finish_interrupted(target / folder)
            _make_folder(target, folder, staging)
        for name in changing:
            _check(target / name, target)
            if name in written and (target / name).is_file() and not (target / name).is_symlink():
                shutil.copymode(target / name, staging / "new" / name)
        # All that is slow or may fail comes before the first link; until then every name
        # is still that of the earlier file.
        (staging / "old").mkdir()
        for name in changing:
            _keep(target / name, staging / "old" / name)
        _sync_tree(staging / "old")
        for name in changing:
            _put_link(staging, _through_now(target, staging, name), target / name)
        _sync_folders(target, changing)
        _lead(staging, "new")  # from here on the new model is the one that loads
    finally:
        _settle_or_leave(staging)


def _settle(staging: Path) -> None:
    """Give each name the file that it leads to, then remove the hidden folder; the folder reads the same all along."""
    target = staging.parent
    try:
        current = os.readlink(staging / "now")
    except OSError:  # killed before anything was linked, or after everything was settled
        current = "old"
    names = _files(staging / "new") | _files(staging / "old")
    settled = [name for name in names if _leads_here(target, staging, name)]
    for name in settled:
        place, source = target / name, staging / current / name
        if source.is_symlink():
            _put_link(staging, os.readlink(source).removeprefix(_back(place, source) + os.sep), place)
        elif source.exists():
            os.replace(source, place)
        else:
            place.unlink()
    _sync_folders(target, settled)
    if current == "old":
        # Folders that this save made go with it, the inner ones first.
        for folder in sorted((staging / "made").rglob("*"), reverse=True):
            with suppress(OSError):  # someone else has put a file there
                (target / folder.relative_to(staging / "made")).rmdir()
    shutil.rmtree(staging)


def _settle_or_leave(staging: Path) -> None:
    """Settle a save of this process. What cannot be tidied now is left to `finish_interrupted`; either model loads."""
    if staging.is_dir():
        with suppress(OSError):
            _settle(staging)


def _settle_the_dead(place: Path) -> None:
    """Settle the saves into the folder `place` whose processes have ended; the caller has locked `place`."""
    for staging in _stagings(place):
        with locked(staging, wait=False) as dead:
            if dead:
                _settle(staging)


def _put_link(staging: Path, text: str, place: Path) -> None:
    """Put a link that says `text` in the place of what lies at `place`: one rename."""
    link = staging / "link"
    link.unlink(missing_ok=True)  # an earlier attempt was interrupted
    os.symlink(text, link)
    os.replace(link, place)


def _lead(staging: Path, name: str) -> None:
    """Make `now` lead to the folder `name`; on disk when this returns."""
    try:
        _put_link(staging, name, staging / "now")
    except (OSError, NotImplementedError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise EcoDiffError(
            f"{staging.parent}: this file system has no symbolic links, without which the files of a model cannot be "
            "replaced all at once; save to a new folder."
        ) from None
    sync(staging)


def _through_now(target: Path, staging: Path, name: str) -> str:
    """What the link called `name` says: the way from its folder through `now`."""
    folder = os.path.realpath((target / name).parent)
    return os.path.join(os.path.relpath(staging / "now", folder), name)


def _leads_here(target: Path, staging: Path, name: str) -> bool:
    """Whether the name is still the link that this save put there; a later save may have replaced it."""
    place = target / name
    return place.is_symlink() and os.readlink(place) == _through_now(target, staging, name)


def _keep(place: Path, kept: Path) -> None:
    """Make what lies at `place`, if anything, readable as `kept`, too."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    if place.is_symlink():
        os.symlink(os.path.join(_back(place, kept), os.readlink(place)), kept)
    elif place.exists():
        try:
            os.link(place, kept)
        except OSError:  # a file system without hard links
            shutil.copy2(place, kept)
            sync(kept)


def _back(place: Path, kept: Path) -> str:
    """The way from the folder of `kept` to that of `place`: what a relative link says begins there."""
    return os.path.relpath(place.parent, kept.parent)


def _make_folder(target: Path, name: str, staging: Path) -> None:
    """Make the folder `name` in `target` where it is missing, and remember that."""
    parts = Path(name).parts
    for depth in range(1, len(parts) + 1):
        part = Path(*parts[:depth])
        folder = Path(os.path.realpath(target / part))
        if not folder.exists():
            (staging / "made" / part).mkdir(parents=True, exist_ok=True)
            folder.mkdir(parents=True)
            sync(folder.parent)


def _check(place: Path, target: Path) -> None:
    """Raise EcoDiffError where `place` cannot be replaced, before anything is touched."""
    if not place.parent.is_dir():
        raise EcoDiffError(f"{place.parent}: is a file where the model needs a folder; save to another folder.")
    if place.parent.stat().st_dev != target.stat().st_dev:
        raise EcoDiffError(
            f"{place.parent}: leads to another disk than {target}, and files on two disks cannot be replaced at once; "
            "save to a new folder."
        )
    if place.is_dir():
        raise EcoDiffError(f"{place}: is a folder where the model needs a file; save to another folder.")
    if place.exists() and not place.is_symlink() and not os.access(place, os.W_OK):
        raise EcoDiffError(f"{place}: is write-protected; save to another folder, or permit writing.")


_SHARD = r"-\d{5}-of-\d{5}"


def _stale(target: Path, written: Collection[str]) -> set[str]:
    """Names in `target` of weight files that go by the same name and variant as written ones, but are none of them."""
    stale = set()
    for weights in written:
        if not weights.endswith(".safetensors"):
            continue
        folder, name = os.path.split(weights)
        pattern = _same_weights(re.sub(f"(?:{_SHARD})?\\.safetensors$", "", name))
        for other in _present(target, [os.path.join(folder, entry) for entry in _entries(target / folder)]):
            if other not in written and pattern.fullmatch(os.path.basename(other)):
                stale.add(other)
    return stale


def _same_weights(stem: str) -> re.Pattern:
    """Matches every file name under which a loader looks for the safetensors weights `stem` ("model", "model.fp16").

    transformers reads one file before an index of shards, diffusers an index before one file, and both an older way of
    naming variants. Pickle files come last everywhere, so that only their shards go, as in diffusers' own save.
    """
    base, _, variant = map(re.escape, stem.partition("."))
    ending = f"[.]{variant}" if variant else ""
    names = [
        rf"{base}{ending}(?:{_SHARD})?[.]safetensors",
        rf"{base}{ending}{_SHARD}[.]bin",
        rf"{base}[.](?:safetensors|bin)[.]index{ending}[.]json",
    ]
    if variant:  # the older way
        names.append(rf"{base}{_SHARD}[.]{variant}[.](?:safetensors|bin)")
        names.append(rf"{base}[.](?:safetensors|bin)[.]{variant}[.]index[.]json")
    return re.compile("|".join(names))


def _present(target: Path, names: Collection[str]) -> set[str]:
    """Those of the names that are files, or links to files, in `target`."""
    return {name for name in names if (target / name).is_file() or (target / name).is_symlink()}


def _entries(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


def _files(folder: Path) -> set[str]:
    """Names of all files below `folder`, relative to it."""
    files = set()
    for parent, _, names in os.walk(folder):
        for name in names:
            files.add(os.path.relpath(os.path.join(parent, name), folder))
    return files


def _stagings(place: Path) -> list[Path]:
    return [place / name for name in _entries(place) if name.startswith(_PREFIX) and not (place / name).is_symlink()]


def _permit(folder: Path) -> None:
    """Give the files below a new folder the permissions that this process gives to new files.

    safetensors writes files that nobody but their owner may read (0600), whatever the umask says.
    """
    mode = folder.stat().st_mode & 0o666  # the umask itself can be read only by changing it, for all threads
    for parent, _, names in os.walk(folder):
        for name in names:
            if not os.path.islink(os.path.join(parent, name)):
                os.chmod(os.path.join(parent, name), mode)


def _sync_tree(folder: Path) -> None:
    """Have everything below `folder` on disk, contents before the names that lead to them."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            if not os.path.islink(os.path.join(parent, name)):
                sync(os.path.join(parent, name))
        sync(parent)


def _sync_folders(target: Path, names: Collection[str]) -> None:
    for folder in sorted({(target / name).parent for name in names}):
        sync(folder)
