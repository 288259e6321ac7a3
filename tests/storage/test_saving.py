"""Saving replaces the files that it writes, all or none, and nothing else; all weights loaded are from the files."""

import copy
import inspect
import json
import os
import shutil
import stat
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline
from safetensors.torch import load_file, save_file
from tiny import latents, tiny_flux, tiny_sd

import ecodiff
from ecodiff import EcoDiffError, find_sites, prune
from ecodiff.lab.zoo import store
from ecodiff.method.surgery import prune_denoiser
from ecodiff.storage.files import write_whole
from ecodiff.storage.saving import finish_interrupted, replaced_files

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def no_waiting_for_disks(monkeypatch):
    """These tests end processes, not machines: that things are told to go to disk is enough."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def mask(model, kept, kinds=("attention", "feed_forward")):
    """Keeps the first `kept` of all units of every site."""
    sites = find_sites(model, kinds).items()
    return {name: torch.arange(site.units) < max(1, int(site.units * kept)) for name, site in sites}


@pytest.fixture(scope="module")
def pipes():
    """A dense pipeline and two pruned ones: (dense, half, most)."""
    dense = tiny_sd()
    return dense, prune(dense, mask(dense.unet, 0.5)), prune(dense, mask(dense.unet, 0.75))


def short(pipe):
    """A pipeline of two components around the same denoiser, which loads in no time."""
    return DDPMPipeline(unet=pipe.unet, scheduler=DDIMScheduler())


def contents(folder):
    """{name: bytes} of all that a reader finds, through links, hidden folders of a save left out."""
    found = {}
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".ecodiff-save-")]
        for path in (Path(parent, name) for name in names):
            if path.is_file():
                found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def leftovers(folder):
    return [path for path in folder.rglob("*") if ".ecodiff-save-" in path.name or path.is_symlink()]


def same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def project(folder):
    """A folder full of what is nobody's to delete; returns its contents."""
    files = {
        "train.py": "import ecodiff",
        "data/captions.txt": "a cat",
        ".git/HEAD": "ref: refs/heads/main",
        "README.md": "my card",
        "unet/diffusion_pytorch_model.fp16.safetensors": "the original in half precision",
        "unet/diffusion_pytorch_model.bin": "the original, pickled",
        "unet/notes.txt": "which units?",
        "vae/diffusion_pytorch_model-ema.safetensors": "another",
        "lora/pytorch_lora_weights.safetensors": "adapters",
        "checkpoint-500/optimizer.bin": "state",
        "safety_checker/config.json": "{}",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return contents(folder)


@pytest.mark.slow
def test_only_written_files_are_replaced(pipes, tmp_path):
    _, half, most = pipes
    foreign = project(tmp_path)
    for small in (half, most, half):
        small.save_pretrained(tmp_path)
        assert foreign.items() <= contents(tmp_path).items() and not leftovers(tmp_path)
        loaded = DiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
        assert same_weights(loaded.unet, small.unet) and torch.equal(latents(loaded), latents(small))


def test_a_denoiser_is_saved_beside_other_things(pipes, tmp_path, monkeypatch):
    _, half, most = pipes
    foreign = project(tmp_path)
    half.save_pretrained(tmp_path)
    before = contents(tmp_path)
    most.unet.save_pretrained(tmp_path)  # into the folder of a pipeline, whose files it does not write
    written = {"config.json", WEIGHTS}
    assert {name: data for name, data in contents(tmp_path).items() if name not in written} == before
    assert same_weights(DiffusionPipeline.from_pretrained(tmp_path, safety_checker=None).unet, half.unet)
    assert same_weights(type(most.unet).from_pretrained(tmp_path), most.unet)
    most.unet.save_pretrained(tmp_path / "unet")
    assert same_weights(DiffusionPipeline.from_pretrained(tmp_path, safety_checker=None).unet, most.unet)
    monkeypatch.chdir(tmp_path)
    for folder in (".", "checkpoint-500/.."):
        half.unet.save_pretrained(folder)
        assert same_weights(type(half.unet).from_pretrained("."), half.unet)
    assert foreign.items() <= contents(tmp_path).items() and not leftovers(tmp_path)
    with pytest.raises(EcoDiffError, match="working directory"):
        half.save_pretrained("")


def test_what_is_in_the_way_is_named_and_stays(pipes, tmp_path):
    half = pipes[1]
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "unet").write_text("a file")
    (tmp_path / "two" / "model_index.json").mkdir(parents=True)
    before = contents(tmp_path)
    for folder, message in (("thesis.tex", "is a file"), ("one", "needs a folder"), ("two", "needs a file")):
        with pytest.raises(EcoDiffError, match=message):
            half.save_pretrained(tmp_path / folder)
        assert contents(tmp_path) == before and not leftovers(tmp_path)
    assert os.listdir(tmp_path / "two") == ["model_index.json"]  # folders made on the way are gone, too


