"""Damaged files of every kind that the library reads: which of them are refused, and whether any is taken for right.

Each case copies what a healthy folder holds, damages one file (bits, length, values and names of its JSON, hostile
values), and reads it. It is refused by an EcoDiffError, or comes out as it was; where a changed text is simply another
text (prompts, settings), it may come out otherwise. Nothing may run code that a file brings, raise anything else, or
take longer than `LIMIT` seconds.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import pickle
import random
import shutil
import signal
import struct
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tiny import random_mask, tiny_sd

import ecodiff
from ecodiff import EcoDiffError, Gates, denoiser, find_sites, prune
from ecodiff.__main__ import make_parser
from ecodiff.commands.options import with_settings_file
from ecodiff.method.resume import Folder
from ecodiff.pipelines.contents import weights_hash
from ecodiff.pipelines.prompt_files import read_prompts
from ecodiff.scores.files import load_scores, save_scores
from ecodiff.storage import records
from ecodiff.storage.images import About, ImageFolder, read_images

LIMIT = 60
WEIGHTS = "diffusion_pytorch_model.safetensors"


class Hang(BaseException):
    """A case took too long. No Exception, so that nothing on the way takes it for a fault of the file."""


@dataclass(frozen=True)
class Target:
    """A file that is damaged, how it is read, and whether what is read must then be what it was."""

    file: str
    damage: Callable[[bytes, random.Random, Path], bytes]
    read: Callable[[Path], object]
    weight: int = 4
    same: bool = True


class Hostile:
    """A pickle that runs code when it is read."""

    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.mkdir, (str(self.sentinel),)


def hostile(draw: random.Random, sentinel: Path):
    """A value that no writer of ours has written."""
    code = f"__import__('os').mkdir({str(sentinel)!r})"
    values = [None, True, False, -1, 0, 1, 3, 2**31, 2**63, 10**9, 1e308, -1e-300, float("nan"), float("inf"), "", "x"]
    values += ["../../../etc/passwd", ["evil", "Evil"], ["os", "mkdir"], [None, None], [], {}, [[]], {"a": {"b": []}}]
    values += ["A" * 5000, "\ud800", "\u2028", code, [[["a"]]] * 20, {"auto_map": {"AutoModel": "evil.Evil"}}]
    return copy.deepcopy(draw.choice(values))


def places(content, here=()) -> list[tuple]:
    """The ways to all values in nested mappings and lists."""
    found = []
    entries = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for name, value in entries:
        found += [(*here, name), *places(value, (*here, name))]
    return found


def damaged_json(content, draw: random.Random, sentinel: Path):
    """A JSON value with one thing changed."""
    content = copy.deepcopy(content)
    ways = places(content)
    if not ways or draw.random() < 0.03:
        return hostile(draw, sentinel)
    *way, last = draw.choice(ways)
    owner = content
    for name in way:
        owner = owner[name]
    what = draw.randrange(5)
    if what == 0:
        del owner[last]
    elif what == 1 and isinstance(owner, dict):
        owner[f"{last}x"] = owner.pop(last)
    elif what == 2 and isinstance(owner[last], (int, float)):
        owner[last] = owner[last] * draw.choice([-1, 2, 10**6]) + draw.choice([-1, 1])
    elif what == 3:
        owner[last] = [owner[last]]
    else:
        owner[last] = hostile(draw, sentinel)
    return content


def in_bytes(data: bytes, draw: random.Random, sentinel: Path) -> bytes:
    """Bits flipped, bytes cut off, put in, or all of them replaced."""
    changed = bytearray(data)
    what = draw.randrange(6)
    if what < 2:
        for _ in range(draw.choice([1, 1, 1, 8])):
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    elif what == 2:
        del changed[draw.randrange(len(changed)) :]
    elif what == 3:
        place = draw.randrange(len(changed))
        changed[place:place] = draw.randbytes(draw.choice([1, 3, 100]))
    elif what == 4:
        return draw.choice([b"", b"\0" * 100, b"[" * 100_000, b"{}", b"null", b"\xff\xfe", draw.randbytes(500)])
    else:
        return pickle.dumps(Hostile(sentinel))
    return bytes(changed)


def in_json(data: bytes, draw: random.Random, sentinel: Path) -> bytes:
    """A JSON file with another value, or with damaged bytes."""
    if draw.random() < 0.2:
        return in_bytes(data, draw, sentinel)
    return json.dumps(damaged_json(json.loads(data), draw, sentinel)).encode()


def in_lines_of_json(data: bytes, draw: random.Random, sentinel: Path) -> bytes:
    lines = data.split(b"\n")[:-1]
    number = draw.randrange(len(lines))
    lines[number] = in_json(lines[number], draw, sentinel)
    return b"\n".join([*lines, b""])


def in_header(data: bytes, draw: random.Random, sentinel: Path) -> bytes:
    """A safetensors file whose header says something else."""
    length = struct.unpack("<Q", data[:8])[0]
    header, rest = data[8 : 8 + length], data[8 + length :]
    what = draw.random()
    if what < 0.5:
        return in_bytes(data[: 8 + length], draw, sentinel) + rest
    if what < 0.6:
        return struct.pack("<Q", draw.choice([0, 1, length - 1, 2**31, 2**63])) + header + rest
    if what < 0.7:
        header = header.replace(b'"F32"', draw.choice([b'"I32"', b'"U32"', b'"F16"', b'"BOOL"']), draw.choice([1, -1]))
    else:
        header = json.dumps(damaged_json(json.loads(header), draw, sentinel)).encode()
    return struct.pack("<Q", len(header)) + header + rest


def in_signed(data: bytes, draw: random.Random, sentinel: Path) -> bytes:
    """A safetensors file with a checksum, damaged anywhere; where there is none, nobody can tell a flipped bit."""
    return draw.choice([in_bytes, in_header])(data, draw, sentinel)


def in_text(data: bytes, draw: random.Random, sentinel: Path) -> bytes:
    """A text with hostile lines, or with damaged bytes."""
    if draw.random() < 0.4:
        return in_bytes(data, draw, sentinel)
    code = f"!!python/object/apply:os.mkdir [{sentinel}]"
    added = [
        f"call: {code}",
        f"seed: {code}",
        "a: &a [x,x]\nb: [*a,*a]",
        "steps: 2020-99-99",
        "- 1",
        "{" * 2000,
        "model: !!int x",
    ]
    added += ["call: {date: 2020-01-01}", "? [a]\n: b", "ratio: .nan", "\t\t\t", '"', "x\x85y", "x\u2028y", "a\0b"]
    lines = data.decode().split("\n")
    lines.insert(draw.randrange(len(lines) + 1), draw.choice(added))
    return "\n".join(lines).encode()


def weights_of(pipe) -> dict:
    """Classes and weights of all components."""
    found = {}
    for name, part in pipe.components.items():
        found[name] = [type(part).__name__]
        if isinstance(part, torch.nn.Module):
            found[name].append(weights_hash(part))
    return found


class Healthy:
    """A folder with a file of each kind, as the library writes it, and how each is read."""

    def __init__(self, place: Path):
        self.place, self.dense = place, tiny_sd()
        self.sentinel = place.parent / "sentinel"
        torch.manual_seed(0)
        pipe = prune(self.dense, random_mask(denoiser(self.dense)))
        pipe.save_pretrained(place / "pipe")
        for folder in (place / "pipe", place / "pipe" / "unet", place):
            (folder / "evil.py").write_text(f"import os\nos.mkdir({str(self.sentinel)!r})\nclass Evil: pass\n")
        self.pruned = type(pipe.unet)
        self.config = json.loads((place / "pipe" / "unet" / "config.json").read_text())
        self.gates = Gates.start(find_sites(denoiser(self.dense)), 1.0)
        self.gates.history = [{"update": 1, "loss": 0.5}]
        self.gates.save(place / "gates.safetensors")
        save_scores(place / "scores.safetensors", self.gates.scores(), method="random")
        self.run = {"scheduler": {"class": "DDIMScheduler"}, "prompts": "x", "config": {"seed": 0}}
        optimizer = torch.optim.Adam(self.gates.log_alpha.values())
        sum(value.sum() for value in self.gates.log_alpha.values()).backward()
        optimizer.step()
        with Folder(place / "run", self.run) as folder:
            folder.save_state(self.gates, optimizer)
            folder.save_teacher(torch.randn(2, 4, 8, 8), 1.0)
        with ImageFolder(place / "images", About(["a cat", "a \u2028 dog"], [0, 1], {"steps": 2}, "m", "w")) as images:
            for number in range(2):
                images.write(number, torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8))
        for number in range(2):
            records.measure({"n": number, "x": [1, "y"]}, lambda: {"ssim": [0.25, 0.5]}, name="rows", folder=place)
        (place / "list.txt").write_text("a cat\na dog\n\na house\n")
        (place / "list.tsv").write_text("prompt\tsource\na cat\tx\na dog\ty\n")
        (place / "list.json").write_text(json.dumps({"annotations": [{"caption": "a cat"}, {"caption": "a dog"}]}))
        (place / "list.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": "a dog"}\n')
        (place / "settings.yaml").write_text("model: m\nprompts: p.txt\nsteps: 2\nout: images\ncall: {height: 16}\n")

    def targets(self) -> list[Target]:
        index = [Target(f"pipe/{name}", in_json, self.pipeline, 1) for name in self._configs()]
        index.append(Target("pipe/text_encoder/model.safetensors", in_header, self.pipeline, 1))
        lists = [
            Target(f"list.{kind}", in_text, self.prompts(f"list.{kind}"), 2, same=False) for kind in ("txt", "tsv")
        ]
        lists += [
            Target(f"list.{kind}", in_json_lines, self.prompts(f"list.{kind}"), 2, same=False)
            for kind, in_json_lines in (("json", in_json), ("jsonl", in_lines_of_json))
        ]
        return [
            *index,
            *lists,
            Target("pipe/unet/config.json", in_json, self.unet, 8),
            Target(f"pipe/unet/{WEIGHTS}", in_header, self.unet, 8),
            Target("pipe/unet/config.json", self.in_kept_units, self.from_config, 8),
            Target("gates.safetensors", in_signed, self.read_gates, 8),
            Target("scores.safetensors", in_signed, self.read_scores),
            Target("run/state.safetensors", in_signed, self.state, 8),
            Target("run/teacher.safetensors", in_signed, self.teacher),
            Target("images/images.json", in_json, self.images, 8),
            Target("images/00001.png", in_bytes, self.images),
            Target("rows.jsonl", in_lines_of_json, self.rows, 8),
            Target("settings.yaml", in_text, self.settings, 8, same=False),
        ]

    def _configs(self) -> list[str]:
        names = ["model_index.json", "model_index.json", "scheduler/scheduler_config.json", "vae/config.json"]
        return [*names, "text_encoder/config.json", "tokenizer/tokenizer_config.json", "unet/config.json"]

    def in_kept_units(self, data: bytes, draw: random.Random, sentinel: Path) -> bytes:
        config = json.loads(data)
        told = damaged_json({name: config[name] for name in ("kept_units", "pruned_units")}, draw, sentinel)
        if not isinstance(told, dict):
            told = {"kept_units": told}
        return json.dumps({name: config[name] for name in config if "units" not in name} | told).encode()

    def pipeline(self, place: Path):
        return weights_of(ecodiff.load(place / "pipe"))

    def unet(self, place: Path):
        return weights_hash(self.pruned.from_pretrained(place / "pipe" / "unet"))

    def from_config(self, place: Path):
        model = self.pruned.from_config(json.loads((place / "pipe" / "unet" / "config.json").read_text()))
        return {name: list(value.shape) for name, value in model.state_dict().items()}

    def read_gates(self, place: Path):
        gates = Gates.load(place / "gates.safetensors", denoiser(self.dense))
        return {name: value.tolist() for name, value in gates.log_alpha.items()}, gates.distribution, gates.history

    def read_scores(self, place: Path):
        scores = load_scores(place / "scores.safetensors", denoiser(self.dense))
        return {name: value.tolist() for name, value in scores.items()}

    def state(self, place: Path):
        gates = Gates.start(self.gates.sites, 1.0)
        with Folder(place / "run", self.run) as folder:
            folder.load_state(gates, torch.optim.Adam(gates.log_alpha.values()))
        return {name: value.tolist() for name, value in gates.log_alpha.items()}, gates.history

    def teacher(self, place: Path):
        with Folder(place / "run", self.run) as folder:
            return folder.load_teacher()[0].tolist()

    def images(self, place: Path):
        images, about = read_images(place / "images")
        return images.tolist(), about

    def rows(self, place: Path):
        return [(row["key"], row["values"]) for row in records.rows("rows", place)]

    def prompts(self, name: str) -> Callable[[Path], object]:
        def read(place: Path):
            return read_prompts(place / name)

        return read

    def settings(self, place: Path):
        arguments = with_settings_file(["--settings", str(place / "settings.yaml")], "generate")
        try:
            return vars(make_parser(["generate"]).parse_args(["generate", *arguments]))
        except SystemExit:  # argparse has said what it does not understand
            raise EcoDiffError("not understood") from None


@contextlib.contextmanager
def limited(seconds: float):
    """Raises Hang in what takes longer."""

    def late(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fuzz(number: int, seed: int = 0, only: Callable[[Target], bool] = lambda target: True):
    """Read so many damaged files; returns what was wrong, a line each, and {file: Counter of outcomes}."""
    wrong: list[str] = []
    counts: dict[str, Counter] = {}
    with tempfile.TemporaryDirectory(prefix="fuzzed-") as top, contextlib.chdir(top):
        place = Path(top) / "healthy"
        place.mkdir()
        healthy = Healthy(place)
        targets = [target for target in healthy.targets() if only(target)]
        expected: dict[int, object] = {}
        for case in range(number):
            draw = random.Random(f"{seed} {case}")
            target = draw.choices(targets, [each.weight for each in targets])[0]
            if id(target) not in expected:
                expected[id(target)] = repr(quietly(target.read, place))
            file = place / target.file
            content = file.read_bytes()
            damaged = target.damage(content, draw, healthy.sentinel)
            file.write_bytes(damaged)
            name = f"{target.file} (case {case} of seed {seed})"
            try:
                with limited(LIMIT):
                    found = repr(quietly(target.read, place))
                outcome = "as it was" if found == expected[id(target)] else "changed"
                if outcome == "changed" and target.same:
                    wrong.append(f"{name}: comes out otherwise without a word")
            except EcoDiffError as error:
                outcome = "refused"
                if not str(error).strip():
                    wrong.append(f"{name}: refused without a word")
            except Hang:
                outcome = "hangs"
                wrong.append(f"{name}: takes more than {LIMIT} seconds")
            except (Exception, SystemExit) as error:
                outcome = type(error).__name__
                wrong.append(f"{name}: {outcome}: {str(error)[:200]!r}")
            finally:
                file.write_bytes(content)
            if healthy.sentinel.exists():
                wrong.append(f"{name}: ran code")
                shutil.rmtree(healthy.sentinel)
            counts.setdefault(target.file, Counter())[outcome] += 1
    return wrong, counts


def quietly(read: Callable[[Path], object], place: Path):
    """What is read, with nothing printed."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        return read(place)
