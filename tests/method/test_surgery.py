"""Masked and removed models agree; pruned pipelines are saved, loaded, compiled, adapted and pruned again."""

import copy
import json
import resource
import subprocess
import sys
import warnings

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny import (
    SDXL,
    TINY,
    assert_removed_is_masked,
    call_kwargs,
    full_size,
    latents,
    outputs,
    parameters,
    random_mask,
    tiny_flux,
    tiny_sd,
    tiny_sd3,
    tiny_sdxl,
)

import ecodiff
from ecodiff import EcoDiffError, Gates, apply_gates, denoiser, find_sites, prune
from ecodiff.method.emptied import EmptiedAttention, form_of
from ecodiff.method.pruned import cut_units, pruned_class
from ecodiff.method.sites import KINDS
from ecodiff.method.surgery import fold_gates, prune_denoiser

HAS_MODULATION = ("sd3", "flux")


def keep_first(model, units, kinds):
    return {name: torch.arange(site.units) < units for name, site in find_sites(model, kinds).items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_folded_gates_draw_what_gates_do(name):
    pipe = TINY[name]()
    generator = torch.Generator().manual_seed(3)
    gates = {n: torch.rand(s.units, generator=generator) for n, s in find_sites(denoiser(pipe)).items()}
    before = outputs(pipe)
    with apply_gates(denoiser(pipe), gates):
        gated = outputs(pipe)
    assert (outputs(fold_gates(pipe, gates)) - gated).abs().max() <= 1e-5 < (before - gated).abs().max()
    assert torch.equal(outputs(pipe), before)


def test_gates_that_cannot_be_folded_are_named():
    pipe = tiny_flux()
    site = next(iter(find_sites(pipe.transformer)))
    modulation = next(n for n, s in find_sites(pipe.transformer, KINDS).items() if s.kind == "modulation")
    for name, gate in (("nowhere", torch.ones(2)), (modulation, torch.ones(2)), (site, torch.ones(99))):
        with pytest.raises(EcoDiffError, match=f"fold_gates: '{name}'"):
            fold_gates(pipe, {name: gate})


@pytest.mark.slow
@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("site_kind", KINDS)
@pytest.mark.parametrize("what", ["some", 1, 0])
def test_removed_is_masked(kind, site_kind, what):
    if site_kind == "modulation" and kind not in HAS_MODULATION:
        pytest.skip("U-Nets have no modulation layers")
    pipe = TINY[kind]()
    model = denoiser(pipe)
    mask = random_mask(model, kinds=(site_kind,)) if what == "some" else keep_first(model, what, (site_kind,))
    pruned = denoiser(assert_removed_is_masked(pipe, mask))
    sites = find_sites(model, KINDS)
    gone = sum(sites[name].params_per_unit * int((~keep).sum()) for name, keep in mask.items())
    if what == 0 and site_kind == "attention":  # norms of queries and keys go with the last head
        norms = sum(p.numel() for n, p in model.named_parameters() if ".norm_" in n and ("_q." in n or "_k." in n))
        gone += norms
    assert parameters(model) - parameters(pruned) == gone


@pytest.mark.slow
@pytest.mark.parametrize("kind", TINY)
def test_everything_at_once_and_nothing_at_all(kind):
    pipe = TINY[kind]()
    kinds = ("attention", "feed_forward")
    assert_removed_is_masked(pipe, keep_first(denoiser(pipe), 0, kinds))
    whole = prune(pipe, keep_first(denoiser(pipe), 10**6, KINDS))
    assert torch.equal(latents(whole), latents(pipe))


@pytest.mark.slow
@pytest.mark.parametrize("kind", TINY)
def test_an_attention_without_heads_costs_nothing(kind):
    model = denoiser(TINY[kind]())
    pruned = prune_denoiser(model, keep_first(model, 0, ("attention",)))
    empty = [module for module in pruned.modules() if isinstance(module, EmptiedAttention)]
    assert len(empty) == len(find_sites(model, ("attention",)))
    assert sum(parameter.numel() for module in empty for parameter in module.parameters()) == sum(
        module.get_parameter(name).numel()
        for module in empty
        for name, _ in module.named_parameters()
        if name.endswith("bias")
    )


def test_an_attention_on_pictures_with_a_residual():
    """diffusers' older attention: 4-dimensional input, group norm, residual and scale inside the module."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        mid_block_scale_factor=2,
    ).eval()
    x = torch.randn(1, 3, 8, 8)
    for units in (1, 0):
        mask = keep_first(model, units, ("attention",))
        with torch.no_grad():
            with apply_gates(model, mask):
                masked = model(x, 3).sample
            assert (prune_denoiser(model, mask)(x, 3).sample - masked).abs().max() <= 1e-5


def test_the_original_is_untouched_and_shares_no_weights():
    pipe = tiny_flux()
    before, state = latents(pipe), {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    pipe.transformer.requires_grad_(False)
    pipe.transformer.proj_out.requires_grad_(True)
    pruned = prune(pipe, random_mask(pipe.transformer))
    assert type(pruned) is type(pipe) and pruned.transformer is not pipe.transformer
    for name, part in pipe.components.items():
        assert name == "transformer" or getattr(pruned, name) is part
    assert {p.requires_grad for p in pruned.transformer.proj_out.parameters()} == {True}
    assert sum(p.requires_grad for p in pruned.transformer.parameters()) == 2
    with torch.no_grad():
        for parameter in pruned.transformer.parameters():
            parameter.fill_(7.0)
    pruned.transformer.to(torch.float64)
    assert all(torch.equal(state[key], value) for key, value in pipe.transformer.state_dict().items())
    assert torch.equal(latents(pipe), before)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_and_mode_stay(dtype):
    model = tiny_sdxl().unet.to(dtype).train()
    pruned = prune_denoiser(model, random_mask(model))
    assert {parameter.dtype for parameter in pruned.parameters()} == {dtype} and pruned.training


@pytest.mark.slow
def test_pipeline_settings_stay():
    pipe = tiny_sdxl()
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    pipe.set_progress_bar_config(disable=True)
    pruned = prune(pipe, random_mask(pipe.unet))
    assert pruned.config.force_zeros_for_empty_prompt is False
    assert pruned._progress_bar_config == {"disable": True}


@pytest.mark.slow
def test_full_size_sdxl_with_the_published_lambda(shared_file):
    from safetensors.torch import load_file

    unet = full_size("UNet2DConditionModel", **SDXL)
    gates = Gates.from_tensors(load_file(shared_file("data/sdxl_published_lambda.safetensors")), unet)
    for ratio, billions in ((0.1, 2.343), (0.2, 2.114)):
        pruned = prune_denoiser(unet, gates.mask(ratio))
        assert parameters(pruned) / 1e9 == pytest.approx(billions, abs=5e-4)
        assert {parameter.device.type for parameter in pruned.parameters()} == {"meta"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", TINY)
def test_saved_and_loaded_bit_for_bit(kind, tmp_path):
    pipe = TINY[kind]()
    model = denoiser(pipe)
    mask = random_mask(model, kinds=("attention", "feed_forward"))
    mask.update(random_mask(model, ratio=0.1, kinds=("modulation",)) if kind in HAS_MODULATION else {})
    for name in list(find_sites(model))[:2] + list(find_sites(model))[-2:]:
        mask[name] = torch.zeros_like(mask[name])
    small = prune(pipe, mask)
    small.save_pretrained(tmp_path / "small")
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    assert not [path for path in (tmp_path / "small").rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".pth")]
    index = json.loads((tmp_path / "small" / "model_index.json").read_text())
    component = "transformer" if "transformer" in index else "unet"
    assert (
        index[component] == ["ecodiff", type(denoiser(small)).__name__] and index["_class_name"] == type(pipe).__name__
    )
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "small", safety_checker=None)
    assert torch.equal(latents(loaded), latents(small))
    assert torch.equal(latents(loaded, output_type="pt"), latents(small, output_type="pt"))
    slow = DiffusionPipeline.from_pretrained(tmp_path / "small", safety_checker=None, low_cpu_mem_usage=False)
    assert torch.equal(latents(slow), latents(small))
    half = DiffusionPipeline.from_pretrained(tmp_path / "small", safety_checker=None, dtype=torch.float16)
    assert {parameter.dtype for parameter in denoiser(half).parameters()} == {torch.float16}


@pytest.mark.slow
def test_loads_in_a_new_process(tmp_path):
    pipe = tiny_sdxl()
    small = prune(pipe, random_mask(pipe.unet))
    small.save_pretrained(tmp_path / "small")
    torch.save(latents(small), tmp_path / "expected.pt")
    code = (
        "import torch, ecodiff; from diffusers import DiffusionPipeline; torch.set_num_threads(1);"
        f"pipe = DiffusionPipeline.from_pretrained({str(tmp_path / 'small')!r});"
        "x = pipe('a red apple on a blue background', num_inference_steps=2, height=16, width=16,"
        "output_type='latent', generator=torch.Generator().manual_seed(0)).images;"
        f"assert torch.equal(x, torch.load({str(tmp_path / 'expected.pt')!r}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_disk_full_leaves_the_earlier_pipeline(tmp_path):
    pipe = tiny_sd()
    small = prune(pipe, random_mask(pipe.unet))
    small.save_pretrained(tmp_path / "small")
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        for target in ("small", "other"):
            with pytest.raises(EcoDiffError, match="nothing was written"):
                small.save_pretrained(tmp_path / target)
        with pytest.raises(EcoDiffError, match="nothing was written"):
            small.unet.save_pretrained(tmp_path / "unet")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before
    small.save_pretrained(tmp_path / "small")  # replaces the earlier one
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_changed_files_do_not_load(tmp_path):
    model = tiny_sd().unet
    prune_denoiser(model, random_mask(model)).save_pretrained(tmp_path / "unet")
    config = json.loads((tmp_path / "unet" / "config.json").read_text())
    name = next(iter(config["pruned_units"]))
    for units in (10**6, "all", config["pruned_units"][name] + 1):
        changed = {**config, "pruned_units": {**config["pruned_units"], name: units}}
        (tmp_path / "unet" / "config.json").write_text(json.dumps(changed))
        with pytest.raises(EcoDiffError):
            ecodiff.PrunedUNet2DConditionModel.from_pretrained(tmp_path / "unet")


@pytest.mark.slow
@pytest.mark.parametrize("kind", TINY)
def test_pruned_again(kind, tmp_path):
    pipe = TINY[kind]()
    first = random_mask(denoiser(pipe), 0.3)
    empty = next(iter(first))
    first[empty] = torch.zeros_like(first[empty])
    once = prune(pipe, first)
    assert empty not in find_sites(denoiser(once))
    twice = assert_removed_is_masked(once, random_mask(denoiser(once), 0.3, seed=1))
    assert type(denoiser(twice)) is type(denoiser(once))
    twice.save_pretrained(tmp_path / "twice")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "twice", safety_checker=None)
    assert torch.equal(latents(loaded), latents(twice))


@pytest.mark.slow
def test_what_cannot_be_pruned_again_says_so():
    pipe = tiny_flux()
    once = prune(pipe, random_mask(pipe.transformer, kinds=KINDS))
    with pytest.raises(EcoDiffError, match="already pruned"):
        prune(once, {"transformer_blocks.0.norm1": torch.zeros(64 * 6, dtype=torch.bool)})
    name = "transformer_blocks.0.ff"
    once = prune(pipe, {name: torch.zeros(256, dtype=torch.bool)})
    with pytest.raises(EcoDiffError, match="no unit is left"):
        prune(once, {name: torch.zeros(256, dtype=torch.bool)})


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"nowhere": torch.ones(4, dtype=torch.bool)}, "not a site"),
        ({"mid_block.attentions.0.transformer_blocks.0.attn1": torch.ones(5, dtype=torch.bool)}, "4 units"),
        ({"mid_block.attentions.0.transformer_blocks.0.attn1": torch.ones(4)}, "bool tensor"),
        ({"mid_block.attentions.0.transformer_blocks.0.attn1": [True] * 4}, "bool tensor"),
    ],
)
def test_bad_masks(mask, message):
    with pytest.raises(EcoDiffError, match=message):
        prune(tiny_sdxl(), mask)


def test_what_a_processor_returns_without_heads_is_found_by_running_it():
    attention = tiny_sd().unet.mid_block.attentions[0].transformer_blocks[0].attn1

    class Same(type(attention.processor)):
        pass

    class Scaled(type(attention.processor)):
        def __call__(self, *args, **kwargs):
            return 2 * super().__call__(*args, **kwargs)

    attention.set_processor(Same())
    assert form_of(attention) == 1
    attention.set_processor(Scaled())
    assert form_of(attention) == 0
    block = torch.nn.ModuleDict({"attn": attention})
    (site,) = find_sites(block).values()
    assert site.min_units == 1
    with pytest.raises(EcoDiffError, match="keep at least one head"):
        cut_units(block, {"attn": site}, {"attn": torch.zeros(site.units, dtype=torch.bool)})


def test_an_attention_with_keys_of_the_text_of_its_own_loses_heads():
    """The processor of IF and Kandinsky reshapes by the width of its input; another one takes its place."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        in_channels=3,
        out_channels=3,
        cross_attention_dim=12,
        norm_num_groups=4,
    ).eval()
    inputs = torch.randn(1, 3, 8, 8), 3, torch.randn(1, 5, 12)
    mask = {name: torch.arange(site.units) < site.units - 1 for name, site in find_sites(model).items()}
    with torch.no_grad():
        with apply_gates(model, mask):
            masked = model(*inputs).sample
        torch.testing.assert_close(prune_denoiser(model, mask)(*inputs).sample, masked, rtol=1e-4, atol=1e-4)


