"""Kills, two processes at once, full disks, read-only folders and damaged files: what is left is right, or is named.

    python tests/faults.py --times 20                  each kind of run is killed twenty times
    python tests/faults.py --times 20 --only learn
    python tests/faults.py --fuzz 3000                 so many damaged files are read

Each run is one command on a tiny pipeline, killed (SIGKILL) at a random moment and given again; what it leaves then is
compared, byte for byte, with what the run leaves that nothing interrupts. Processes are forks of this one, which has
imported what commands need: importing takes longer than the runs, and a kill in the midst of it finds nothing. This
process itself never goes backward, since the threads that do so do not survive a fork.

The exit code is 1 where anything was wrong; each such case is one line with what makes it come again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ |= {"HF_HUB_OFFLINE": "1", "DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}

import torch
from safetensors.torch import load_file

from ecodiff.__main__ import WRONG, main

SIZE = ["--call", "height=16", "width=16"]
LIMIT = 300
"""Seconds after which a run counts as one that hangs."""


@dataclass(frozen=True)
class Run:
    """A command that is given in an empty folder beside `dense`, `small`, `images` and `gates.safetensors`."""

    arguments: list[str]
    result: str | None
    """What it makes; None: only what it prints."""
    other: list[str]
    """Further arguments that make it another run."""
    prepare: Callable[[], None] | None = None


def study_of_three() -> None:
    """In a child: `study` knows one study of three rows, of the pipeline `dense`, and `data` holds its results."""
    from ecodiff.lab import studies
    from ecodiff.lab.studies import cell as cells
    from ecodiff.lab.studies import measure, plan, protocol, results, run
    from ecodiff.method.config import LearnConfig
    from ecodiff.pipelines.identity import Identity
    from ecodiff.pipelines.loading import load
    from ecodiff.storage import cache, records

    call = {"height": 16, "width": 16}
    small = protocol.Protocol(
        model="tiny", pictures=3, num_inference_steps=1, guidance_scale=1.0, call=call, features=False
    )
    config = LearnConfig(updates=2, batch_size=1, num_inference_steps=1, guidance_scale=1.0, call=call)
    rows = {}
    for method, ratio in (("original", 0.2), ("random", 0.5), ("learned", 0.5)):
        rows[method] = cells.Cell(method, ratio, protocol=small, config=config, prompts=2)
    study = studies.Study("Three", "no table", lambda model: rows, varies=("method", "ratio"), reference=("original",))
    pipe, data = load("../dense"), Path("data").resolve()
    for module in (studies, plan):
        module.STUDIES = {"three": study}
    for module in (results, run, cells):
        module.identity = lambda model: Identity.of(pipe)
    for module in (records, results, protocol, cache):
        module.data_dir = lambda: data
    measure.load_once = lambda model: pipe


PROMPTS = ["--prompts", "../prompts.txt"]
LEARN = ["learn", "../dense", *PROMPTS, "--updates", "4", "--batch-size", "1", "--save-every", "1"]
LEARN += ["--snapshot-every", "2", "--num-inference-steps", "2", "--out", "gates.safetensors", *SIZE]
GENERATE = ["generate", "../dense", *PROMPTS, "--steps", "2", "--batch-size", "1", "--out", "images", *SIZE]
PRUNE = ["prune", "../dense", "--scores", "../gates.safetensors", "--out", "model", "--ratio"]
RETRAIN = ["retrain", "../small", "--images", "../images", "--batch-size", "2", "--lr", "1e-4", "--out", "model"]
RUNS = {
    "learn": Run(LEARN, "gates.safetensors", ["--seed", "1"]),
    "generate": Run(GENERATE, "images", ["--seed", "1"]),
    "evaluate": Run(["evaluate", "../small", "../dense", *PROMPTS, "--steps", "2", "--json", *SIZE], None, ["--each"]),
    "retrain": Run([*RETRAIN, "--steps", "4", "--rank", "2"], "model", ["--seed", "1"]),
    "save": Run([*PRUNE, "0.3"], "model", ["--ratio", "0.6"]),
    "study": Run(["study", "three", "--model", "tiny", "--seeds", "1"], "data", [], study_of_three),
}


def begun(arguments: list[str], folder: Path, log: Path, prepare: Callable[[], None] | None = None) -> int:
    """The id of a child that gives a command in a folder; what it prints goes to ``log``."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        os.chdir(folder)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        if prepare is not None:
            prepare()
        code = main(arguments)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 98
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(child: int, limit: float = LIMIT) -> int:
    """The exit code of a child, negative where a signal ended it; after the limit it is killed."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError(f"not done after {limit:.0f} seconds")


def left(folder: Path, log: Path, run: Run) -> dict:
    """What a run has left: the contents of all its files by their names, or what it printed."""
    if run.result is None:
        return {"printed": log.read_text()}
    contents = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            contents[name] = f"a link to {os.readlink(path)}"
        elif path.suffix == ".safetensors":
            # Without metadata: they are in any order, and those of gates tell how long each update took.
            contents[name] = {key: value.tolist() for key, value in load_file(path).items()}
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text().split("\n") if line]
            contents[name] = {row["key"]: row["values"] for row in rows}
        elif path.is_file():
            contents[name] = path.read_bytes()
    return contents


def different(found: dict, expected: dict) -> str | None:
    """The first difference between what two runs left, in words."""
    for name in sorted({*found, *expected}):
        if name not in found or name not in expected:
            return f"{name} is {'missing' if name in expected else 'left over'}"
        if found[name] != expected[name]:
            return f"{name} differs"
    return None


class Faults:
    """A place with what runs need, the runs' uninterrupted results, and what was found wrong."""

    def __init__(self, place: Path, seed: int):
        self.place, self.draw, self.wrong = place, random.Random(seed), []
        self.number = 0
        place.chmod(0o755)
        from tiny import tiny_sd

        tiny_sd().save_pretrained(place / "dense")
        for path in (place / "dense").rglob("*.safetensors"):
            path.chmod(0o644)  # safetensors lets nobody but the owner read them
        (place / "prompts.txt").write_text("a red apple\na cat and a pizza\na rocket\na green pizza\n")
        here = self.folder()
        for run, name in ((RUNS["learn"], "gates.safetensors"), (RUNS["generate"], "images"), (RUNS["save"], "model")):
            self.must(run, here)
            (here / name).rename(place / {"model": "small"}.get(name, name))
        self.expected: dict[str, dict] = {}
        self.seconds: dict[str, float] = {}

    def folder(self) -> Path:
        """A new empty folder."""
        self.number += 1
        folder = self.place / f"try-{self.number:04d}"
        folder.mkdir()
        return folder

    def log(self, folder: Path) -> Path:
        return folder.with_suffix(".txt")

    def begin(self, run: Run, folder: Path, more: Sequence[str] = (), log: Path | None = None, prepare=None) -> int:
        """A child that gives the command of a run, after ``prepare``."""

        def both():
            if run.prepare is not None:
                run.prepare()
            if prepare is not None:
                prepare()

        return begun([*run.arguments, *more], folder, log or self.log(folder), both)

    def must(self, run: Run, folder: Path) -> None:
        """Give the command; RuntimeError with what it said where it does not end well."""
        code = ended(self.begin(run, folder))
        if code:
            raise RuntimeError(f"exit code {code}: {self.log(folder).read_text()[-500:]}")

    def uninterrupted(self, name: str) -> dict:
        """What the run leaves when nothing interrupts it."""
        if name not in self.expected:
            folder, started = self.folder(), time.monotonic()
            self.must(RUNS[name], folder)
            self.seconds[name] = time.monotonic() - started
            self.expected[name] = left(folder, self.log(folder), RUNS[name])
        return self.expected[name]

    def tried(self, what: str, check: Callable[[], str | None]) -> None:
        """Note what is wrong with one case, in words, if anything is."""
        try:
            wrong = check()
        except (RuntimeError, TimeoutError, AssertionError) as error:
            wrong = str(error)
        if wrong:
            self.wrong.append(f"{what}: {wrong}")
            print(f"  WRONG {self.wrong[-1]}", flush=True)

    def killed(self, name: str, times: int) -> None:
        """Kill a run at random moments, give it again, and compare."""
        run, interrupted = RUNS[name], 0
        expected = self.uninterrupted(name)
        for number in range(times):
            # The later of two moments, as most is written towards the end.
            after = self.seconds[name] * max(self.draw.random(), self.draw.random())
            folder = self.folder()

            def check(folder=folder, after=after) -> str | None:
                nonlocal interrupted
                if name == "save":  # the new model takes the place of another one
                    shutil.copytree(self.place / "small", folder / "model")
                    (folder / "model" / "notes.txt").write_text("mine")
                child = self.begin(run, folder)
                time.sleep(after)
                os.kill(child, signal.SIGKILL)
                interrupted += ended(child) == -signal.SIGKILL
                if name == "save":
                    loads = ended(begun(["cost", "model"], folder, self.log(folder)))
                    if loads:
                        return f"neither the old nor the new model is left: {self.log(folder).read_text()[-300:]}"
                self.must(run, folder)
                found = left(folder, self.log(folder), run)
                if name == "save" and found.pop("model/notes.txt", None) != b"mine":
                    return "notes.txt is not what it was"
                return different(found, expected)

            self.tried(f"{name}, killed after {after:.3f} s (number {number})", check)
            shutil.rmtree(folder)
        print(f"{name}: killed {interrupted} times of {times}, in runs of {self.seconds[name]:.1f} s", flush=True)

    def crowded(self, name: str) -> None:
        """Two processes at once in one folder: the same command twice, then two different ones."""
        run, expected = RUNS[name], self.uninterrupted(name)
        for more in ([], run.other):
            folder = self.folder()

            def check(folder=folder, more=more) -> str | None:
                logs = [folder.with_suffix(f".{number}.txt") for number in range(2)]
                children = [self.begin(run, folder, given, log) for given, log in zip(([], more), logs, strict=True)]
                codes = [ended(child) for child in children]
                for code, log in zip(codes, logs, strict=True):
                    if code not in (0, WRONG) or (code and not named(log)):
                        return f"exit code {code}: {log.read_text()[-300:]}"
                if codes == [WRONG, WRONG]:
                    return f"both were refused: {logs[0].read_text()[-300:]}"
                found = left(folder, logs[codes.index(0)], run)
                if not more or (codes == [0, WRONG] and run.result):
                    return different(found, expected)
                if codes == [WRONG, 0] and run.result:
                    alone = self.folder()
                    if ended(self.begin(run, alone, more)):
                        return "the other run does not end well alone"
                    return different(found, left(alone, self.log(alone), run))
                return None

            self.tried(f"{name}, twice at once {' '.join(more)}", check)

    def full(self, name: str, times: int) -> None:
        """No file may grow beyond a limit, as on a full disk: a clear error, and the run can be given again."""
        run, expected = RUNS[name], self.uninterrupted(name)
        refused = 0
        for _ in range(times):
            limit = int(10 ** self.draw.uniform(3.4, 5.5))
            folder = self.folder()

            def small_disk(limit=limit):
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

            def check(folder=folder, small_disk=small_disk) -> str | None:
                nonlocal refused
                code = ended(self.begin(run, folder, prepare=small_disk))
                if code not in (0, WRONG):
                    # The log is limited as well: a traceback may be cut, an exit code is not.
                    return f"exit code {code}: {self.log(folder).read_text()[-300:]}"
                refused += code == WRONG
                self.must(run, folder)
                return different(left(folder, self.log(folder), run), expected)

            self.tried(f"{name}, files of at most {limit} bytes", check)
        print(f"{name}: refused {refused} times of {times} on a full disk", flush=True)

    def read_only(self, name: str) -> None:
        """A folder that this user cannot write: a clear error, and nothing is left."""
        run, folder = RUNS[name], self.folder()
        folder.chmod(0o555)

        def check() -> str | None:
            code = ended(self.begin(run, folder, prepare=as_nobody))
            ends_well = code == 0 if run.result is None else code == WRONG and named(self.log(folder))
            if not ends_well:
                return f"exit code {code}: {self.log(folder).read_text()[-300:]}"
            if run.result is None:  # it only prints
                return None
            return different(left(folder, self.log(folder), run), {})

        self.log(folder).touch()
        self.log(folder).chmod(0o666)
        self.tried(f"{name}, in a read-only folder", check)


