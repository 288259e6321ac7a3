"""What a denoiser has beside config and weights: a pruned model gets it, or one warning names it. And adapters of the
original, which a pruned model refuses."""

import functools
import types
import warnings

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from tiny import latents, tiny_flux, tiny_sd, tiny_sd3

from ecodiff.errors import EcoDiffError
from ecodiff.method.hooks import apply_gates
from ecodiff.method.learn import LearnConfig, learn
from ecodiff.method.sites import KINDS, find_sites
from ecodiff.method.surgery import prune, prune_denoiser
from ecodiff.pipelines.parts import denoiser
from ecodiff.scores import wanda

MID = "mid_block.attentions.0.transformer_blocks.0"
LORA = "pytorch_lora_weights.safetensors"
SIZE = {"height": 16, "width": 16}


def mask_of(model, kinds=KINDS):
    """A random mask that keeps about two thirds, and something of every site."""
    generator = torch.Generator().manual_seed(0)
    mask = {name: torch.rand(site.units, generator=generator) > 0.33 for name, site in find_sites(model, kinds).items()}
    for keep in mask.values():
        keep[0] = True
    return mask


def silently(pipe, mask=None):
    """The pruned pipeline; a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return prune(pipe, mask_of(denoiser(pipe)) if mask is None else mask)


def assert_draws_as_masked(pipe, small, mask=None, atol=1e-4):
    """The pruned pipeline draws what the original does with the same units masked: so it has all that acts there."""
    with apply_gates(denoiser(pipe), mask_of(denoiser(pipe)) if mask is None else mask):
        masked = latents(pipe)
    assert torch.allclose(latents(small), masked, atol=atol)


def freeu(pipe):
    pipe.unet.enable_freeu(s1=0.5, s2=0.2, b1=1.6, b2=1.9)


class Doubled(AttnProcessor2_0):
    """An attention processor of a user's own, with a setting and a state."""

    def __init__(self, factor):
        self.factor = factor
        self.calls = []

    def __call__(self, attn, hidden_states, *args, **kwargs):
        self.calls.append(attn)
        return self.factor * super().__call__(attn, hidden_states, *args, **kwargs)


def own_processors(pipe):
    pipe.unet.set_attn_processor(Doubled(1.7))


def patched_forward(pipe):
    block = pipe.unet.mid_block
    original = block.forward

    def scaled(*args, **kwargs):
        return 0.6 * original(*args, **kwargs)

    block.forward = scaled


def patched_deep_inside(pipe):
    """The module that is patched is hidden in a default, a partial, a list and an object."""
    layer = pipe.unet.get_submodule(f"{MID}.attn1.to_out.0")
    holder = types.SimpleNamespace(modules=[layer])

    def through(kept, x, first=layer, scale=1.5):
        return scale * torch.nn.functional.linear(x, kept.modules[0].weight, first.bias)

    layer.forward = functools.partial(through, holder)


def method_of_another_module(pipe):
    """A bound method of a patched module, taken over by its own instance."""

    def twice(self, x):
        return 2 * type(self).forward(self, x)

    for ff in (pipe.unet.get_submodule(f"{MID}.ff.net.2"), pipe.unet.conv_in):
        ff.forward = types.MethodType(twice, ff)


def class_of_a_block(pipe):
    block = pipe.unet.get_submodule(MID)
    base = type(block)

    class Patched(base):
        def forward(self, hidden_states, *args, **kwargs):
            return 0.5 * super().forward(hidden_states, *args, **kwargs)

    block.__class__ = Patched


def forward_hooks(pipe):
    layer = pipe.unet.get_submodule(f"{MID}.attn2")
    layer.register_forward_hook(lambda module, args, output: 0.3 * output)
    layer.register_forward_pre_hook(lambda module, args, kwargs: ((args[0] * 1.2, *args[1:]), kwargs), with_kwargs=True)
    pipe.unet.conv_out.register_forward_hook(lambda module, args, output: output + module.bias.mean())


def exchanged_activation(pipe):
    pipe.unet.conv_act = torch.nn.Tanh()


