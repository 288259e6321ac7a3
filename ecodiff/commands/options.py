"""What commands share: the model, the prompts, settings that are dataclasses, and settings from a YAML file.

The fields of a settings class (`LearnConfig`, `Sampling`, `RetrainConfig`) become options of the same names, so that a
new field is a new option. Values are checked twice: by argparse for their form, by the class for their meaning.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import itertools
import json
import os
import re
import sys
import tempfile
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, replace
from pathlib import Path
from typing import Any

from ecodiff import processes
from ecodiff.errors import EcoDiffError
from ecodiff.method.multiples import MULTIPLES
from ecodiff.storage.paths import checked_path

CALL = "further arguments of the pipeline's call, such as height=1024 width=1024 max_sequence_length=256"


def add_model(parser: argparse.ArgumentParser, name: str = "model", **more) -> None:
    """A pipeline and how it is loaded."""
    parser.add_argument(name, help="an embedded pipeline (openmoji-sdxl), a folder, or a Hub id", **more)
    parser.add_argument("--dtype", help="dtype of the weights: bf16, fp16 or fp32 (default: as diffusers loads them)")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--variant", help="variant of the weight files, such as fp16")
    parser.add_argument("--offload", action="store_true", help="components are on the device one at a time")


def load_model(options: argparse.Namespace, name: str | None = None, runs: bool = True):
    """The pipeline that the options name; components of another model come with it.

    Raises EcoDiffError, before anything is fetched where a published model is known not to fit into memory. ``runs``:
    whether its networks will run; otherwise the device need not hold them.
    """
    import diffusers
    import transformers

    from ecodiff.cost.room import Machine, check_room
    from ecodiff.pipelines.loading import load

    if not sys.stderr.isatty() or not processes.is_first():  # a log stays quiet
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    arguments = {}
    for argument in ("dtype", "revision", "variant"):
        value = getattr(options, argument)
        if value is not None:
            arguments[argument] = value
    model = options.model if name is None else name
    machine = Machine.this()
    if not runs:
        machine = replace(machine, device=None)
    check_room(model, dtype=options.dtype, offload=options.offload, machine=machine)
    return load(model, offload=options.offload, **arguments)


def add_prompts(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """The file of prompts, and how many of them."""
    parser.add_argument(
        "--prompts",
        required=required,
        metavar="FILE",
        help="text with one prompt a line, TSV, CSV, JSON (MS COCO, GCC3M, Flickr30k, PartiPrompts), or "
        "datasets:ID:SPLIT:COLUMN",
    )
    parser.add_argument("--column", help="the column with the prompts, where it has no usual name")
    parser.add_argument("--count", type=whole_number, metavar="N", help="so many prompts (default: all)")
    parser.add_argument(
        "--choose", type=int, metavar="SEED", help="a random choice of --count prompts (default: the first)"
    )


def read(options: argparse.Namespace) -> list[str]:
    """The prompts that the options name. Raises EcoDiffError where there are none, or fewer than asked for."""
    from ecodiff.pipelines.prompt_files import read_prompts

    return read_prompts(options.prompts, column=options.column, count=options.count, seed=options.choose)


def add_mask(parser: argparse.ArgumentParser) -> None:
    """Scores, and the mask that is made of them."""
    parser.add_argument(
        "--scores",
        required=True,
        metavar="FILE",
        help="what `learn` or `score` wrote, of the same model; published:NAME for published λ (see `published`)",
    )
    parser.add_argument("--ratio", type=float, required=True, help="share of units to remove, such as 0.2")
    parser.add_argument(
        "--scope", choices=("kind", "global", "local"), default="kind", help="which units compete (default: kind)"
    )
    parser.add_argument(
        "--of",
        dest="count_of",
        choices=("units", "parameters"),
        default="units",
        help="what the ratio is a share of (default: units)",
    )
    add_round_to(parser)


def add_round_to(parser: argparse.ArgumentParser) -> None:
    """What the number of units kept in a site is rounded up to."""
    names = ", ".join(MULTIPLES)
    parser.add_argument(
        "--round-to",
        type=_multiple,
        default=1,
        metavar="N",
        help=f"round units kept in a site up to a multiple of N, or to what kernels need: {names}",
    )


def read_mask(options: argparse.Namespace, pipe) -> dict:
    """The mask that the options describe, {site: bool [units]}. Raises EcoDiffError for scores of another model."""
    from ecodiff.method.mask import make_mask
    from ecodiff.method.sites import KINDS, find_sites
    from ecodiff.pipelines.parts import denoiser
    from ecodiff.scores.files import load_scores

    scores = load_scores(options.scores, denoiser(pipe))
    sites = find_sites(denoiser(pipe), KINDS)
    return make_mask(scores, sites, options.ratio, options.scope, options.count_of, options.round_to)


def made_by(options: argparse.Namespace, **more) -> dict:
    """How a pruned pipeline is made, for the file beside it: the model, its scores, and what was asked for."""
    from ecodiff.hub.made import public_name
    from ecodiff.scores.files import about_scores

    about = {"scores": about_scores(options.scores), "ratio": options.ratio, "scope": options.scope}
    about |= {"of": options.count_of, "round_to": options.round_to, **more}
    base = public_name(options.model)
    if base is not None:
        about["base"] = base
    return about


def check_target(path: str | os.PathLike, folder: bool = False) -> Path:
    """The path of a result; raises EcoDiffError, before any work, where it could not be written."""
    path = checked_path(path, "--out")
    parent = path.parent
    # os.path, since a Path raises where nobody may look.
    if not os.path.isdir(parent):
        raise EcoDiffError(f"--out {path}: there is no folder {parent}; make it first.")
    if folder and os.path.exists(path) and not os.path.isdir(path):
        raise EcoDiffError(f"--out {path}: this is a file, and a folder is written; choose another name.")
    if not folder and os.path.isdir(path):
        raise EcoDiffError(f"--out {path}: this is a folder, and a file is written; choose another name.")
    place = path if os.path.isdir(path) else parent
    try:
        # Whether a file can be made is only known by trying: permissions do not tell of a read-only disk. Under a
        # longer name than the result's, since it is written under such a one first.
        with tempfile.NamedTemporaryFile(dir=place, prefix=f".{path.name}.{30 * '0'}."):
            pass
    except OSError as error:
        raise EcoDiffError(f"--out {path}: cannot be written to ({error.strerror}); choose another place.") from error
    return path


def add_fields(parser: argparse.ArgumentParser, cls: type, leave_out: Sequence[str] = ()) -> None:
    """An option for each field of a settings class but those left out; one that is not given stays at its default."""
    group = parser.add_argument_group(f"settings ({cls.__name__})")
    hints = typing.get_type_hints(cls)
    texts = _first_sentences(cls)
    for field in fields(cls):
        if field.name in leave_out:
            continue
        hint = hints[field.name]
        flag = "--" + field.name.replace("_", "-")
        arguments: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": field.name}
        arguments["help"] = " ".join([texts.get(field.name, ""), _default(field)]).strip().replace("%", "%%")
        if hint is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **arguments)
        elif field.name == "call":
            arguments["help"] = CALL
            group.add_argument(flag, action=Pairs, nargs="+", metavar="NAME=VALUE", **arguments)
        elif typing.get_origin(hint) is tuple:
            group.add_argument(flag, nargs="+", **arguments)
        else:
            group.add_argument(flag, type=_parser_of(hint), metavar=field.name.upper(), **arguments)


def settings_from(options: argparse.Namespace, cls: type):
    """The settings class with the options that were given. Raises EcoDiffError as the class does."""
    return cls(**given_fields(options, cls))


def given_fields(options: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The fields of a settings class that were given, name -> value."""
    given = {}
    for field in fields(cls):
        if hasattr(options, field.name):
            value = getattr(options, field.name)
            given[field.name] = tuple(value) if isinstance(value, list) else value
    return given


