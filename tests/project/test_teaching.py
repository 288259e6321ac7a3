"""The pages for teaching: what they point at is there, and the sessions last ninety minutes."""

import re

import pytest

from ecodiff.lab.book import build
from ecodiff.storage.paths import root

BOOK = root() / "book"
PAGES = ("teaching.md", "prerequisites.md", "glossary.md", "notation.md")
CHAPTERS = "\n".join(source.read_text(encoding="utf-8") for source in build.sources())


def page(name: str) -> str:
    return (BOOK / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PAGES)
def test_labels_and_pages_that_are_named_exist(name):
    text = page(name)
    for role, label in re.findall(r"\{(ref|numref|eq|prf:ref)\}`([\w-]+)`", text):
        quoted = rf"(?::label: |:name: |name: |[\"'])({re.escape(label)})(?=[\"'\s])"
        assert re.search(quoted, CHAPTERS), f"{role} {label}"
    for document in re.findall(r"\{doc\}`(?:[^`<]*<)?([\w/-]+)>?`", text):
        paths = (root() / f"{document}.md", BOOK / f"{document}.md")
        assert any(path.exists() for path in paths), document


def test_each_session_lasts_ninety_minutes():
    sessions = re.split(r"^## ", page("teaching.md"), flags=re.M)
    lengths = {}
    for session in sessions:
        if session.startswith("Session"):
            minutes = re.findall(r"^\| (\d+) \|", session, re.M)
            lengths[session.splitlines()[0]] = sum(map(int, minutes))
    assert len(lengths) == 3 and set(lengths.values()) == {90}, lengths


def test_each_prerequisite_is_a_few_sentences_and_a_question():
    sections = re.split(r"^## ", page("prerequisites.md"), flags=re.M)[1:]
    assert len(sections) >= 6
    for section in sections:
        assert section.count("{admonition} Check") == 1, section.splitlines()[0]
        explanation = section.split(":::")[0].split("\n", 1)[1]
        sentences = re.findall(r"[.!?](?=\s|$)", explanation)
        assert 3 <= len(sentences) <= 6, section.splitlines()[0]


def test_the_glossary_is_in_order_and_each_term_is_explained():
    body = re.search(r"```\{glossary\}\n(.*?)\n```", page("glossary.md"), re.S)[1]
    terms = re.findall(r"^(\S.*)\n  (\S.*)$", body, re.M)
    assert len(terms) == len(re.findall(r"^\S", body, re.M))
    names = [term.lower() for term, _ in terms]
    assert names == sorted(names)
    for named in re.findall(r"\{term\}`([^`]+)`", body):
        assert named in [term for term, _ in terms]
