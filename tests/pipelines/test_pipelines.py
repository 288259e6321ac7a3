"""Loading by name, folder and id; the denoiser; the two methods that need no data; a light import."""

import subprocess
import sys
from functools import wraps

import pytest
import torch
from tiny import TINY, call_kwargs, tiny_sd, tiny_sdxl

import ecodiff
from ecodiff import EcoDiffError
from ecodiff.pipelines.parts import denoiser, denoisers, sampling_loop
from ecodiff.scores import METHODS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name"), [("sd", "unet"), ("sdxl", "unet"), ("sd3", "transformer"), ("flux", "transformer")]
)
def test_denoiser(kind, name):
    pipe = TINY[kind]()
    assert list(denoisers(pipe)) == [name]
    assert denoiser(pipe) is getattr(pipe, name)


def test_no_denoiser():
    for thing in (torch.nn.Linear(1, 1), object(), tiny_sd().vae):
        with pytest.raises(EcoDiffError, match="no denoiser"):
            denoiser(thing)


@pytest.mark.slow
def test_load_folder_and_embedded_name(tmp_path, monkeypatch):
    tiny_sd().save_pretrained(tmp_path / "models" / "tiny")
    monkeypatch.setenv("ECODIFF_DATA", str(tmp_path))
    for where in ("tiny", tmp_path / "models" / "tiny", str(tmp_path / "models" / "tiny")):
        pipe = ecodiff.load(where, safety_checker=None)
        assert type(pipe).__name__ == "StableDiffusionPipeline"
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(pipe(**call_kwargs(pipe)).images, _quiet(tiny_sd()))
    with pytest.raises(EcoDiffError, match="tiny"):
        ecodiff.load("tinny")


def _quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe(**call_kwargs(pipe)).images


def test_load_says_what_is_wrong(tmp_path):
    for where, message in [
        (tmp_path, "model_index.json"),
        ("no-such-model", "no embedded pipeline"),
        ("", "no embedded pipeline"),
        (tmp_path / "a" / "b", "no embedded pipeline"),
        ("../models/x", "no embedded pipeline"),
        ("owner/not-in-the-cache", "not in the cache"),
    ]:
        with pytest.raises(EcoDiffError, match=message):
            ecodiff.load(where)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(EcoDiffError, match="could not be loaded"):
        ecodiff.load(tmp_path)


def test_methods_without_data():
    pipe = tiny_sdxl()
    sites = ecodiff.find_sites(pipe.unet)
    for method in (METHODS["random"], METHODS["magnitude"]):
        first, again = method(pipe, []), method(pipe, [])
        assert {name: tuple(s.shape) for name, s in first.items()} == {name: (s.units,) for name, s in sites.items()}
        assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(
        next(iter(METHODS["random"](pipe, seed=1).values())), next(iter(METHODS["random"](pipe).values()))
    )


@pytest.mark.parametrize("kind", ["sdxl", "flux"])
def test_magnitude_is_the_mean_weight_that_would_go(kind):
    pipe = TINY[kind]()
    model = denoiser(pipe)
    before = METHODS["magnitude"](pipe)
    for name, site in ecodiff.find_sites(model).items():
        total = count = 0
        for dimension, spans in enumerate((site.writers, site.readers)):
            for span in spans:
                rows = range(span.offset + site.units * span.size)[-span.size :]  # those of the last unit
                weight = model.get_submodule(span.layer).weight.detach().index_select(dimension, torch.tensor(rows))
                total, count = total + weight.abs().sum(), count + weight.numel()
        assert torch.allclose(before[name][-1], total / count, atol=1e-6)


def test_only_torchs_own_decorators_are_taken_off_a_loop():
    inner = sampling_loop(tiny_sd())
    assert inner.__qualname__ == "StableDiffusionPipeline.__call__" and not hasattr(inner, "__wrapped__")

    @wraps(inner)
    def counted(*args, **kwargs):
        return inner(*args, **kwargs)

    class Counted(type(tiny_sd())):
        __call__ = torch.no_grad()(counted)

    assert sampling_loop(Counted(**tiny_sd().components, requires_safety_checker=False)) is counted


@pytest.mark.slow
def test_import_is_light_and_names_are_there():
    code = (
        "import sys, ecodiff; assert not {'torch', 'diffusers'} & set(sys.modules);"
        "assert 'make_mask' in dir(ecodiff) and not hasattr(ecodiff, 'nonsense');"
        "assert not hasattr(ecodiff, 'PrunedNonsense');"
        "from ecodiff import find_sites, ModelMixin, PrunedUNet2DConditionModel as P;"
        "assert P.__module__ == 'ecodiff' and issubclass(P, ModelMixin) and P is ecodiff.PrunedUNet2DConditionModel"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_functions_named_like_their_modules_stay_functions():
    for name in ("learn", "generate"):
        pytest.importorskip(f"ecodiff.{name}")
        assert callable(getattr(ecodiff, name)) and getattr(ecodiff, name).__name__ == name


@pytest.mark.slow
def test_load_leaves_no_weight_at_an_odd_address(tmp_path):
    pipe = tiny_sdxl()
    pipe.save_pretrained(tmp_path / "whole")
    loaded = ecodiff.load(tmp_path / "whole")
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        before, after = getattr(pipe, name).state_dict(), getattr(loaded, name).state_dict()
        assert all(value.data_ptr() % 64 == 0 for value in after.values() if value.numel())
        assert all(torch.equal(before[key], after[key]) for key in before)
