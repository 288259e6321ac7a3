"""What `make book` does, as doit tasks: a notebook runs again when the content (not the date) of something it reads
has changed; the HTML is built again when a page, a source or the settings have. Called by the Makefile as

    doit profile=PROFILE out=OUT
"""

import os
from pathlib import Path

from doit import Globals, get_var
from doit.exceptions import TaskFailed
from doit.reporter import ConsoleReporter
from doit.tools import config_changed

from ecodiff.errors import EcoDiffError
from ecodiff.lab.book import build
from ecodiff.storage.paths import data_dir

ROOT = Path(__file__).resolve().parent
PROFILE = get_var("profile", "default")
OUT = Path(get_var("out", "_build")).resolve()


class Reporter(ConsoleReporter):
    """Also writes down at once which chapter is done: doit does so as it ends, and a killed build would begin anew."""

    def add_success(self, task):
        super().add_success(task)
        state = Globals.dep_manager.backend
        place, state.name = state.name, f"{state.name}.new"
        try:
            state.dump()
            os.replace(state.name, place)
        finally:
            state.name = place


DOIT_CONFIG = {
    "reporter": Reporter,
    "default_tasks": ["html"],
    "backend": "json",
    "dep_file": str(OUT / ".doit.json"),
    "continue": True,
    "verbosity": 2,
}

OUT.mkdir(parents=True, exist_ok=True)


def attempt(function, *arguments):
    """An expected error becomes a message; anything else keeps its traceback."""
    try:
        function(*arguments)
    except EcoDiffError as error:
        return TaskFailed(str(error))


def task_notebook():
    """run a chapter with papermill and write its page"""
    for source in build.sources(ROOT):
        reads = [source, build.profile_file(PROFILE, ROOT), ROOT / "environment.yml"]
        makes = build.declared(source, PROFILE, "makes")
        yield {
            "name": source.stem,
            "actions": [(attempt, [build.run, source, PROFILE, OUT])],
            "file_dep": [*reads, *build.code(source, ROOT), *build.declared(source, PROFILE, "data")],
            "targets": [OUT / "notebooks" / f"{source.stem}.ipynb", *makes],
            "uptodate": [config_changed(PROFILE)],
        }


def task_html():
    """build the HTML, warnings being errors"""
    pages = [OUT / "notebooks" / f"{source.stem}.ipynb" for source in build.sources(ROOT)]
    written = [p for p in (ROOT / "book").rglob("*") if p.is_file()]
    written.append(data_dir() / "results" / "support.json")  # of which a page is made
    return {
        "actions": [(attempt, [build.build_html, OUT, ROOT])],
        "file_dep": [*pages, *sorted(written), ROOT / "_config.yml", ROOT / "environment.yml", *build.code(base=ROOT)],
        "targets": [OUT / "html" / "index.html"],
    }