@pytest.mark.slow
@pytest.mark.parametrize("order", [("40KB", None), (None, "40KB"), ("40KB", "90KB"), ("90KB", "40KB")])
def test_weights_of_an_earlier_save_do_not_load_with_the_new(pipes, tmp_path, order):
    _, half, most = pipes
    for small, shards in zip((half, most), order, strict=True):
        options = {} if shards is None else {"max_shard_size": shards}
        small.save_pretrained(tmp_path / "kept", **options)
        small.save_pretrained(tmp_path / str(shards), **options)
    last = str(order[-1])
    assert contents(tmp_path / "kept") == contents(tmp_path / last)  # nothing of the earlier save is left
    loaded = ecodiff.load(tmp_path / "kept")
    assert same_weights(loaded.unet, most.unet) and same_weights(loaded.text_encoder, most.text_encoder)


def test_variants_live_side_by_side(pipes, tmp_path):
    _, half, most = pipes
    half.unet.save_pretrained(tmp_path)
    plain = contents(tmp_path)[WEIGHTS]
    # the older way of naming shards of a variant, whose index diffusers would read before the new file
    for name in (
        "diffusion_pytorch_model.safetensors.fp16.index.json",
        "diffusion_pytorch_model-00001-of-00002.fp16.bin",
    ):
        (tmp_path / name).write_text("{}")
    half.unet.save_pretrained(tmp_path, variant="fp16", max_shard_size="90KB")
    half.unet.save_pretrained(tmp_path, variant="fp16")
    assert sorted(contents(tmp_path)) == ["config.json", "diffusion_pytorch_model.fp16.safetensors", WEIGHTS]
    assert contents(tmp_path)[WEIGHTS] == plain
    assert same_weights(type(half.unet).from_pretrained(tmp_path, variant="fp16"), half.unet)


def test_links_stay_links(pipes, tmp_path):
    _, half, most = pipes
    real, blob = tmp_path / "disk" / "real", tmp_path / "blobs" / "3f2a"
    half.save_pretrained(real)
    (tmp_path / "here").symlink_to("disk/real")
    (real / "unet").rename(tmp_path / "disk" / "unet")
    (real / "unet").symlink_to("../unet")
    blob.parent.mkdir()
    for name in ("unet/config.json", "model_index.json"):
        (real / name).resolve().rename(blob.parent / name.replace("/", "-"))
    (real / "unet" / "config.json").symlink_to("../../blobs/unet-config.json")
    (real / "model_index.json").symlink_to(blob.parent / "model_index.json")
    (real / "readme").symlink_to("nowhere")
    blobs, before = contents(blob.parent), contents(tmp_path / "here")

    with monkey(os, "replace", fails_at=9), pytest.raises(EcoDiffError, match="nothing was written"):
        most.save_pretrained(tmp_path / "here")
    assert contents(tmp_path / "here") == before
    assert os.readlink(real / "unet" / "config.json") == "../../blobs/unet-config.json"
    assert os.readlink(real / "model_index.json") == str(blob.parent / "model_index.json")

    most.save_pretrained(tmp_path / "here")
    assert os.readlink(tmp_path / "here") == "disk/real" and os.readlink(real / "unet") == "../unet"
    assert os.readlink(real / "readme") == "nowhere"
    assert contents(blob.parent) == blobs  # others read them
    assert not (real / "model_index.json").is_symlink()
    assert same_weights(ecodiff.load(tmp_path / "here").unet, most.unet)

    (tmp_path / "soon").symlink_to("disk/new")
    most.save_pretrained(tmp_path / "soon")
    assert (tmp_path / "soon").is_symlink() and same_weights(ecodiff.load(tmp_path / "disk" / "new").unet, most.unet)