def test_no_empty_weight_stays_in_a_model_without_units():
    """What quantises, slices or fuses finds nothing to stumble over, and copies and processors are as before."""
    pipe = tiny_sd()
    before = len(pipe.unet.attn_processors)
    pruned = prune(pipe, keep_first(pipe.unet, 0, ("attention", "feed_forward")))
    assert all(parameter.numel() for parameter in pruned.unet.parameters())
    expected = latents(pruned)
    assert len(pruned.unet.attn_processors) == before
    pruned.unet.set_attn_processor(pruned.unet.attn_processors)
    pruned.unet.fuse_qkv_projections()
    pruned.enable_attention_slicing()
    pruned.unet = copy.deepcopy(pruned.unet)
    assert torch.equal(latents(pruned), expected)


def test_not_a_diffusers_model():
    with pytest.raises(EcoDiffError, match="not a diffusers model"):
        prune_denoiser(torch.nn.Linear(2, 2), {})
    for name in ("Nonsense", "EulerDiscreteScheduler", "StableDiffusionPipeline"):
        with pytest.raises(EcoDiffError, match="not a model class"):
            pruned_class(name)


@pytest.mark.slow
@pytest.mark.parametrize("build", [tiny_sdxl, tiny_flux])
def test_torch_compile_without_graph_breaks(build):
    pipe = build()
    model = denoiser(pipe)
    mask = random_mask(model, kinds=KINDS)
    mask[next(iter(mask))] &= False
    small = prune(pipe, mask)
    expected = outputs(small)
    torch.compiler.reset()
    denoiser(small).compile(backend="eager", fullgraph=True)
    assert (outputs(small) - expected).abs().max() <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "targets"),
    [
        (tiny_sdxl, ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]),
        (tiny_flux, ["to_q", "to_k", "to_v", "to_out.0", "proj_mlp", "proj_out", "net.2"]),
    ],
)
def test_lora(build, targets, tmp_path):
    peft = pytest.importorskip("peft")
    pipe = build()
    model = denoiser(pipe)
    mask = random_mask(model)
    for name in list(mask)[:3] + list(mask)[-2:]:
        mask[name] = torch.zeros_like(mask[name])
    small = prune(pipe, mask)
    model, plain = denoiser(small), latents(small)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that a layer without units has nothing to initialise
        model.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=targets), adapter_name="a")
    trained = [parameter for name, parameter in model.named_parameters() if "lora_B" in name and parameter.numel()]
    assert trained and all(parameter.requires_grad for parameter in trained)
    assert torch.equal(latents(small), plain)
    for parameter in trained:
        torch.nn.init.normal_(parameter, std=0.1)
    changed = latents(small)
    assert not torch.allclose(changed, plain)
    model.save_lora_adapter(tmp_path, adapter_name="a")
    small.set_adapters("a", 0.0)
    assert torch.equal(latents(small), plain)
    model.delete_adapters("a")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.load_lora_adapter(tmp_path, prefix=None, adapter_name="b", weight_name="pytorch_lora_weights.safetensors")
    assert torch.allclose(latents(small), changed, atol=1e-5)
    model.fuse_lora()
    model.unload_lora()
    assert torch.allclose(latents(small), changed, atol=1e-4)


