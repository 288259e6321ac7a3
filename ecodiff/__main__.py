"""One command for all: ``python -m ecodiff COMMAND``; see ``--help``.

A command is a module with three names: its docstring's first line says what the command does, `add_arguments` tells
argparse what it takes, and `run` does it and returns the exit code. Commands of the lab are there where the lab is: a
wheel has none.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from types import ModuleType

from .errors import EcoDiffError

LIBRARY = {"cost": "ecodiff.cost.command"}
LAB = "ecodiff.lab.commands"

DONE, WRONG, INTERRUPTED = 0, 2, 130  # exit codes; argparse also ends with 2 where it understands no argument


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code. What a user can put right is one line on standard error."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except EcoDiffError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough. Python flushes standard output once more at exit, which must not
        # fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands that are installed."""
    parser = argparse.ArgumentParser(
        prog="python -m ecodiff", description="Learned structural pruning of diffusers pipelines."
    )
    choices = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in commands().items():
        what = (module.__doc__ or "").splitlines()[0]
        own = choices.add_parser(
            name, help=what, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(own)
        own.set_defaults(run=module.run)
    return parser


def commands() -> dict[str, ModuleType]:
    """Name -> module of each command."""
    names = dict(LIBRARY)
    if importlib.util.find_spec("ecodiff.lab") is not None:
        names |= importlib.import_module(LAB).COMMANDS
    return {name: importlib.import_module(module) for name, module in names.items()}


if __name__ == "__main__":
    sys.exit(main())
