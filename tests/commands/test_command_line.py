"""The commands of ``python -m ecodiff``, on tiny pipelines in folders: what they write, print, and refuse."""

import html
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_sd, tiny_sdxl, tiny_wan

import ecodiff
from ecodiff import metrics, scores
from ecodiff.__main__ import DONE, LIBRARY, WRONG, commands, main, make_parser
from ecodiff.commands import score as score_command
from ecodiff.commands.options import with_settings_file
from ecodiff.comparison.compare import of_images
from ecodiff.comparison.result import page
from ecodiff.errors import EcoDiffError
from ecodiff.lab.openmoji import prompts as openmoji_prompts
from ecodiff.storage.images import read_images

CALL = ["--call", "height=16", "width=16"]
STEPS = ["--num-inference-steps", "2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny pipeline and a file of prompts, where commands run."""
    folder = tmp_path_factory.mktemp("commands")
    tiny_sd().save_pretrained(folder / "dense")
    (folder / "prompts.txt").write_text("a red apple\na cat and a pizza\na rocket\n")
    return folder


@pytest.fixture
def run(place, monkeypatch, capsys):
    """A function that runs one command in that folder and returns what it found."""
    monkeypatch.chdir(place)

    def command(*arguments):
        code = main([*map(str, arguments), "--json"])
        shown = capsys.readouterr()
        assert code == DONE, shown.err
        return json.loads(shown.out)

    return command


@pytest.fixture(scope="module")
def gates(place):
    """Gates that one update learned, saved by the command."""
    arguments = ["learn", place / "dense", "--prompts", place / "prompts.txt", "--updates", "1", "--batch-size", "2"]
    assert main([*map(str, arguments), *STEPS, *CALL, "--out", str(place / "gates.safetensors")]) == DONE
    return place / "gates.safetensors"


def test_learned_gates_are_those_of_python(place, gates):
    pipe = ecodiff.load(place / "dense")
    config = ecodiff.LearnConfig(updates=1, batch_size=2, num_inference_steps=2, call={"height": 16, "width": 16})
    expected = ecodiff.learn(pipe, ["a red apple", "a cat and a pizza", "a rocket"], config, progress=False)
    found = ecodiff.Gates.load(gates, ecodiff.denoiser(pipe))
    assert all(torch.equal(found.log_alpha[name], value) for name, value in expected.log_alpha.items())
    assert not gates.with_name("gates.safetensors.run").exists()  # what resuming needs goes at the end


def test_prune_writes_the_pipeline_that_python_makes(place, gates, run):
    found = run("prune", "dense", "--scores", gates, "--ratio", 0.3, "--out", "small")
    pipe = ecodiff.load(place / "dense")
    small = ecodiff.prune(pipe, ecodiff.Gates.load(gates, ecodiff.denoiser(pipe)).mask(0.3))
    loaded = ecodiff.denoiser(ecodiff.load(place / "small")).state_dict()
    expected = ecodiff.denoiser(small).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())
    assert found["parameters after"] == sum(value.numel() for value in ecodiff.denoiser(small).parameters())


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_scores_of_a_method_make_a_mask(run, method):
    found = run("score", method, "dense", "--prompts", "prompts.txt", *STEPS, *CALL, "--out", f"{method}.safetensors")
    assert found["method"] == method and found["units"] > 0
    pruned = run("prune", "dense", "--scores", f"{method}.safetensors", "--ratio", 0.5, "--out", f"{method}-50")
    assert pruned["parameters after"] < pruned["parameters before"]


def test_compensation_prunes_as_much_as_prune(run, gates):
    small = run("prune", "dense", "--scores", gates, "--ratio", 0.3, "--out", "one")
    arguments = ["--scores", gates, "--ratio", 0.3, "--prompts", "prompts.txt", *STEPS, *CALL]
    adapted = run("compensate", "dense", *arguments, "--out", "two")
    assert adapted["parameters after"] == small["parameters after"]


