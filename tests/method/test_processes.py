"""Several processes share the work of one: what each does adds up to what one process does alone."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import PROMPTS, QUICK, tiny_sd

import ecodiff
from ecodiff import processes
from ecodiff.__main__ import WRONG, main
from ecodiff.errors import EcoDiffError
from ecodiff.method.carried import _group, refuse_streamed
from ecodiff.method.gates import Gates
from ecodiff.method.learn import Task, _optimizer
from ecodiff.method.sites import find_sites
from ecodiff.pipelines.batches import Form, joins
from ecodiff.pipelines.prompts import NotJoined, encoding_once
from ecodiff.pipelines.running import on_device
from ecodiff.progress import progress_bar, say
from ecodiff.storage.images import read_images


@pytest.fixture
def as_process(monkeypatch):
    """A function that makes this process number ``rank`` of ``count``, whose sums and lists stay its own."""
    monkeypatch.setattr(processes, "summed", lambda tensor: tensor)
    monkeypatch.setattr(processes, "gathered", list)

    def become(rank: int, count: int) -> None:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(count))

    return become


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("number", [0, 1, 5, 6])
def test_every_item_is_one_processs_own(monkeypatch, count, number):
    parts = []
    monkeypatch.setenv("WORLD_SIZE", str(count))
    for rank in range(count):
        monkeypatch.setenv("RANK", str(rank))
        parts.append(processes.own(list(range(number))))
    assert sorted(sum(parts, [])) == list(range(number))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.fixture(scope="module")
def tasks():
    """A function that makes the task of a configuration, with the teacher's latents, on one pipeline."""
    pipe = encoding_once(tiny_sd())
    known: dict = {}

    def task(config) -> Task:
        made = Task(pipe, PROMPTS, config, torch.device("cpu"))
        if not known:
            made.compute_teacher(None, False, find_sites(made.denoiser))
            known.update(teacher=made.teacher, scale=made.scale)
        vars(made).update(known)
        return made

    return task


def gradient(task: Task, update: int = 0) -> tuple[torch.Tensor, float]:
    """The gradient of the reconstruction in all λ, and its value."""
    gates = Gates.start(find_sites(task.denoiser), 1.0, task.config.distribution)
    row = task.update(gates, _optimizer(gates, task.config), update)
    return torch.cat([value.grad for value in gates.log_alpha.values()]), row["reconstruction"]


DRAWS = {
    "anew in each call": {},
    "one by one": {"micro_batch_size": 1},
    "two by two": {"micro_batch_size": 2},
    "three and one": {"micro_batch_size": 3},
    "redrawn": {"micro_batch_size": 1, "recompute": "redraw", "keep_last": 1},
    "a sample's own": {"gate_draw": "sample"},
    "a sample's own, one by one": {"gate_draw": "sample", "micro_batch_size": 1},
    "a trajectory's": {"gate_draw": "trajectory", "micro_batch_size": 2},
    "norm": {"reconstruction": "norm", "gate_draw": "trajectory"},
    "steps, two by two": {"objective": "step", "micro_batch_size": 2},
    "steps of all": {"objective": "step", "gate_draw": "sample"},
}


@pytest.mark.parametrize("name", DRAWS)
def test_gradients_of_the_processes_add_up_to_that_of_one(name, tasks, as_process):
    config = replace(QUICK, batch_size=4, weight=0.0, target_open=None, **DRAWS[name])
    alone, loss = gradient(tasks(config))
    assert alone.abs().max() > 0
    total, losses = torch.zeros_like(alone), 0.0
    for rank in range(3):
        as_process(rank, 3)
        part, part_of_loss = gradient(tasks(config))
        total, losses = total + part, losses + part_of_loss
    torch.testing.assert_close(total, alone, rtol=1e-4, atol=1e-6 * alone.abs().max().item())
    assert losses == pytest.approx(loss, rel=1e-5)


@pytest.mark.slow
def test_samples_that_do_not_join_are_dealt_out_as_one_process_runs_them(tasks, as_process, monkeypatch):
    """The whole batch decides, also where what one process would run of it joins."""
    tasks(QUICK)  # the teacher's samples join
    run = Task.latents

    def apart(self, indices, gradients):
        if len(indices) > 2:
            raise NotJoined("three are too many")
        return run(self, indices, gradients)

    monkeypatch.setattr(Task, "latents", apart)
    monkeypatch.setattr("ecodiff.method.learn.joins", lambda pipe, form, prompts, call: len(prompts) <= 2)
    for draw in ("sample", "call"):
        config = replace(QUICK, batch_size=4, weight=0.0, target_open=None, gate_draw=draw)
        alone, _ = gradient(tasks(config))
        total = torch.zeros_like(alone)
        for rank in range(2):
            as_process(rank, 2)
            total += gradient(tasks(config))[0]
        as_process(0, 1)
        torch.testing.assert_close(total, alone, rtol=1e-4, atol=1e-6 * alone.abs().max().item())


def test_whether_prompts_join_is_asked_of_the_pipeline(monkeypatch):
    pipe = encoding_once(tiny_sd())
    call = {"height": 16, "width": 16, "num_inference_steps": 2}
    assert joins(pipe, Form(2), PROMPTS[:2], call)

    def refuse(*arguments, **more):
        raise NotJoined("of different lengths")

    monkeypatch.setattr(pipe, "encode_prompt", refuse)
    assert not joins(pipe, Form(2), PROMPTS[:2], call)


def test_only_the_first_process_tells(as_process, capsys):
    as_process(1, 2)
    say("heard twice")
    assert progress_bar(range(2)).disable
    as_process(0, 2)
    say("heard once")
    assert capsys.readouterr().err.split("\n")[0] == "heard once"