def test_a_model_with_an_adapter_says_what_to_do():
    peft = pytest.importorskip("peft")
    pipe = tiny_sd3()
    mask = random_mask(pipe.transformer)
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "net.2"]))
    with pytest.raises(EcoDiffError, match=r"prune: .* has adapters \(default\): fuse and unload them"):
        prune(pipe, mask)


def test_a_model_with_fused_projections_says_what_to_do():
    pipe = tiny_sd()
    mask = random_mask(pipe.unet)
    pipe.unet.fuse_qkv_projections()
    with pytest.raises(EcoDiffError, match="prune: "):
        prune(pipe, mask)
    with pytest.raises(EcoDiffError, match="other layers than its class makes, such as fused projections"):
        prune(pipe, {})


def test_a_pipeline_pruned_from_an_offloaded_one_is_offloaded(monkeypatch):
    pipe, asked = tiny_sd(), []
    pipe._all_hooks, pipe._offload_device = [object()], torch.device("cpu")
    monkeypatch.setattr(type(pipe), "enable_model_cpu_offload", lambda self, device: asked.append((self, device)))
    small = prune(pipe, random_mask(pipe.unet))
    assert asked == [(small, torch.device("cpu"))]


def test_gradients_flow_through_a_pruned_model():
    pipe = tiny_sdxl()
    small = prune(pipe, random_mask(pipe.unet))
    loss = type(small).__call__.__wrapped__(small, **call_kwargs(small, steps=1)).images.square().mean()
    loss.backward()
    assert all(parameter.grad is not None for name, parameter in small.unet.named_parameters())


@pytest.mark.slow
def test_offloading_hooks_of_accelerate():
    """What enable_model_cpu_offload does, with the CPU as the device: hooks that move the denoiser around each call."""
    from accelerate import cpu_offload_with_hook

    pipe = tiny_flux()
    small = prune(pipe, random_mask(pipe.transformer, kinds=KINDS))
    expected = latents(small)
    _, hook = cpu_offload_with_hook(small.transformer, execution_device="cpu")
    assert torch.equal(latents(small), expected)
    hook.offload()
    hook.remove()
    again = prune(small, random_mask(small.transformer, 0.2))
    assert latents(again).isfinite().all()