def whole_number(text: str) -> int:
    """A whole number of at least one, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 1")
    return number


def _multiple(text: str) -> int | str:
    """A whole number of at least one, or the name of what needs a multiple."""
    if text in MULTIPLES:
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number and none of {', '.join(MULTIPLES)}")
    return whole_number(text)


class Pairs(argparse.Action):
    """NAME=VALUE pairs as a dict; values are read as JSON where they can be, and are text elsewhere."""

    def __call__(self, parser, namespace, values, option_string=None):
        pairs = dict(getattr(namespace, self.dest, None) or {})
        for text in values:
            name, equals, value = text.partition("=")
            if not equals or not name:
                parser.error(f"argument {option_string}: write NAME=VALUE, not {text!r}")
            pairs[name] = _value(value)
        setattr(namespace, self.dest, pairs)


def with_settings_file(arguments: list[str], command: str) -> list[str]:
    """Command-line arguments with those of ``--settings FILE`` put before them, so that the command line wins.

    The file is YAML: names of options (with - or _) and their values; the name of a positional argument, such as
    ``model``, stands for that argument. Raises EcoDiffError for a file that cannot be read or says something else.
    """
    chosen = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chosen.add_argument("--settings")
    known, rest = chosen.parse_known_args(arguments)
    if known.settings is None:
        return arguments
    import yaml

    try:
        text = Path(known.settings).read_text(encoding="utf-8")
        if text.count("[") + text.count("{") > MOST_BRACKETS:  # the library's time grows with the square of the depth
            raise ValueError("it nests too deep")
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise ValueError("it has aliases, which can stand for any amount of text")
        content = yaml.safe_load(text)
    # Beside its own errors, the library lets pass what Python raises for a value that is not of the type it names.
    except (
        OSError,
        yaml.YAMLError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise EcoDiffError(f"{known.settings}: these settings cannot be read as YAML: {error}") from error
    if not isinstance(content, Mapping):
        raise EcoDiffError(f"{known.settings}: write one `option: value` a line, such as `ratio: 0.2`.")
    content = {str(name).replace("_", "-"): value for name, value in content.items()}
    if content.pop("command", command) != command:
        raise EcoDiffError(f"{known.settings}: these are settings of another command; its line `command:` says which.")
    try:
        return [*_as_arguments(content), *rest]
    except (TypeError, ValueError, RecursionError) as error:  # a date in the arguments of a call, say
        raise EcoDiffError(f"{known.settings}: a value has no form on the command line ({error}).") from error


MOST_BRACKETS = 200
"""Brackets in a settings file: it holds a handful of lists, and the arguments of a call."""

POSITIONAL = ("method", "model", "first", "second", "repository")
"""Names of positional arguments of all commands, in the order in which a command takes them."""


def _as_arguments(content: Mapping[str, Any]) -> list[str]:
    """The settings of a file as command-line arguments."""
    arguments = [str(content[name]) for name in POSITIONAL if name in content]
    for name, value in content.items():
        if name in POSITIONAL:
            continue
        if value is True or value is False:
            arguments.append(f"--{name}" if value else f"--no-{name}")
        elif name == "call" and isinstance(value, Mapping):
            arguments += ["--call", *(f"{key}={json.dumps(entry)}" for key, entry in value.items())]
        elif isinstance(value, Mapping):
            arguments.append(f"--{name}={json.dumps(value)}")
        elif isinstance(value, list):
            arguments += [f"--{name}", *map(str, value)]
        else:
            arguments.append(f"--{name}={'none' if value is None else value}")
    return arguments


def _default(field: Field) -> str:
    if field.default_factory is not MISSING:
        default = field.default_factory()
    else:
        default = field.default
    if isinstance(default, tuple):
        default = " ".join(map(str, default))
    return f"(default: {'none' if default is None else default})"


def _first_sentences(cls: type) -> dict[str, str]:
    """The first sentence of what a class says of each field, in the string below the field."""
    definition = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(definition, ast.ClassDef)
    sentences = {}
    for statement, below in itertools.pairwise(definition.body):
        if isinstance(statement, ast.AnnAssign) and isinstance(below, ast.Expr):
            assert isinstance(statement.target, ast.Name)
            text = " ".join(ast.literal_eval(below.value).split())
            sentences[statement.target.id] = re.split(r"(?<=[.:]) (?=[A-Z])", text)[0]
    return sentences


def _parser_of(hint: Any) -> Callable[[str], Any]:
    """What argparse makes a value of, for a field's type such as ``int | None``."""
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)

    def parse(text: str):
        if type(None) in choices and text.lower() == "none":
            return None
        value = _value(text)
        if float in choices and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        for choice in choices:
            if choice is str:
                return text
            plain = typing.get_origin(choice) or choice
            if isinstance(value, plain) and not isinstance(value, bool):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {_in_words(choices)}")

    return parse


def _in_words(choices: Sequence[Any]) -> str:
    words = {int: "a whole number", float: "a number", type(None): "none"}
    return " or ".join(words.get(choice, 'JSON such as {"attention": 0.1}') for choice in choices)


def _value(text: str):
    try:
        return json.loads(text)
    except ValueError:
        return text