class monkey:  # noqa: N801  used like a function
    """Has the n-th call of `module.name` fail like a full disk."""

    def __init__(self, module, name, fails_at):
        self.module, self.name, self.left, self.real = module, name, fails_at, getattr(module, name)

    def __enter__(self):
        setattr(self.module, self.name, self)

    def __exit__(self, *_):
        setattr(self.module, self.name, self.real)

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            raise OSError(28, "No space left on device")
        return self.real(*args, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["symlink", "replace", "fsync", "mkdir"])
def test_whatever_fails_the_earlier_model_stays(pipes, tmp_path, name):
    _, half, most = pipes
    template, folder = tmp_path / "template", tmp_path / "small"
    project(template)
    short(half).save_pretrained(template, max_shard_size="90KB")
    before = contents(template)
    shutil.copytree(template, folder)
    short(most).save_pretrained(folder)
    after, refused = contents(folder), 0
    for n in range(1, 200):
        shutil.rmtree(folder)
        shutil.copytree(template, folder)
        failing = monkey(os, name, fails_at=n)
        try:
            with failing:
                short(most).save_pretrained(folder)
        except EcoDiffError as error:
            assert "nothing was written" in str(error) and "No space left" in str(error)
            assert contents(folder) == before and not leftovers(tmp_path)
            refused += 1
            continue
        assert contents(folder) == after
        finish_interrupted(folder)  # a failure after the change leaves only something to tidy
        assert contents(folder) == after and not leftovers(tmp_path)
        if failing.left > 0:
            break
    assert refused > 1


DEADLY = ("replace", "rename", "link", "symlink", "unlink", "mkdir", "rmdir", "fsync", "chmod")


def killed(act, at):
    """Run `act` in a forked process that ends without a word before its `at`-th change to the disk; True if it did."""
    child = os.fork()
    if child == 0:
        try:
            left = at

            def deadly(real):
                def call(*args, **kwargs):
                    nonlocal left
                    left -= 1
                    if left == 0:
                        os._exit(9)
                    return real(*args, **kwargs)

                return call

            for name in DEADLY:
                setattr(os, name, deadly(getattr(os, name)))
            act()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


@pytest.mark.slow
@pytest.mark.parametrize(("shards", "step"), [(("90KB", "10GB"), 1), (("10GB", "90KB"), 3)])
def test_killed_at_any_moment_one_of_the_models_loads(pipes, tmp_path, shards, step):
    _, half, most = pipes
    template, folder = tmp_path / "template", tmp_path / "small"
    foreign = project(template)
    (template / "more").mkdir()
    (template / "scheduler").symlink_to("more")
    short(half).save_pretrained(template, max_shard_size=shards[0])
    states = [contents(template)]
    shutil.copytree(template, folder, symlinks=True)
    short(most).save_pretrained(folder, max_shard_size=shards[1])
    states.append(contents(folder))
    assert foreign.items() <= states[0].items() and foreign.items() <= states[1].items()
    models, seen = (half.unet, most.unet), []
    for n in range(1, 1000, step):
        shutil.rmtree(folder)
        shutil.copytree(template, folder, symlinks=True)
        died = killed(lambda: short(most).save_pretrained(folder, max_shard_size=shards[1]), at=n)
        state = states.index(contents(folder))  # bit for bit one of the two, never a mixture
        if n % 16 == 0 or state not in seen:  # loading tidies up; it takes time, so that the other cases do only that
            assert same_weights(DiffusionPipeline.from_pretrained(folder).unet, models[state])
        else:
            finish_interrupted(folder)
        assert contents(folder) == states[state] and leftovers(folder) == [folder / "scheduler"]
        seen.append(state)
        if not died:
            break
    assert seen == sorted(seen) and n > 60 and seen.count(1) > 20 / step