def method_of_the_pipeline(pipe):
    encode = pipe.encode_prompt

    def encode_prompt(*args, **kwargs):
        return tuple(part if part is None else 1.5 * part for part in encode(*args, **kwargs))

    pipe.encode_prompt = encode_prompt


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        freeu,
        own_processors,
        patched_forward,
        patched_deep_inside,
        method_of_another_module,
        class_of_a_block,
        forward_hooks,
        exchanged_activation,
        method_of_the_pipeline,
    ],
)
def test_what_changes_the_picture_is_carried_over(change):
    pipe = tiny_sd()
    before = latents(pipe)
    change(pipe)
    changed = latents(pipe)
    assert not torch.allclose(changed, before, atol=1e-3)
    small = silently(pipe)
    assert_draws_as_masked(pipe, small)
    with torch.no_grad():  # nothing in the pruned model runs on the weights of the original
        for parameter in pipe.unet.parameters():
            parameter.zero_()
    assert not torch.allclose(latents(small), latents(pipe), atol=1e-3)
    twice = silently(small)  # what a pruned model has is carried over to one pruned from it
    assert_draws_as_masked(small, twice)


def test_a_site_that_loses_all_units_keeps_its_hooks_and_names_its_patched_forward():
    pipe = tiny_sd()
    attention = pipe.unet.get_submodule(f"{MID}.attn1")
    seen = []
    attention.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    mask = {f"{MID}.attn1": torch.zeros(2, dtype=torch.bool)}
    small = silently(pipe, mask)
    latents(small, steps=1)
    assert seen
    original = attention.forward
    attention.forward = lambda *args, **kwargs: 2 * original(*args, **kwargs)
    with pytest.warns(UserWarning, match=f"not carried over: the patched forward of {MID}.attn1, which has no units"):
        prune(pipe, mask)


def test_processors_are_copies_that_share_what_they_record():
    pipe = tiny_sd()
    own = Doubled(1.7)
    pipe.unet.set_attn_processor(own)
    small = silently(pipe)
    theirs = list(small.unet.attn_processors.values())
    assert {type(one) for one in theirs} == {Doubled} and len({id(one) for one in theirs}) == 1
    latents(small, steps=1)
    assert own.calls and all(module in set(small.unet.modules()) for module in own.calls)


def test_flags_modes_and_formats_stay_module_by_module():
    pipe = tiny_sd()
    unet = pipe.unet.to(memory_format=torch.channels_last)
    unet.enable_gradient_checkpointing()
    unet.up_blocks[0].gradient_checkpointing = False
    unet.train()
    unet.mid_block.eval()
    unet.requires_grad_(False)
    unet.conv_out.requires_grad_(True)
    unet.own_note = {"epoch": 3}
    small = silently(pipe).unet
    assert small.is_gradient_checkpointing and not small.up_blocks[0].gradient_checkpointing
    assert small.down_blocks[1].gradient_checkpointing
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 12, 32)
    small(x, 3, text).sample.sum().backward()  # through the checkpointing function
    modes = {name: module.training for name, module in unet.named_modules()}
    assert all(module.training == modes[name] for name, module in small.named_modules() if name in modes)
    assert small.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert {name for name, p in small.named_parameters() if p.requires_grad} == {"conv_out.weight", "conv_out.bias"}
    assert small.own_note == unet.own_note and small.own_note is not unet.own_note


def test_layerwise_casting_is_carried_over():
    pipe = tiny_sd()
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    small = silently(pipe)
    assert {p.dtype for p in small.unet.mid_block.parameters()} == {p.dtype for p in pipe.unet.mid_block.parameters()}
    assert torch.float8_e4m3fn in {p.dtype for p in small.unet.parameters()}
    assert_draws_as_masked(pipe, small)


def test_subclasses_of_a_users_own_keep_their_methods():
    class MyUNet(UNet2DConditionModel):
        def forward(self, sample, timestep, encoder_hidden_states, **kwargs):
            return tuple(0.9 * part for part in super().forward(sample, timestep, encoder_hidden_states, **kwargs))

    pipe = tiny_sd()
    pipe.unet.__class__ = MyUNet
    small = silently(pipe)
    assert isinstance(small.unet, MyUNet) and type(small.unet).__name__ == "PrunedUNet2DConditionModel"
    assert_draws_as_masked(pipe, small)


def test_gates_that_are_open_are_not_copied_into_the_pruned_model():
    pipe = tiny_sd()
    mask = mask_of(pipe.unet)
    expected = latents(silently(pipe, mask))
    with apply_gates(pipe.unet, {name: torch.full((len(keep),), 0.5) for name, keep in mask.items()}):
        latents(pipe, steps=1)
        small = silently(pipe, mask)
    assert torch.equal(latents(small), expected)