def test_images_resume_where_they_were_and_are_the_same(place, run):
    arguments = ["generate", "dense", "--prompts", "prompts.txt", "--steps", 2, "--call", "height=16", "width=16"]
    assert run(*arguments, "--out", "images")["generated now"] == 3
    expected, about = read_images(place / "images")
    assert about.prompts[1] == "a cat and a pizza" and about.seeds == [0, 1, 2]
    (place / "images" / "00001.png").unlink()
    assert run(*arguments, "--out", "images")["generated now"] == 1
    assert torch.equal(read_images(place / "images")[0], expected)


def test_images_of_another_run_are_not_mixed(place, run, capsys):
    arguments = ["generate", "dense", "--prompts", "prompts.txt", "--call", "height=16", "width=16", "--out", "mixed"]
    run(*arguments, "--steps", 2)
    assert main([*arguments, "--steps", "3"]) == WRONG
    assert "images of another run" in capsys.readouterr().err


def test_evaluate_compares_pipelines_and_folders_alike(place, run, gates):
    run("prune", "dense", "--scores", gates, "--ratio", 0.5, "--out", "half")
    sampling = ["--prompts", "prompts.txt", "--steps", 2, "--call", "height=16", "width=16"]
    for model in ("dense", "half"):
        run("generate", model, *sampling, "--out", f"{model}-images")
    of_models = run("evaluate", "half", "dense", *sampling)
    of_folders = run("evaluate", "half-images", "dense-images", "--each")
    # PNGs hold the same bytes; another batch may round one of them otherwise.
    assert of_models["SSIM"]["mean"] == pytest.approx(of_folders["SSIM"]["mean"], abs=0.01)
    assert len(of_folders["each"]["SSIM"]) == 3
    same = run("evaluate", "dense-images", "dense", *sampling)
    assert same["SSIM"]["mean"] == pytest.approx(1) and same["equal images"] == 3