@pytest.mark.slow
@pytest.mark.parametrize("first", [40, 55, 70, 75])
def test_killed_while_tidying_up_after_a_kill(pipes, tmp_path, first):
    _, half, most = pipes
    template, folder = tmp_path / "template", tmp_path / "small"
    half.unet.save_pretrained(template, max_shard_size="90KB")
    before = contents(template)
    assert killed(lambda: most.unet.save_pretrained(template), at=first)
    expected, hidden = contents(template), leftovers(template)
    assert hidden and (expected == before or type(most.unet).from_pretrained(template))
    for second in range(1, 100):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(template, folder, symlinks=True)
        died = killed(lambda: finish_interrupted(folder), at=second)
        assert contents(folder) == expected
        finish_interrupted(folder)
        assert contents(folder) == expected and not leftovers(folder)
        if not died:
            break
    assert second > 5


@pytest.mark.slow
def test_killed_in_a_new_folder_nothing_or_all_is_there(pipes, tmp_path):
    half, folder = pipes[1], tmp_path / "deep" / "small"
    for n in range(1, 1000):
        died = killed(lambda: short(half).save_pretrained(folder), at=n)
        if folder.exists():
            assert same_weights(DiffusionPipeline.from_pretrained(folder).unet, half.unet)
            shutil.rmtree(folder)
        if not died:
            break
    assert n > 10
    short(half).save_pretrained(folder)  # sweeps what its predecessors left
    assert os.listdir(folder.parent) == ["small"]


@pytest.mark.slow
def test_killed_with_text_encoders_and_loaded_by_ecodiff(pipes, tmp_path):
    _, half, most = pipes
    half.save_pretrained(tmp_path / "template", max_shard_size="90KB")
    for n in range(150, 2000, 40):
        shutil.rmtree(tmp_path / "small", ignore_errors=True)
        shutil.copytree(tmp_path / "template", tmp_path / "small")
        died = killed(lambda: most.save_pretrained(tmp_path / "small"), at=n)
        tokenizer = (tmp_path / "small" / "tokenizer" / "tokenizer.json").read_bytes()
        loaded = ecodiff.load(tmp_path / "small")
        assert same_weights(loaded.unet, half.unet) or same_weights(loaded.unet, most.unet)
        assert same_weights(loaded.text_encoder, half.text_encoder) and not leftovers(tmp_path)
        assert (tmp_path / "small" / "tokenizer" / "tokenizer.json").read_bytes() == tokenizer
        if not died:
            break
    assert same_weights(loaded.unet, most.unet)


@pytest.mark.slow
def test_a_save_that_runs_is_left_alone(pipes, tmp_path):
    _, half, most = pipes
    half.save_pretrained(tmp_path / "small")
    with replaced_files(tmp_path / "small") as first, replaced_files(tmp_path / "other") as second:
        for written in (first, second):
            most.unet.save_pretrained(f"{written}/unet")
        assert same_weights(ecodiff.load(tmp_path / "small").unet, half.unet)
        half.save_pretrained(tmp_path / "small")
        half.save_pretrained(tmp_path / "other")  # comes into being while the other save writes
        assert os.path.isdir(first) and os.path.isdir(second)
    for name in ("small", "other"):
        assert same_weights(ecodiff.load(tmp_path / name).unet, most.unet)
    assert sorted(os.listdir(tmp_path)) == ["other", "small"] and not leftovers(tmp_path)


def test_hidden_folders_that_are_not_of_a_save_of_ours_stay(pipes, tmp_path):
    half = pipes[1]
    half.unet.save_pretrained(tmp_path / "small")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "thesis.tex").write_text("years of work")
    (tmp_path / "small" / ".ecodiff-save-link").symlink_to("../elsewhere")
    (tmp_path / "small" / ".cache").mkdir()
    before = contents(tmp_path / "elsewhere")
    half.unet.save_pretrained(tmp_path / "small")
    assert contents(tmp_path / "elsewhere") == before and (tmp_path / "small" / ".cache").is_dir()