@pytest.mark.slow
def test_one_warning_names_what_cannot_be_carried_over():
    pipe = tiny_sd()
    pipe.unet.compile(backend="eager")
    pipe.unet.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    pipe.unet.conv_in.weight.register_hook(lambda gradient: gradient)
    pipe.unet.mid_block.register_forward_hook(lambda module, args, output, owner=pipe: output)
    with pytest.warns(UserWarning, match="neither config nor weight") as caught:
        small = prune(pipe, mask_of(pipe.unet))
    (message,) = [str(one.message) for one in caught if "not carried over" in str(one.message)]
    for part in ("compile the pruned", "enable_group_offload", "gradient hooks", "refers to the original model"):
        assert part in message
    assert latents(small).isfinite().all()


@pytest.mark.slow
def test_compiled_models_are_pruned_whichever_way_they_were_compiled():
    expected = latents(prune(tiny_sd(), mask_of(tiny_sd().unet)))
    whole, part = tiny_sd(), tiny_sd()
    mask = mask_of(whole.unet)
    whole.unet = torch.compile(whole.unet, backend="eager")
    part.unet.mid_block = torch.compile(part.unet.mid_block, backend="eager")
    assert find_sites(denoiser(part)).keys() == find_sites(denoiser(whole)).keys() == find_sites(tiny_sd().unet).keys()
    for pipe in (whole, part):
        with pytest.warns(UserWarning, match="compile the pruned denoiser"):
            assert torch.equal(latents(prune(pipe, mask)), expected)


def ways_of_offloading(pipe, folder):
    """What enable_sequential_cpu_offload does, and its like that keep weights in files."""
    import accelerate

    return {
        "sequential": lambda: accelerate.cpu_offload(pipe.unet, torch.device("cpu"), offload_buffers=True),
        "disk": lambda: accelerate.disk_offload(pipe.unet, str(folder), execution_device=torch.device("cpu")),
        "group": lambda: pipe.unet.enable_group_offload(
            torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=str(folder)
        ),
    }


@pytest.mark.slow
@pytest.mark.parametrize("way", ["sequential", "disk", "group"])
def test_weights_that_a_hook_keeps_elsewhere_are_fetched(way, tmp_path):
    pipe, mask = tiny_sd(), mask_of(tiny_sd().unet)
    expected = latents(silently(pipe, mask))
    ways_of_offloading(pipe, tmp_path)[way]()
    with pytest.warns(UserWarning, match="not carried over: .*offload"):
        small = prune(pipe, mask)
    assert not any(tensor.is_meta for tensor in (*small.unet.parameters(), *small.unet.buffers()))
    assert torch.equal(latents(small), expected)
    assert latents(pipe).isfinite().all()  # the original goes on as it was
    with pytest.raises(EcoDiffError, match="learn: some weights .* kept elsewhere"):
        learn(pipe, ["a cat"], LearnConfig(updates=1, num_inference_steps=1, call=SIZE), progress=False)
    with pytest.raises(EcoDiffError, match="kept elsewhere"):
        wanda(pipe, ["a cat"], num_inference_steps=1, call=SIZE, progress=False)


def test_weights_that_are_nowhere_are_refused():
    pipe, mask = tiny_sd(), mask_of(tiny_sd().unet)
    pipe.unet.conv_in.to("meta")
    with pytest.raises(EcoDiffError, match="prune: the weights of 'conv_in.weight' .* no hook says where"):
        prune(pipe, mask)
    pipe.unet.to("meta")
    with pytest.raises(EcoDiffError, match="on the meta device"):
        prune(pipe, mask)
    assert prune_denoiser(pipe.unet, mask).conv_in.weight.is_meta  # by itself: to count what it would cost


def test_what_prune_would_refuse_is_refused_before_anything_is_learned():
    peft = pytest.importorskip("peft")
    fused, adapted = tiny_sd(), tiny_sd()
    fused.unet.fuse_qkv_projections()
    adapted.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    quick = LearnConfig(updates=1, num_inference_steps=1, call=SIZE)
    for pipe, message in ((fused, "learn: .* has other layers"), (adapted, "learn: .* has adapters")):
        with pytest.raises(EcoDiffError, match=message):
            learn(pipe, ["a cat"], quick, progress=False)
    with pytest.raises(EcoDiffError, match="scores: .* has adapters"):
        wanda(adapted, ["a cat"], num_inference_steps=1, call=SIZE, progress=False)


