"""Every command that a text prints is one that the parser takes."""

import re
import shlex

import pytest
from test_names import TEXTS

from ecodiff.__main__ import make_parser

STAND_INS = {
    "{preset}": "sdxl",
    "{model}": "openmoji-sdxl",
    "{name}": "openmoji-sdxl",
    "{folder.name}": "openmoji-sdxl",
    "{DEFAULT}": "openmoji-clip",
    "$id": "openmoji-sdxl",
    "ID": "openmoji-sdxl",
    "{samples}": "4",
    "{study}": "main",
    '"$((16#$(git rev-parse --short=6 HEAD | cut -c1-6)))"': "7",
    "$SLURM_ARRAY_TASK_ID": "2",
    "$SLURM_NODEID": "1",
    "$HEAD": "localhost",
}
"""What stands in a text where a command has a value -> such a value."""


def filled(text: str) -> str:
    """A text with values in the places of its placeholders."""
    for placeholder, value in STAND_INS.items():
        text = re.sub(rf"(?<!\w){re.escape(placeholder)}(?!\w)", value, text)
    return text


def printed() -> list[str]:
    """The arguments of each command in README, pages, chapters, cards, docstrings and error messages."""
    commands = set()
    for path in TEXTS:
        if "tests" in path.parts:
            continue
        text = filled(path.read_text(encoding="utf-8"))
        for arguments in re.findall(r"(?:python|\$\(PY\)|(?:accelerate launch|torchrun) .*) -m ecodiff (.*)", text):
            # A command ends with its quotes, its sentence, a comment, the next command, or the next column.
            commands.add(re.split(r"[`\"')|]|\.$|\. | # | && | > |  ", arguments)[0].strip())
    return sorted(commands - {"COMMAND", "COMMAND --help"})


@pytest.mark.parametrize("command", printed())
def test_a_printed_command_is_understood(command):
    options = make_parser().parse_args(shlex.split(command))
    assert callable(options.run)


def launches() -> list[str]:
    """What texts give to ``accelerate launch``: its own arguments, and the module."""
    found = set()
    for path in TEXTS:
        text = filled(path.read_text(encoding="utf-8"))
        found |= set(re.findall(r"accelerate launch (--.* -m ecodiff) ", text))
    return sorted(found)


@pytest.mark.parametrize("arguments", launches())
def test_a_printed_launch_is_one_that_accelerate_takes(arguments):
    from accelerate.commands.launch import launch_command_parser

    options = launch_command_parser().parse_args(shlex.split(arguments))
    assert options.module and options.training_script == "ecodiff" and options.multi_gpu
    assert options.num_processes % (options.num_machines or 1) == 0


def test_many_commands_are_printed():
    """The search finds them: one of each kind at least."""
    kinds = {command.split()[0] for command in printed()}
    assert kinds >= {"cost", "study", "zoo", "book", "benchmark"}
    assert len(launches()) >= 2