def as_nobody() -> None:
    """In a child of root: go on as a user without rights, since root may write everywhere."""
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)


def named(log: Path) -> bool:
    """Whether a command that failed said so in one line, without a traceback."""
    text = log.read_text()
    return "Traceback" not in text and text.rstrip().rpartition("\n")[2].startswith("error: ")


def imported() -> None:
    """Import what commands import, so that children need not."""
    import peft  # noqa: F401
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401

    import ecodiff.comparison.compare
    import ecodiff.lab.studies.measure
    import ecodiff.lab.studies.run
    import ecodiff.metrics.similarity
    import ecodiff.retraining.retrain
    import ecodiff.scores.files  # noqa: F401


def run_all(times: int, only: list[str], seed: int = 0) -> list[str]:
    """Try all faults but damaged files; what was wrong, a line each."""
    torch.set_num_threads(1)
    imported()
    with tempfile.TemporaryDirectory(prefix="faults-") as place:
        faults = Faults(Path(place), seed)
        for name in only or RUNS:
            faults.killed(name, times)
            faults.crowded(name)
            faults.full(name, max(times // 4, 1))
            faults.read_only(name)
        return faults.wrong


def main_of_script() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--times", type=int, default=20, help="kills of each kind of run (default: 20)")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=[], help="these kinds of runs")
    parser.add_argument("--fuzz", type=int, metavar="N", help="read N damaged files instead")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.fuzz:
        from fuzzed import fuzz

        torch.set_num_threads(1)
        wrong, counts = fuzz(options.fuzz, options.seed)
        for kind, outcomes in counts.items():
            print(f"{kind}: " + ", ".join(f"{number} {outcome}" for outcome, number in sorted(outcomes.items())))
    else:
        wrong = run_all(options.times, options.only, options.seed)
    print("\n".join(f"WRONG {line}" for line in wrong) or "all as it should be")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main_of_script())