@pytest.mark.parametrize("command", ["prune", "retrain", "compare"])
def test_a_command_that_shares_no_work_says_so_at_once(command, as_process, capsys):
    arguments = {
        "prune": ["no model", "--scores", "none", "--ratio", "0.2", "--out", "small"],
        "retrain": ["no model", "--images", "none", "--out", "small"],
        "compare": ["no model", "no model", "--out", "page.html"],
    }
    as_process(0, 2)
    assert main([command, *arguments[command]]) == WRONG
    assert f"{command} runs in one process, not in 2: start it without a launcher." in capsys.readouterr().err


def test_functions_that_share_no_work_and_sharding_say_so(as_process, monkeypatch):
    as_process(0, 2)
    with pytest.raises(EcoDiffError, match="retrain runs in one process, not in 2"):
        with on_device(tiny_sd(), "retrain"):
            pass
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(EcoDiffError, match="told to use FSDP.*each process holds the whole pipeline"):
        with on_device(tiny_sd(), "learn", many=True):
            pass


def test_weights_that_leave_before_backward_are_refused():
    pipe = tiny_sd()
    cpu = torch.device("cpu")
    pipe.unet.enable_group_offload(cpu, cpu, offload_type="leaf_level")
    refuse_streamed(pipe.unet, "learn")  # they stay where they are
    for module in pipe.unet.modules():
        if _group(module) is not None:
            _group(module).onload_device = torch.device("cuda")
    with pytest.raises(EcoDiffError, match="learn needs gradients, and group offload takes the weights"):
        ecodiff.learn(pipe, PROMPTS, QUICK, progress=False)


def test_a_process_that_works_alone_forgets_the_launcher(as_process):
    as_process(1, 2)
    assert processes.work_alone() == (1, 2)
    assert (processes.rank(), processes.count()) == (0, 1)


WORKER = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from ecodiff import metrics, processes
from ecodiff.__main__ import main
for arguments in json.loads(Path(sys.argv[1]).read_text()):
    code = main(arguments)
    if processes.is_first():
        print("ended", code, flush=True)
features = torch.arange(80.0).view(20, 4).sin()
distance = metrics.fid(features[:10], features[10:]), metrics.kid(features[:10], features[10:])[0]
assert len(set(processes.gathered([distance]))) == 1
if processes.is_first():
    print("distances", *distance, flush=True)
processes.leave()
"""
SAMPLING = ["--steps", "2", "--call", "height=16", "width=16"]
LEARNING = [
    "--num-inference-steps",
    "2",
    "--batch-size",
    "3",
    "--target-open",
    "none",
    "--call",
    "height=16",
    "width=16",
]


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path, monkeypatch, capsys):
    """λ to rounding, also of a run that goes on; the images to rounding; measures, and lines of the first alone."""
    monkeypatch.chdir(tmp_path)
    tiny_sd().save_pretrained("dense")
    Path("prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    learn = ["learn", "dense", "--prompts", "prompts.txt", *LEARNING]
    generate = ["generate", "dense", "--prompts", "prompts.txt", *SAMPLING]
    evaluate = ["evaluate", "images", "dense", "--prompts", "prompts.txt", *SAMPLING, "--json", "--each"]
    calls = [
        [*learn, "--updates", "1", "--resume-dir", "run", "--out", "begun"],
        [*learn, "--updates", "2", "--resume-dir", "run", "--out", "two"],
        [*generate, "--out", "images"],
        [*generate, "--count", "1", "--out", "single"],
        evaluate,
        [*learn, "--updates", "1", "--out", "nowhere/gates"],
    ]
    Path("calls.json").write_text(json.dumps(calls))
    Path("worker.py").write_text(WORKER)
    # --multi_gpu is how accelerate starts several processes on one machine, also where they then find no GPU.
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]
    done = subprocess.run(
        [*launcher, "worker.py", "calls.json"],
        env=os.environ | {"PYTHONPATH": str(Path(ecodiff.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("ended")] == ["ended 0"] * 5 + ["ended 2"]
    assert done.stderr.count("error: --out nowhere/gates: there is no folder nowhere") == 1
    assert done.stderr.count("learn: gates on units") == 2  # of each run once
    assert sum(line.startswith("gates: two") for line in lines) == 1

    assert main([*learn, "--updates", "2", "--out", "one"]) == 0
    alone, shared = (Gates.load(name, ecodiff.denoiser(ecodiff.load("dense"))) for name in ("one", "two"))
    for name, value in alone.log_alpha.items():
        torch.testing.assert_close(shared.log_alpha[name], value, rtol=0, atol=1e-5)
        assert (value - 3).abs().max() > 0.1

    capsys.readouterr()
    assert main([*generate, "--out", "expected"]) == 0
    (images, about), (expected, _) = read_images("images"), read_images("expected")
    assert about.prompts == PROMPTS and (images.int() - expected.int()).abs().max() <= 1
    assert len(read_images("single")[0]) == 1
    capsys.readouterr()
    assert main(evaluate) == 0
    measured = json.loads(capsys.readouterr().out)
    text = done.stdout[done.stdout.index("{") : done.stdout.rindex("}") + 1]
    of_two = json.loads(text)
    assert of_two["images"] == 4
    assert of_two["each"]["SSIM"] == pytest.approx(measured["each"]["SSIM"], abs=1e-3)

    features = torch.arange(80.0).view(20, 4).sin()
    distances = next(line for line in lines if line.startswith("distances")).split()[1:]
    expected = ecodiff.metrics.fid(features[:10], features[10:]), ecodiff.metrics.kid(features[:10], features[10:])[0]
    assert [float(value) for value in distances] == pytest.approx(list(expected), rel=1e-6)
