"""Published masks: those that come with the package, and files of the authors' code."""

import csv
import json
import pickle
import random

import pytest
import torch
from tiny import SDXL, full_size, latents, tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl

import ecodiff
from ecodiff import EcoDiffError, denoiser, find_sites, import_published, published
from ecodiff.__main__ import DONE, main
from ecodiff.method import published as module
from ecodiff.method.sites import KINDS
from ecodiff.method.surgery import prune_denoiser
from ecodiff.scores.files import about_scores, load_scores
from ecodiff.storage.paths import root


def test_the_published_mask_of_sdxl_prunes_sdxl_to_the_size_of_the_paper():
    """As many units of each module as the recorded facts about the published λ say, and Table 1's parameters."""
    unet = full_size("UNet2DConditionModel", **SDXL)
    for ratio, column, billions in ((0.1, "kept_10", 2.343), (0.2, "kept_20", 2.114)):
        mask = published("sdxl").mask(ratio)
        with open(root() / "data" / "paper" / "sdxl_lambda.csv", newline="") as file:
            kept = {row["site"]: int(row[column]) for row in csv.DictReader(file)}
        assert {name: int(keep.sum()) for name, keep in mask.items()} == kept
        small = prune_denoiser(unet, mask)
        assert round(sum(parameter.numel() for parameter in small.parameters()) / 1e9, 3) == billions
    gates = published("sdxl").gates(unet)
    assert gates.distribution.delta == 0.5 and gates.sites == find_sites(unet)
    counted = published("sdxl").mask(0.2, count="parameters")
    again = ecodiff.make_mask(gates.scores(), gates.sites, 0.2, count="parameters")
    assert all(torch.equal(counted[name], again[name]) for name in again)


def test_other_models_are_told_apart():
    with pytest.raises(EcoDiffError, match="published masks exist for: sdxl; not for 'flux'"):
        published("flux")
    with pytest.raises(EcoDiffError, match="not a site of this denoiser|units, its mask"):
        ecodiff.prune(tiny_sdxl(), published("sdxl").mask(0.2))
    with pytest.raises(EcoDiffError, match="gates: "):
        published("sdxl").gates(tiny_sdxl().unet)


def test_a_changed_file_is_not_read(monkeypatch):
    monkeypatch.setitem(module._FILES, "sdxl", "0" * 64)
    with pytest.raises(EcoDiffError, match="is not the file that came with the package"):
        published("sdxl")


def called(pipe, names):
    """The modules of these names in the order in which one call of the pipeline calls them."""
    order, hooks = [], []
    for name in names:
        hook = denoiser(pipe).get_submodule(name).register_forward_hook(lambda *_, name=name: order.append(name))
        hooks.append(hook)
    latents(pipe, steps=1, guidance_scale=1.0)
    for hook in hooks:
        hook.remove()
    return order


def as_the_authors(pipe):
    """{file name: list of λ in call order}, and λ by site name: each λ is another number."""
    sites = find_sites(denoiser(pipe), KINDS)
    files, named = {}, {}
    number = 0
    for kind, file in (("attention", "attn.pt"), ("feed_forward", "ff.pt"), ("modulation", "norm.pt")):
        names = [name for name, site in sites.items() if site.kind == kind]
        if names:
            files[file] = []
            for name in called(pipe, names):
                named[name] = torch.arange(number, number + sites[name].units).float()
                number += sites[name].units
                files[file].append(named[name].clone().requires_grad_())
    return files, named


@pytest.mark.parametrize("build", [tiny_sd, tiny_sdxl, tiny_flux])
def test_lists_in_the_order_of_calls_get_their_names(build, tmp_path):
    pipe = build()
    files, named = as_the_authors(pipe)
    for file, values in files.items():
        torch.save(values, tmp_path / file)
    gates = import_published(tmp_path, pipe)
    assert gates.log_alpha.keys() == named.keys()
    for name, value in named.items():
        assert torch.equal(gates.log_alpha[name], value), name
    alone = import_published(tmp_path / "ff.pt", denoiser(pipe))
    assert {site.kind for site in alone.sites.values()} == {"feed_forward"}
    ecodiff.prune(pipe, gates.mask(0.3))


@pytest.mark.slow
def test_of_sd3_with_a_module_that_is_no_site(tmp_path):
    pipe = tiny_sd3()
    files, named = as_the_authors(pipe)
    # Their code also masks what the last block's context goes through at the end.
    last = [name for name, _ in pipe.transformer.named_modules() if name.endswith("norm1_context")][-1]
    files["norm.pt"].append(torch.zeros(pipe.transformer.get_submodule(last).linear.out_features))
    for file, values in files.items():
        torch.save(values, tmp_path / file)
    gates = import_published(tmp_path, pipe)
    assert all(torch.equal(gates.log_alpha[name], value) for name, value in named.items())


