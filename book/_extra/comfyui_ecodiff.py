"""Two nodes for ComfyUI: load the folder of a pruned pipeline, and generate with it.

Put this file into ComfyUI's custom_nodes and install ecodiff into ComfyUI's Python. The folder is the one that
`save_pretrained` or the command `prune` wrote, or a Hub id, or the name of a folder in models/diffusers.

The nodes run the pipeline of diffusers as a whole. They do not give a MODEL to ComfyUI's own samplers. Those build
each network from a few numbers that they guess from a checkpoint file: one number of heads and one width for all layers
of a kind. A pruned network has other numbers in every layer, so that no single file of it fits.
"""

from pathlib import Path

import torch

import ecodiff


def find_pipeline(name, folders=()):
    """The folder of this name in one of the folders, or else the name itself, which may be a path or a Hub id."""
    for folder in folders:
        if name and (Path(folder) / name / "model_index.json").is_file():
            return str(Path(folder) / name)
    return name


def diffusers_folders():
    """ComfyUI's models/diffusers, and those that its extra_model_paths.yaml adds; none outside ComfyUI."""
    try:
        import folder_paths
    except ImportError:
        return []
    return folder_paths.get_folder_paths("diffusers")


class LoadPrunedPipeline:
    CATEGORY, FUNCTION, RETURN_TYPES = "EcoDiff", "load", ("ECODIFF_PIPELINE",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"folder": ("STRING", {"default": ""}), "dtype": (["bf16", "fp16", "fp32"],)}}

    def load(self, folder, dtype):
        pipe = ecodiff.load(find_pipeline(folder, diffusers_folders()), torch_dtype=dtype)
        if torch.cuda.is_available():
            pipe.enable_model_cpu_offload()  # leaves memory to ComfyUI's own models
        return (pipe,)


class GenerateWithPrunedPipeline:
    CATEGORY, FUNCTION, RETURN_TYPES = "EcoDiff", "generate", ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls):
        side = ("INT", {"default": 1024, "min": 8, "max": 4096, "step": 8})
        needed = {"pipeline": ("ECODIFF_PIPELINE",), "prompt": ("STRING", {"multiline": True})}
        needed |= {"seed": ("INT", {"default": 0, "min": 0, "max": 2**63 - 1}), "width": side, "height": side}
        needed |= {"steps": ("INT", {"default": 30, "min": 1, "max": 200})}
        needed |= {"guidance": ("FLOAT", {"default": 5.0, "min": 0.0, "max": 30.0, "step": 0.1})}
        return {"required": needed}

    def generate(self, pipeline, prompt, seed, width, height, steps, guidance):
        settings = {"num_inference_steps": steps, "guidance_scale": guidance, "width": width, "height": height}
        images = ecodiff.generate(pipeline, [prompt], [seed], **settings)
        return (images.permute(0, 2, 3, 1).float() / 255,)  # ComfyUI's images: [N, height, width, 3] in 0 to 1


NODE_CLASS_MAPPINGS = {"EcoDiffLoad": LoadPrunedPipeline, "EcoDiffGenerate": GenerateWithPrunedPipeline}
NODE_DISPLAY_NAME_MAPPINGS = {"EcoDiffLoad": "Load pruned pipeline", "EcoDiffGenerate": "Generate (pruned pipeline)"}