def test_everything_is_on_disk_before_a_name_leads_to_it(pipes, tmp_path, monkeypatch):
    _, half, most = pipes
    half.unet.save_pretrained(tmp_path / "small")
    synced, replace, fsync = set(), os.replace, os.fsync

    def inode(path):
        return os.stat(path).st_ino

    def note(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def check(source, target):
        assert os.path.islink(source) or inode(source) in synced, source
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", check)
    most.unet.save_pretrained(tmp_path / "small")
    write_whole(tmp_path / "gates", b"content")
    assert {inode(path) for path in tmp_path.rglob("*")} <= synced


def test_permissions(pipes, tmp_path):
    _, half, most = pipes
    umask = os.umask(0o027)
    try:
        half.unet.save_pretrained(tmp_path / "small")
        (tmp_path / "small" / "config.json").chmod(0o664)
        most.unet.save_pretrained(tmp_path / "small", max_shard_size="90KB")
        (tmp_path / "kept").write_text("old")
        (tmp_path / "kept").chmod(0o600)
        write_whole(tmp_path / "kept", b"new")
    finally:
        os.umask(umask)

    def mode(name):
        return oct(stat.S_IMODE((tmp_path / name).stat().st_mode))

    assert mode("small") == "0o750" and mode("small/config.json") == "0o664" and mode("kept") == "0o600"
    weights = next(name for name in contents(tmp_path / "small") if name.endswith(".safetensors"))
    assert mode(f"small/{weights}") == mode("small/diffusion_pytorch_model.safetensors.index.json") == "0o640"


def test_write_protected_files_are_not_replaced(pipes, tmp_path, monkeypatch):
    _, half, most = pipes
    half.unet.save_pretrained(tmp_path)
    before, access = contents(tmp_path), os.access
    monkeypatch.setattr(os, "access", lambda path, how: not str(path).endswith("config.json") and access(path, how))
    with pytest.raises(EcoDiffError, match="config.json: is write-protected"):
        most.unet.save_pretrained(tmp_path)
    assert contents(tmp_path) == before


def test_without_symbolic_links_only_new_folders(pipes, tmp_path, monkeypatch):
    _, half, most = pipes

    def refuse(*args, **kwargs):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    half.save_pretrained(tmp_path / "small")
    before = contents(tmp_path)
    with pytest.raises(EcoDiffError, match="no symbolic links.*new folder"):
        most.save_pretrained(tmp_path / "small")
    assert contents(tmp_path) == before and not leftovers(tmp_path)


def test_without_hard_links_the_earlier_files_are_copied(pipes, tmp_path, monkeypatch):
    _, half, most = pipes
    half.unet.save_pretrained(tmp_path)
    monkeypatch.setattr(os, "link", monkey(os, "link", fails_at=1))
    most.unet.save_pretrained(tmp_path)
    assert same_weights(type(most.unet).from_pretrained(tmp_path), most.unet)


def relatives(pipe):
    """The same pruned pipeline in the forms that it takes in users' hands."""
    yield copy.copy(pipe)
    yield copy.deepcopy(pipe)
    yield type(pipe)(**pipe.components, requires_safety_checker=False)


def test_a_copy_saves_what_it_holds(pipes, tmp_path):
    _, half, most = pipes
    for n, pipe in enumerate(relatives(half)):
        pipe.unet = most.unet
        pipe.save_pretrained(tmp_path / str(n))
        assert same_weights(ecodiff.load(tmp_path / str(n)).unet, most.unet)
    assert n == 2


@pytest.mark.slow
def test_every_pipeline_with_a_pruned_denoiser_saves_all_or_nothing(pipes, tmp_path):
    dense, half, _ = pipes
    half.save_pretrained(tmp_path / "small")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "small")
    compiled = copy.copy(half)
    compiled.unet = torch.compile(half.unet)
    before = contents(tmp_path)
    for pipe in (half, loaded, compiled, *relatives(half)):
        with monkey(os, "replace", fails_at=5), pytest.raises(EcoDiffError, match="nothing was written"):
            pipe.save_pretrained(tmp_path / "small")
        assert contents(tmp_path) == before
    with monkey(os, "replace", fails_at=5), pytest.raises(EcoDiffError, match="nothing was written"):
        ecodiff.save(dense, tmp_path / "small")
    assert contents(tmp_path) == before


