"""Tiny random pipelines of the real diffusers classes, built offline in a fraction of a second, for tests.

All of them draw 16x16-pixel pictures (8x8 latents for the U-Nets), have real tokenizers with a dozen words, and give
the same weights at every call.
"""

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from ecodiff import Gates, LearnConfig, apply_gates, denoiser, find_sites, learn, make_mask, prune
from ecodiff.method.trajectory import final_latents

WORDS = "a red green blue apple cat rocket pizza on under background and".split()
PROMPTS = ["a red apple on a blue background", "a cat and a pizza", "a rocket under a cat", "a green pizza"]
TOKENS = 12


def call_kwargs(pipe, n=1, steps=2, seed=0, **more):
    """Keyword arguments of a deterministic call of any of these pipelines for the first `n` prompts; gives latents."""
    return {
        "prompt": PROMPTS[:n],
        "num_inference_steps": steps,
        "height": 16,
        "width": 16,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
        **({"max_sequence_length": TOKENS} if hasattr(pipe, "transformer") else {}),
        **more,
    }


def latents(pipe, **more):
    """The final latents of `pipe` for `call_kwargs`."""
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        return pipe(**call_kwargs(pipe, **more)).images


def tiny_sd():
    """Stable Diffusion 1/2: U-Net with self- and cross-attention, GEGLU feed-forwards, heads of 8."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**unet_config(attention_head_dim=(1, 2), transformer_layers_per_block=1))
    return StableDiffusionPipeline(
        vae=vae(4),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        unet=trained(unet),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to("cpu")


def tiny_sdxl(**unet):
    """SDXL: two text encoders, text_time conditioning, several transformer layers a block, linear projections."""
    torch.manual_seed(0)
    extra = {
        "attention_head_dim": (2, 4),
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + 32,
        "cross_attention_dim": 64,
    }
    return StableDiffusionXLPipeline(
        vae=vae(4),
        text_encoder=clip(),
        text_encoder_2=clip(CLIPTextModelWithProjection),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=trained(UNet2DConditionModel(**unet_config(**{**extra, **unet}))),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    ).to("cpu")


def tiny_sd3():
    """SD3.5: joint attention with query and key norms, one block with a second attention, the last context_pre_only."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    return StableDiffusion3Pipeline(
        transformer=trained(transformer),
        vae=vae(4),
        text_encoder=clip(CLIPTextModelWithProjection),
        text_encoder_2=clip(CLIPTextModelWithProjection),
        text_encoder_3=t5(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=t5_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    ).to("cpu")


def tiny_flux():
    """FLUX.1-dev: double and single blocks, rotary embeddings, guidance embedding."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    return FluxPipeline(
        transformer=trained(transformer),
        vae=vae(4),
        text_encoder=clip(),
        text_encoder_2=t5(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=t5_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    ).to("cpu")


def tiny_wan(boundary_ratio=0.6, second=True):
    """Wan 2.2: video, two experts; without a boundary the first makes all steps, as in Wan 2.1."""
    torch.manual_seed(0)
    transformers = [
        trained(
            WanTransformer3DModel(
                patch_size=(1, 2, 2),
                num_attention_heads=2,
                attention_head_dim=12,
                in_channels=4,
                out_channels=4,
                text_dim=32,
                freq_dim=16,
                ffn_dim=16,
                num_layers=1,
                cross_attn_norm=True,
                qk_norm=None,
                rope_max_seq_len=32,
            )
        )
        for _ in range(2)
    ]
    vae = AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=transformers[0],
        transformer_2=transformers[1] if second else None,
        boundary_ratio=boundary_ratio,
    )


TINY = {"sd": tiny_sd, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux}


def trained(model):
    """Random weights large enough that every unit matters, biases included (fresh models have many zeros)."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def unet_config(**more):
    return {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
        **more,
    }


def vae(latent_channels):
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=latent_channels,
        sample_size=16,
        shift_factor=0.0,
    ).eval()


def clip(cls=CLIPTextModel):
    config = CLIPTextConfig(
        vocab_size=len(clip_tokenizer()),
        hidden_size=32,
        intermediate_size=32,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return cls(config).eval()


def clip_tokenizer():
    """Letters, and for every word of WORDS the merges that make it one token."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocab = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    merges = []
    for word in WORDS:
        right = f"{word[-1]}</w>"
        for letter in reversed(word[:-1]):
            if (letter, right) not in merges:
                merges.append((letter, right))
                vocab.append(letter + right)
            right = letter + right
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(vocab)}, merges=merges, model_max_length=TOKENS)


def t5():
    config = T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, is_gated_act=True)
    return T5EncoderModel(config).eval()


def t5_tokenizer():
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((f"▁{word}", -1.0) for word in WORDS)]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=TOKENS)


SIZE = {"height": 16, "width": 16}
QUICK = LearnConfig(
    updates=4, batch_size=2, num_inference_steps=2, guidance_scale=3.0, call=SIZE, save_every=1, snapshot_every=2
)


def quiet(pipe, prompts=PROMPTS, config=QUICK, **more):
    return learn(pipe, prompts, config, progress=False, **more)


def sized(pipe):
    """QUICK's arguments of the call, with the length of the text where the pipeline takes one."""
    return SIZE | ({"max_sequence_length": 12} if hasattr(pipe, "transformer") else {})


def random_mask(model, ratio=0.4, kinds=("attention", "feed_forward"), seed=0):
    generator = torch.Generator().manual_seed(seed)
    sites = find_sites(model, kinds)
    return make_mask({name: torch.rand(site.units, generator=generator) for name, site in sites.items()}, sites, ratio)


def outputs(pipe):
    """What the denoiser returns at the first step of a call, without the guidance that would enlarge rounding."""
    seen = []
    hook = denoiser(pipe).register_forward_hook(lambda module, args, output: seen.append(output[0]))
    latents(pipe, n=2, steps=1)
    hook.remove()
    return seen[0]


def assert_removed_is_masked(pipe, mask):
    """The pruned pipeline, after a check that its denoiser returns what the gated one returns."""
    with apply_gates(denoiser(pipe), mask):
        masked = outputs(pipe)
    pruned = prune(pipe, mask)
    removed = outputs(pruned)
    assert (masked - removed).abs().max() <= 1e-5
    assert (outputs(pipe) - removed).abs().max() > 1e-3  # the mask does something
    return pruned


def arguments(pipe, **more):
    taken = call_kwargs(pipe, **{"steps": 3, "guidance_scale": 4.0, **more})
    del taken["output_type"]
    return taken


def latents_and_gradient(pipe, draw="trajectory", **options):
    """Final latents and the gradient of every λ, for gates with noise."""
    net = denoiser(pipe)
    gates = Gates.start(find_sites(net), 1.0, device=pipe.device)

    def fresh(name):
        value = gates.log_alpha[name]
        return gates.distribution.sample(value, torch.rand(value.shape))

    torch.manual_seed(5)
    values = gates.sample(torch.Generator().manual_seed(1)) if draw == "trajectory" else fresh
    with apply_gates(net, values, gates.sites, gates.log_alpha.values()):
        result = final_latents(pipe, **arguments(pipe), **options)
        result.square().mean().backward()
    return result.detach(), torch.cat([value.grad for value in gates.log_alpha.values()])


SDXL = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def full_size(name, **config):
    with torch.device("meta"):
        return getattr(diffusers, name)(**config)


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())