# Adapters


def lora_of(model, targets, folder, scale=0.1):
    """A folder with a LoRA beside these layers of the model (which gets it as well)."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that a layer without units has nothing to initialise
        model.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=targets), adapter_name="made")
    for name, parameter in model.named_parameters():
        if "lora_B" in name and parameter.numel():
            torch.nn.init.normal_(parameter, std=scale)
    model.save_lora_adapter(folder, adapter_name="made")
    return folder


@pytest.mark.slow
def test_a_lora_that_fits_is_loaded_by_the_pipeline(tmp_path):
    from safetensors.torch import load_file

    pipe = tiny_flux()
    mask = mask_of(pipe.transformer, ("attention", "feed_forward"))
    first, second = silently(pipe, mask), silently(pipe, mask)
    plain = latents(second)
    lora_of(first.transformer, ["to_q", "proj_out", "net.2"], tmp_path)
    tensors = load_file(tmp_path / LORA)
    second.load_lora_weights({f"transformer.{name}": value for name, value in tensors.items()})
    assert torch.allclose(latents(second), latents(first), atol=1e-5) and not torch.equal(latents(first), plain)
    # One of the original for layers that lost nothing fits as well.
    small = silently(pipe, {name: keep for name, keep in mask.items() if name.startswith("single")})
    tensors = load_file(lora_of(pipe.transformer, ["ff.net.2"], tmp_path) / LORA)
    small.load_lora_weights({f"transformer.{name}": value for name, value in tensors.items()})
    assert "default_0" in small.transformer.peft_config


def test_a_new_lora_for_channels_that_are_gone_is_refused():
    peft = pytest.importorskip("peft")
    pipe = tiny_sd3()
    scattered = silently(pipe, mask_of(pipe.transformer, ("modulation",)))
    with pytest.raises(EcoDiffError, match="leave it out of target_modules"):
        scattered.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "norm1.linear"]))
    assert not any("lora" in name for name, _ in scattered.transformer.named_parameters())


def test_a_kronecker_adapter_of_the_original_is_refused():
    layer = tiny_sd().unet.get_submodule(f"{MID}.attn1.to_q")
    small = silently(tiny_sd(), {f"{MID}.attn1": torch.tensor([True, False])})
    tensors = {
        f"{MID}.attn1.to_q.lokr_w1": torch.randn(2, 2),
        f"{MID}.attn1.to_q.lokr_w2": torch.randn(layer.out_features // 2, layer.in_features // 2),
    }
    with pytest.raises(EcoDiffError, match="This LoKr was made for the original"):
        small.unet.load_lora_adapter(tensors, prefix=None)


def ip_adapter(unet, width=32, image=16):
    """The state dict of an IP-Adapter for this U-Net's config."""
    weights = {}
    cross = [name for name in unet.attn_processors if "attn2" in name]
    for number, name in enumerate(cross):
        hidden = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
        for part in ("k", "v"):
            weights[f"{2 * number + 1}.to_{part}_ip.weight"] = torch.randn(hidden, width)
    projection = {
        "proj.weight": torch.randn(4 * width, image),
        "proj.bias": torch.randn(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    return {"image_proj": projection, "ip_adapter": weights}


def test_processors_of_the_original_are_refused_and_an_ip_adapter_fits_where_no_head_is_gone():
    pipe = tiny_sd()
    adapter = ip_adapter(pipe.unet)
    small = silently(pipe, mask_of(pipe.unet, ("attention",)))
    plain = latents(small)
    with pytest.raises(EcoDiffError, match="attention processors of the original do not fit"):
        small.unet.load_attn_procs({f"{MID}.attn1.processor.to_k_custom_diffusion.weight": torch.ones(2, 2)})
    pipe.unet._load_ip_adapter_weights([adapter])
    with pytest.raises(EcoDiffError, match="set_attn_processor: .* the heads left there have"):
        small.unet.set_attn_processor(pipe.unet.attn_processors)
    assert torch.equal(latents(small), plain)
    with pytest.raises(EcoDiffError, match="other layers than its class makes"):
        learn(pipe, ["a cat"], LearnConfig(updates=1, num_inference_steps=1, call=SIZE), progress=False)
    thinner = silently(tiny_sd(), mask_of(tiny_sd().unet, ("feed_forward",)))
    thinner.unet._load_ip_adapter_weights([adapter])
    thinner.unet.set_attn_processor(AttnProcessor())