@pytest.mark.slow
def test_arguments_are_those_of_diffusers(pipes, tmp_path):
    half = pipes[1]
    ours, theirs = inspect.signature(half.save_pretrained), inspect.signature(tiny_sd().save_pretrained)
    assert ours == theirs and "save_directory" in ours.parameters
    for n, pipe in enumerate((half, *relatives(half))):
        pipe.save_pretrained(save_directory=str(tmp_path / f"{n}a"), variant="ema")
        pipe.save_pretrained(tmp_path / f"{n}b", True, "ema", "90KB", False)
        ecodiff.save(pipe, tmp_path / f"{n}c", True, "ema", max_shard_size="90KB")
        ecodiff.save(pipe, save_directory=tmp_path / f"{n}d", safe_serialization=True)
        assert (tmp_path / f"{n}a/unet/diffusion_pytorch_model.ema.safetensors").is_file()
        for letter in "bc":
            assert (tmp_path / f"{n}{letter}/unet/diffusion_pytorch_model.safetensors.index.ema.json").is_file()
        for letter in "abc" if n == 0 else ():
            loaded = DiffusionPipeline.from_pretrained(tmp_path / f"{n}{letter}", variant="ema")
            assert same_weights(loaded.unet, half.unet)
    net = half.unet
    assert inspect.signature(net.save_pretrained) == inspect.signature(tiny_sd().unet.save_pretrained)
    net.save_pretrained(save_directory=tmp_path / "net", is_main_process=True)
    net.save_pretrained(tmp_path / "net", True, None, True, "ema", "90KB", False)
    ecodiff.save(net, tmp_path / "net", variant="fp16")
    for variant in (None, "ema", "fp16"):
        assert same_weights(type(net).from_pretrained(tmp_path / "net", variant=variant), net)
    before = contents(tmp_path / "net")
    net.save_pretrained(tmp_path / "net", is_main_process=False, max_shard_size="90KB")
    assert before.items() <= contents(tmp_path / "net").items()  # removing is the main process's business
    for target in (half, net):
        with pytest.raises(EcoDiffError, match="pickle"):
            target.save_pretrained(tmp_path / "pickled", safe_serialization=False)
        with pytest.raises(EcoDiffError, match="pickle"):
            ecodiff.save(target, tmp_path / "pickled", safe_serialization=False)
    with pytest.raises(EcoDiffError, match="pickle"):
        half.save_pretrained(tmp_path / "pickled", False)
    with pytest.raises(TypeError):
        half.save_pretrained()
    assert not (tmp_path / "pickled").exists()


class Hub:
    """Stands in for the Hub: what was asked of it, and what it was sent."""

    def __init__(self, monkeypatch, fails=False):
        self.created, self.uploads, self.fails = [], [], fails
        for module in (diffusers.pipelines.pipeline_utils, diffusers.models.modeling_utils, diffusers.utils.hub_utils):
            monkeypatch.setattr(module, "create_repo", self.create_repo)
            monkeypatch.setattr(module, "load_or_create_model_card", self.card)
            monkeypatch.setattr(module, "populate_model_card", self.card)
        monkeypatch.setattr(diffusers.utils.hub_utils, "upload_folder", self.upload_folder)

    def create_repo(self, repo_id, **options):
        self.created.append((repo_id, options))
        return type("Url", (), {"repo_id": f"me/{repo_id}"})

    def card(self, *args, **options):
        return self

    def save(self, path):
        with open(path, "w") as file:
            file.write("the Hub's card")

    def upload_folder(self, *, folder_path, **options):
        if self.fails:
            raise ConnectionError("the line is dead")
        self.uploads.append((str(folder_path), options, sorted(os.listdir(folder_path))))


