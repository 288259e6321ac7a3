"""Every command of the page "Prune your own model" runs, in order, on a small stand-in."""

import re
import shlex

import pytest
from tiny import tiny_sdxl

import ecodiff
from ecodiff.__main__ import DONE, main
from ecodiff.storage.paths import root

PAGE = root() / "book" / "own-model.md"
ID = "stabilityai/stable-diffusion-xl-base-1.0"
SMALLER = {
    "--dtype": "fp32", "--count": "2", "--batch-size": "2", "--num-inference-steps": "2", "--steps": "1",
}  # fmt: skip
"""Option -> its value on the stand-in, where the page gives one."""
SIZED = {"learn": ["--updates", "1"], "generate": ["--steps", "2"]}
"""Commands that generate, and what else they need to be quick."""


def printed() -> list[list[str]]:
    """The arguments of each command of the page, in order."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    lines = "".join(blocks).splitlines()
    return [shlex.split(line)[3:] for line in lines if line.startswith("python -m ecodiff ")]


def on_stand_in(arguments: list[str]) -> list[str]:
    """The same command on the tiny pipeline, its values replaced by small ones."""
    made = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        argument = {ID: "model", "published:sdxl": "published.safetensors"}.get(argument, argument)
        made.append(SMALLER.get(before, argument))
    if arguments[0] in SIZED:
        made += [*SIZED[arguments[0]], "--call", "height=16", "width=16"]
    return made


def test_the_page_goes_from_a_mask_to_a_pushed_model():
    names = [arguments[0] for arguments in printed()]
    assert names[0] == "cost" and names[-1] == "push"
    assert set(names) >= {"learn", "prune", "generate", "evaluate", "compare", "retrain"}


@pytest.mark.slow
def test_every_command_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny_sdxl().save_pretrained("model")
    (tmp_path / "prompts.txt").write_text("a red apple\na cat and a pizza\na rocket\n")
    # Published scores fit no tiny model.
    assert main(["score", "random", "model", "--out", "published.safetensors"]) == DONE
    for arguments in printed():
        if arguments[0] == "push":
            continue  # pushing has tests of its own, on a Hub on this machine
        assert main(on_stand_in(arguments)) == DONE, (arguments, capsys.readouterr().err)
    assert ecodiff.mask_of(ecodiff.load("sdxl-20"))
    assert "<html" in (tmp_path / "compare.html").read_text(encoding="utf-8")[:500].lower()
    retrained = ecodiff.denoiser(ecodiff.load("sdxl-20-retrained"))
    whole = ecodiff.denoiser(ecodiff.load("model"))
    assert sum(p.numel() for p in retrained.parameters()) < sum(p.numel() for p in whole.parameters())
