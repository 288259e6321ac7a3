"""One command for all: ``python -m ecodiff COMMAND``; see ``--help``.

A command is a module with three names: its docstring's first line says what the command does, `add_arguments` tells
argparse what it takes, and `run` does it. `run` returns an exit code, or what it found as a dict, which is printed
here. Commands of the lab are there where the lab is: a wheel has none.

Results go to standard output; what a run says meanwhile goes to standard error, with bars on a terminal only.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Collection
from types import ModuleType

from . import processes
from .commands.options import with_settings_file
from .errors import EcoDiffError

LIBRARY = {
    "learn": "ecodiff.commands.learn",
    "score": "ecodiff.commands.score",
    "prune": "ecodiff.commands.prune",
    "compensate": "ecodiff.commands.compensate",
    "retrain": "ecodiff.commands.retrain",
    "generate": "ecodiff.commands.generate",
    "evaluate": "ecodiff.commands.evaluate",
    "compare": "ecodiff.commands.compare",
    "cost": "ecodiff.commands.cost",
    "push": "ecodiff.commands.push",
    "published": "ecodiff.commands.published",
}
LAB = "ecodiff.lab.commands"

SHARE_WORK = ("learn", "generate", "evaluate", "study")
"""Commands that a launcher may start in several processes, which then share the work."""

DONE, WRONG, INTERRUPTED = 0, 2, 130  # exit codes; argparse also ends with 2 where it understands no argument


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code. What a user can put right is one line on standard error."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    command = arguments[0] if arguments else None
    try:
        if command in LIBRARY:
            arguments = [command, *with_settings_file(arguments[1:], command)]
        options = make_parser([command]).parse_args(arguments)
        if processes.count() > 1:
            _refuse_many(options.command)
        found = options.run(options)
        if isinstance(found, int):
            return found
        if not processes.is_first():
            return DONE
        print(json.dumps(found, indent=1) if options.json else in_lines(found))
    except EcoDiffError as error:
        where = "" if processes.is_first() else f" in process {processes.rank()}"
        print(f"error{where}: {error}", file=sys.stderr)
        return WRONG
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough. Python flushes standard output once more at exit, which must not
        # fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where it can", file=sys.stderr)
        return INTERRUPTED
    return DONE


def _refuse_many(command: str) -> None:
    """EcoDiffError in a run of several processes for a command that does not share its work among them."""
    if command not in SHARE_WORK:
        raise EcoDiffError(
            f"{command} runs in one process, not in {processes.count()}: start it without a launcher. "
            f"Work is shared by {', '.join(SHARE_WORK)}."
        )
    if not processes.is_first():
        warnings.simplefilter("ignore")  # the first process warns for all


def make_parser(names: Collection[str | None] | None = None) -> argparse.ArgumentParser:
    """The parser of all commands that are installed, with the options of those that are named (None: of all).

    Options may need slow imports, so that the other commands only get their names and what they do.
    """
    parser = argparse.ArgumentParser(
        prog="python -m ecodiff", description="Learned structural pruning of diffusers pipelines."
    )
    choices = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in commands().items():
        what = (module.__doc__ or "").splitlines()[0]
        own = choices.add_parser(
            name, help=what, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if names is not None and name not in names:
            continue
        module.add_arguments(own)
        if name in LIBRARY:
            add_common(own)
        own.set_defaults(run=module.run)
    return parser


def add_common(parser: argparse.ArgumentParser) -> None:
    """What all commands of the library take."""
    parser.add_argument("--settings", metavar="FILE", help="YAML file with options; the command line wins")
    if not any("--json" in action.option_strings for action in parser._actions):
        parser.add_argument("--json", action="store_true", help="print what was found as JSON")


def in_lines(found: dict) -> str:
    """What a command found, a line each."""
    lines = []
    for name, value in found.items():
        if isinstance(value, dict) and {"mean", "low", "high"} <= value.keys():
            value = f"{value['mean']:.4g} (95 % interval {value['low']:.4g} to {value['high']:.4g})"
        elif isinstance(value, float):
            value = f"{value:.4g}"
        elif isinstance(value, int) and not isinstance(value, bool):
            value = f"{value:,}"
        lines.append(f"{name}: {value}")
    return "\n".join(lines)


def commands() -> dict[str, ModuleType]:
    """Name -> module of each command."""
    names = dict(LIBRARY)
    if importlib.util.find_spec("ecodiff.lab") is not None:
        names |= importlib.import_module(LAB).COMMANDS
    return {name: importlib.import_module(module) for name, module in names.items()}


if __name__ == "__main__":
    code = main()
    if code == DONE:
        processes.leave()
    sys.exit(code)
