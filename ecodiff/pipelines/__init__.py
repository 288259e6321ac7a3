"""What one does with a diffusers pipeline: load it, find its denoiser, encode prompts, run its own loop."""