@pytest.mark.slow
def test_evaluate_measures_the_distance_to_real_images(place, run, gates):
    run("generate", "dense", "--prompts", "prompts.txt", "--steps", 2, *CALL, "--out", "for-real")
    real = place / "real"
    real.mkdir()
    for number, size in enumerate([(40, 30), (30, 30), (30, 40)]):
        Image.new("RGB", size, (80 * number, 30, 90)).save(real / f"{number}.jpg")
    (real / "broken.jpg").write_bytes(b"")
    found = run("evaluate", "for-real", "for-real", "--real", "real")
    assert found["real images"] == 3 and found["real images, unreadable"] == 1
    assert found["FID to real images, first"] == pytest.approx(found["FID to real images, second"]) and found["SSIM"]
    features = metrics.real_images(real).features.double().numpy()
    np.savez(place / "real.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    stored = run("evaluate", "for-real", "for-real", "--real", "real.npz")
    assert stored["FID to real images, first"] == pytest.approx(found["FID to real images, first"], rel=1e-6)
    same = run("evaluate", "for-real", "for-real", "--real", "for-real")
    assert same["FID to real images, first"] == pytest.approx(0, abs=1e-3)


def test_images_are_not_compared_with_those_of_other_settings(run, capsys):
    sampling = ["--prompts", "prompts.txt", "--call", "height=16", "width=16"]
    run("generate", "dense", *sampling, "--steps", 2, "--out", "two-steps")
    for other in (["--steps", "3"], []):
        assert main(["evaluate", "two-steps", "dense", *sampling, *other]) == WRONG
        assert "num_inference_steps=2, and the others would be with" in capsys.readouterr().err


def test_compare_writes_one_page_that_needs_nothing_else(place, run, gates):
    run("prune", "dense", "--scores", gates, "--ratio", 0.5, "--out", "cut")
    sampling = ["--prompts", "prompts.txt", "--steps", 2, "--call", "height=16", "width=16"]
    found = run("compare", "cut", "dense", *sampling, "--out", "page.html")
    text = (place / "page.html").read_text(encoding="utf-8")
    assert text.count("<figure") == 3 and text.count("data:image/webp") == 6 and "a cat and a pizza" in text
    assert f"{found['SSIM']['mean']:.3f}" in text and "parameters of the denoiser" in text
    assert not re.search(r"(src|href)=.?http", text)


def test_a_prompt_cannot_be_markup_on_the_page():
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    hostile = ['<script>alert("1")</script>', 'a" onload="b']
    text = page(of_images((images, images), hostile, [0, 1], names=("<b>", "$second")))
    assert "<script>alert" not in text and 'alt="a" onload' not in text and "&lt;b&gt;" in text


def test_a_notebook_shows_the_page_in_a_frame():
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    comparison = of_images((images, images), ['say "a"', "b"], [0, 1], names=("small", "<whole>"))
    shown = comparison._repr_html_()
    start = shown.index('srcdoc="') + len('srcdoc="')
    assert html.unescape(shown[start : shown.index('"', start)]) == page(comparison)
    assert "small and &lt;whole&gt;" in shown
    assert repr(comparison) == "Comparison of 2 pairs, small and <whole>: SSIM 1.000, PSNR in dB 100.000"


@pytest.mark.slow
def test_clips_go_through_all_commands(place, run):
    tiny_wan(None, second=False).save_pretrained(place / "wan")
    call = ["--call", "height=16", "width=16", "num_frames=5"]
    drawn = ["--prompts", "prompts.txt", "--steps", "1", *call]
    learned = ["--prompts", "prompts.txt", "--updates", "1", "--batch-size", "1", "--num-inference-steps", "1", *call]
    run("learn", "wan", *learned, "--guidance-scale", "1", "--out", "wan.safetensors")
    run("prune", "wan", "--scores", "wan.safetensors", "--ratio", "0.5", "--out", "wan-small")
    assert run("generate", "wan", *drawn, "--out", "clips")["generated now"] == 3
    assert run("generate", "wan", *drawn, "--out", "clips")["generated now"] == 0
    expected = ecodiff.generate(
        ecodiff.load(place / "wan"),
        ["a red apple", "a cat and a pizza", "a rocket"],
        range(3),
        num_inference_steps=1,
        progress=False,
        **{"height": 16, "width": 16, "num_frames": 5},
    )
    assert expected.shape == (3, 5, 3, 16, 16) and torch.equal(read_images(place / "clips")[0], expected)
    same = run("evaluate", "wan", "clips", "--prompts", "prompts.txt", "--steps", "1", *call)
    assert same["equal images"] == 3 and same["SSIM"]["mean"] == 1
    assert run("evaluate", "wan-small", "clips", "--steps", "1", *call)["SSIM"]["mean"] < 1
    run("compare", "wan-small", "wan", *drawn, "--out", "clips.html")
    assert "data:image/webp" in (place / "clips.html").read_text()
    retrained = run("retrain", "wan-small", "--images", "clips", "--steps", "1", "--batch-size", "1", "--out", "better")
    assert retrained["images"] == 3


def test_retraining_takes_a_folder_of_images(run):
    sampling = ["--prompts", "prompts.txt", "--steps", 2, "--call", "height=16", "width=16"]
    run("generate", "dense", *sampling, "--out", "teacher")
    found = run("retrain", "dense", "--images", "teacher", "--steps", 1, "--batch-size", 2, "--out", "retrained")
    assert found["steps"] == 1 and found["images"] == 3


WRONG_CALLS = {
    "prune dense --scores gates.safetensors --ratio 0.2 --out nowhere/small": "there is no folder nowhere",
    "prune dense --scores prompts.txt --ratio 0.2 --out a": "not a readable safetensors file",
    "prune dense --scores gates.safetensors --ratio 1.5 --out a": "in [0, 1)",
    "prune nothing-here --scores gates.safetensors --ratio 0.2 --out a": "no embedded pipeline",
    "prune dense --scores gates.safetensors --ratio 0.2 --out prompts.txt": "this is a file",
    "learn dense --prompts prompts.txt --updates 0 --out a": "updates=0 must be at least 1",
    "learn dense --prompts none.txt --out a": "prompts cannot be read",
    "learn dense --prompts prompts.txt --count 9 --out a": "9 prompts were asked for, and there are 3",
    "score wanda dense --out a": "give --prompts",
    "evaluate dense dense": "give --prompts FILE, or two folders",
    "retrain dense --images dense --out a": "no folder of images",
    "evaluate dense dense --prompts prompts.txt --real prompts.txt": "holds no statistics",
    "prune dense --scores published:flux --ratio 0.2 --out a": "not for 'flux'",
    "prune dense --scores published:sdxl --ratio 0.2 --out a": "λ of another model",
    "generate dense --prompts prompts.txt --dtype float12 --out a": "dtype is one of",
}


@pytest.mark.parametrize("line", WRONG_CALLS)
def test_what_a_user_can_put_right_is_one_sentence(line, place, gates, monkeypatch, refused):
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    assert WRONG_CALLS[line] in refused(*line.split())
    assert sorted(place.rglob("*")) == before


def test_scores_of_another_model_are_refused(place, gates, tmp_path, refused):
    tiny_sdxl().save_pretrained(tmp_path / "other")
    said = refused("prune", tmp_path / "other", "--scores", gates, "--ratio", "0.2", "--out", tmp_path / "small")
    assert "another model" in said


def test_a_settings_file_stands_for_options_and_the_command_line_wins(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "command: learn\nmodel: dense\nprompts: prompts.txt\nout: gates.safetensors\nupdates: 7\nlr: {attention: 0.1}\n"
        "checkpoint: false\nguidance_scale: null\nkinds: [attention, feed_forward]\ncall: {height: 16, sizes: [1, 2]}\n"
    )
    arguments = with_settings_file(["--settings", str(file), "--updates", "9"], "learn")
    options = make_parser(["learn"]).parse_args(["learn", *arguments])
    assert (options.model, options.updates, options.checkpoint) == ("dense", 9, False)
    assert options.guidance_scale is None and options.kinds == ["attention", "feed_forward"]
    assert options.call == {"height": 16, "sizes": [1, 2]} and options.lr == {"attention": 0.1}


@pytest.mark.parametrize("text", ["- a list", "command: prune", "a: [", "\0"])
def test_a_settings_file_that_is_none_is_refused(tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(EcoDiffError, match="run.yaml"):
        with_settings_file(["--settings", str(file)], "learn")


def test_an_unknown_option_of_a_settings_file_is_named(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("model: dense\nupdate: 7\nprompts: a\nout: b\nnonsense: 1\n")
    with pytest.raises(SystemExit) as ended:
        main(["learn", "--settings", str(file)])
    assert ended.value.code == WRONG and "nonsense" in capsys.readouterr().err


def test_the_methods_of_the_command_are_those_of_the_package():
    assert set(score_command.METHODS) == set(scores.METHODS)


@pytest.mark.parametrize("name", LIBRARY)
def test_help_teaches_with_an_example_that_is_understood(name):
    text = commands()[name].__doc__
    examples = re.findall(r"^example: python -m ecodiff (.+)$", text, re.MULTILINE)
    assert examples
    for example in examples:
        assert make_parser([name]).parse_args(example.split()).command == name


def test_help_needs_no_torch():
    code = "import sys; from ecodiff.__main__ import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, env=os.environ)


@pytest.mark.slow
def test_the_three_lines_of_the_readme(tmp_path, monkeypatch, capsys):
    """`learn`, `prune` and `evaluate` on an embedded pipeline, as the README has them but with one update."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("\n".join(openmoji_prompts("train", 4)))
    readme = (ecodiff.storage.paths.root() / "README.md").read_text(encoding="utf-8")
    lines = [line.removeprefix("python -m ecodiff ") for line in readme.splitlines() if "-m ecodiff" in line]
    chosen = [line for line in lines if line.split()[0] in ("learn", "prune", "evaluate") and "openmoji-sdxl" in line]
    assert [line.split()[0] for line in chosen] == ["learn", "prune", "evaluate"]
    quick = {
        "learn": ["--updates", "1", "--batch-size", "1", "--num-inference-steps", "2"],
        "evaluate": ["--steps", "2"],
    }
    for line in chosen:
        arguments = line.partition("  #")[0].split()
        assert main([*arguments, *quick.get(arguments[0], [])]) == DONE, capsys.readouterr().err
    assert "SSIM" in capsys.readouterr().out