def test_push_to_hub(pipes, tmp_path, monkeypatch):
    half, hub = pipes[1], Hub(monkeypatch)
    half.save_pretrained(tmp_path / "small", push_to_hub=True, private=True, token="t", commit_message="smaller")
    (repo, asked), (folder, options, sent) = hub.created[0], hub.uploads[0]
    assert repo == "small" and asked == {"exist_ok": True, "private": True, "token": "t"}
    assert folder == str(tmp_path / "small") and options["repo_id"] == "me/small"
    assert options["commit_message"] == "smaller" and {"README.md", "model_index.json", "unet"} <= set(sent)
    assert (tmp_path / "small" / "README.md").read_text() == "the Hub's card"

    (tmp_path / "small" / "README.md").write_text("my card")
    half.unet.save_pretrained(tmp_path / "small", True, None, True, None, "10GB", True, repo_id="net")
    assert hub.created[1][0] == "net" and (tmp_path / "small" / "README.md").read_text() == "my card"
    assert "config.json" in hub.uploads[1][2] and not [name for name in hub.uploads[1][2] if "ecodiff-save" in name]

    half.push_to_hub("again")
    half.unet.push_to_hub("net-again")
    assert [options["repo_id"] for _, options, _ in hub.uploads[2:]] == ["me/again", "me/net-again"]
    assert "_upload_folder" not in {**vars(half), **vars(half.unet)}


@pytest.mark.slow
def test_a_broken_connection_does_not_undo_the_save(pipes, tmp_path, monkeypatch):
    half = pipes[1]
    Hub(monkeypatch, fails=True)
    with pytest.raises(ConnectionError, match="the line is dead"):
        half.save_pretrained(tmp_path / "small", push_to_hub=True)
    assert same_weights(ecodiff.load(tmp_path / "small").unet, half.unet)


def damaged(folder, change, name=WEIGHTS):
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name, {"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize("slow", [True, False])
def test_weights_that_are_not_in_the_files_are_an_error(pipes, tmp_path, slow):
    half = pipes[1]
    half.save_pretrained(tmp_path)
    options = {"low_cpu_mem_usage": False} if slow else {}
    whole = (tmp_path / "unet" / WEIGHTS).read_bytes()

    def drop(tensors):
        del tensors["conv_in.weight"], tensors["conv_in.bias"]

    def add(tensors):
        tensors["conv_in.scale"] = torch.ones(3)

    def crop(tensors):
        tensors["conv_in.weight"] = tensors["conv_in.weight"][:-1].clone()

    messages = {drop: "lack 2 tensors, such as 'conv_in.bias'", add: "conv_in.scale", crop: "do not fit"}
    for change, message in messages.items():
        damaged(tmp_path / "unet", change)
        for load in (ecodiff.load, DiffusionPipeline.from_pretrained):
            with pytest.raises(EcoDiffError, match=message):
                load(tmp_path, **options)
        with pytest.raises(EcoDiffError, match=message):
            type(half.unet).from_pretrained(tmp_path, subfolder="unet", **options)
        (tmp_path / "unet" / WEIGHTS).write_bytes(whole)
    assert same_weights(ecodiff.load(tmp_path, **options).unet, half.unet)
    model, info = type(half.unet).from_pretrained(tmp_path / "unet", output_loading_info=True)
    assert same_weights(model, half.unet) and not info["missing_keys"]


def test_what_no_component_may_lack_is_named(pipes, tmp_path):
    """Of stock classes, too: diffusers and transformers would make it random."""
    pipes[0].save_pretrained(tmp_path)
    for folder, name in (("unet", WEIGHTS), ("text_encoder", "model.safetensors")):
        whole = (tmp_path / folder / name).read_bytes()
        lost = sorted(load_file(tmp_path / folder / name))[0]
        damaged(tmp_path / folder, lambda tensors, lost=lost: tensors.pop(lost), name)
        with pytest.raises(EcoDiffError, match=f"lack 1 of its tensors, such as .*{lost.rpartition('.')[0][-8:]}"):
            ecodiff.load(tmp_path)
        (tmp_path / folder / name).write_bytes(whole)
    header = whole.replace(b'"F32"', b'"I32"', 1)
    (tmp_path / folder / name).write_bytes(header)
    with pytest.raises(EcoDiffError, match="is of dtype I32"):
        ecodiff.load(tmp_path)


def test_a_config_that_would_never_end_is_named(pipes, tmp_path):
    pipes[1].save_pretrained(tmp_path)
    config = json.loads((tmp_path / "unet" / "config.json").read_text())
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config | {"layers_per_block": 10**9}))
    for load in (ecodiff.load, lambda path: type(pipes[1].unet).from_pretrained(path / "unet")):
        with pytest.raises(EcoDiffError, match="layers_per_block is 1000000000"):
            load(tmp_path)