def test_lists_of_what_they_call_legacy_mode(tmp_path):
    pipe = tiny_flux()
    sites = find_sites(pipe.transformer, KINDS)
    for file, end in (("ff.pt", (".ff", ".ff_context")), ("norm.pt", (".norm1_context",))):
        names = called(pipe, [name for name in sites if name.endswith(end)])
        torch.save([torch.randn(sites[name].units) for name in names], tmp_path / file)
        assert list(import_published(tmp_path / file, pipe).log_alpha) == [name for name in sites if name in names]


def test_lists_in_the_order_of_modules_are_refused(tmp_path):
    unet = full_size("UNet2DConditionModel", **SDXL)
    values = [torch.zeros(site.units) for site in find_sites(unet, ("attention",)).values()]
    torch.save(values, tmp_path / "attn.pt")
    with pytest.raises(EcoDiffError, match="attn.pt: λ of another model, or in another order: 140 modules with 2600"):
        import_published(tmp_path / "attn.pt", unet)


class Hostile:
    def __reduce__(self):
        return exec, ("import pathlib; pathlib.Path('was_run').touch()",)


def test_files_that_are_no_such_lists_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe = tiny_sd()
    values = as_the_authors(pipe)[0]["attn.pt"]
    path = tmp_path / "attn.pt"
    wrong = [values[:-1], [*values, values[0]], {"a": values}, [], values[0], [None] * len(values), "text"]
    wrong += [[value.long() for value in values], [value[None] for value in values], [values, values]]
    wrong += [[value * float("nan") for value in values], [value.detach().to("meta") for value in values]]
    for content in wrong:
        torch.save(content, path)
        with pytest.raises(EcoDiffError, match="attn.pt: "):
            import_published(path, pipe)
    for content in (pickle.dumps(Hostile()), pickle.dumps([Hostile()]), b"", b"PK\x03\x04", b"\x80\x04"):
        path.write_bytes(content)
        with pytest.raises(EcoDiffError, match="attn.pt: is damaged, or holds more than tensors"):
            import_published(path, pipe)
    torch.save([Hostile()], path)
    with pytest.raises(EcoDiffError, match="attn.pt: is damaged, or holds more than tensors"):
        import_published(path, pipe)
    assert not (tmp_path / "was_run").exists()
    torch.save(values, path)
    whole, draw = path.read_bytes(), random.Random(0)
    for _ in range(60):
        path.write_bytes(whole[: draw.randrange(len(whole) - 30)])
        with pytest.raises(EcoDiffError, match="attn.pt: "):
            import_published(path, pipe)
    for missing in (tmp_path / "none.pt", tmp_path / "folder"):
        with pytest.raises(EcoDiffError, match="there is no such file"):
            import_published(missing, pipe)
    (tmp_path / "empty").mkdir()
    with pytest.raises(EcoDiffError, match="no .pt file"):
        import_published(tmp_path / "empty", pipe)
    path.write_bytes(whole)
    (tmp_path / "again.pt").write_bytes(whole)
    with pytest.raises(EcoDiffError, match="are both λ of the attention sites"):
        import_published(tmp_path, pipe)


def test_scores_by_a_published_name_are_its_lambda(tmp_path, monkeypatch, capsys):
    unet = full_size("UNet2DConditionModel", **SDXL)
    scores = load_scores("published:sdxl", unet)
    assert all(torch.equal(scores[name], value) for name, value in published("sdxl").log_alpha.items())
    assert "MIT licence" in about_scores("published:sdxl")["source"]
    monkeypatch.chdir(tmp_path)
    assert main("published sdxl --ratio 0.2 --out sdxl.safetensors --json".split()) == DONE
    told = json.loads(capsys.readouterr().out)
    kept = sum(int(keep.sum()) for name, keep in published("sdxl").mask(0.2).items() if ".attn" in name)
    assert told["attention units kept"] == f"{kept} of 2600" and "MIT" in told["source"]
    written = load_scores("sdxl.safetensors", unet)
    assert all(torch.equal(written[name], value) for name, value in scores.items())
    assert about_scores("sdxl.safetensors") == about_scores("published:sdxl")
    with pytest.raises(EcoDiffError, match="published:sdxl: λ of another model"):
        load_scores("published:sdxl", tiny_sdxl().unet)


def test_the_command_lists_what_is_published(capsys, refused):
    assert main(["published", "--json"]) == DONE
    assert "332800 feed_forward units in 70 sites" in json.loads(capsys.readouterr().out)["sdxl"]
    for line in ("published flux", "published --ratio 0.2"):
        refused(*line.split())


def test_heads_of_published_sites_are_as_wide_as_the_models():
    sites = find_sites(full_size("UNet2DConditionModel", **SDXL))
    assert all(sites[name].unit_size == site.unit_size for name, site in published("sdxl").sites.items())