def test_a_shard_that_lacks_what_its_index_names_is_an_error(pipes, tmp_path):
    half = pipes[1]
    half.unet.save_pretrained(tmp_path, max_shard_size="90KB")
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    shard = tmp_path / index["weight_map"]["conv_in.weight"]
    tensors = load_file(shard)
    del tensors["conv_in.weight"]
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(EcoDiffError, match="conv_in.weight"):
        type(half.unet).from_pretrained(tmp_path)


def test_channels_in_wrong_places_are_an_error(tmp_path):
    net = tiny_flux().transformer
    small = prune_denoiser(net, mask(net, 0.5, ("modulation",)))
    small.save_pretrained(tmp_path)
    name = next(name for name in load_file(tmp_path / WEIGHTS) if name.endswith(".index"))
    whole = (tmp_path / WEIGHTS).read_bytes()

    def beyond(tensors):
        tensors[name][-1] = 10**6

    def twice(tensors):
        tensors[name][1] = tensors[name][0]

    for change in (beyond, twice):
        damaged(tmp_path, change)
        with pytest.raises(EcoDiffError, match="channels"):
            type(small).from_pretrained(tmp_path)
        (tmp_path / WEIGHTS).write_bytes(whole)
    assert same_weights(type(small).from_pretrained(tmp_path), small)


def test_what_diffusers_itself_wrote_loads_as_before(pipes, tmp_path):
    half = pipes[1]
    DiffusionPipeline.save_pretrained.of_library(half, tmp_path / "theirs")
    half.save_pretrained(tmp_path / "ours")
    assert contents(tmp_path / "theirs") == contents(tmp_path / "ours")  # the saved format is diffusers' own
    assert same_weights(ecodiff.load(tmp_path / "theirs").unet, half.unet)


def test_from_config_takes_a_folder(pipes, tmp_path):
    half = pipes[1]
    half.unet.save_pretrained(tmp_path)
    for made in (type(half.unet).from_config(str(tmp_path)), type(half.unet).from_config(half.unet.config)):
        assert {n: t.shape for n, t in made.state_dict().items()} == {
            n: t.shape for n, t in half.unet.state_dict().items()
        }
    with pytest.raises(ValueError, match="provide a config"):
        type(half.unet).from_config()


def test_pipelines_without_a_pruned_denoiser_are_saved_as_ever(pipes, tmp_path):
    dense = pipes[0]
    dense.save_pretrained(tmp_path / "dense", safe_serialization=False)  # diffusers' own affair
    assert (tmp_path / "dense" / "unet" / "diffusion_pytorch_model.bin").is_file()


def test_write_whole_goes_through_a_link(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    write_whole(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


def test_a_trained_model_takes_the_place_of_another_and_of_its_card(tmp_path):
    names = ("README.md", "measured.json", "fixed.png", "notes.txt")
    for name in names:
        (tmp_path / name).write_text("about the earlier model")
    store.save(tiny_sd(), {"id": "new"}, {}, tmp_path)
    assert not [name for name in names[:3] if (tmp_path / name).exists()] and (tmp_path / "notes.txt").exists()
    assert json.loads((tmp_path / "recipe.json").read_text())["recipe"] == {"id": "new"}
    assert DiffusionPipeline.from_pretrained(tmp_path, safety_checker=None).unet.dtype == torch.float32
