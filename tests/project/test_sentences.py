"""The report on long sentences finds them in prose, and only there."""

import pytest

from ecodiff.lab.book import sentences

LONG = " ".join(["word"] * 36)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"Short. A {LONG}. Short.", [37]),
        ("A\n" + "\n".join(["word"] * 36) + ".", [37]),  # over many lines
        (f"- {LONG}\n- {LONG}", [36, 36]),
        (f"- A {LONG[:79]}\n- A {LONG[:79]}", []),  # two items are two sentences
        (f"See {{ref}}`a long title of it <label>` and `x = 1 + 2` and $a + b$ {LONG[:120]}", []),
        (f"[{LONG}](https://example.org)", [36]),
        (f"It is so (Fig. 3, e.g. on A. Author). {LONG[:130]}", []),
        (f"The scores are {LONG[:100]} 6 and\n4. The rest is {LONG[:100]}", []),
        (f"It is `{LONG}`. `That` is {LONG[:79]} {LONG[:60]}", []),
        (f"Is it? {LONG[:79]}! {LONG[:79]}.", []),
    ],
)
def test_sentences_of_prose_are_counted(text, words):
    assert [number for number, _ in sentences.long_sentences(text)] == words


@pytest.mark.parametrize(
    "text",
    [
        f"```python\n{LONG}\n```",
        f"# {LONG}",
        f"| {LONG} |",
        f"$$\n{LONG}\n$$",
        f":label: {LONG}",
        f"---\ntitle: {LONG}\n---\n",
        f"````{{note}}\n```python\n{LONG}\n```\n{LONG}\n````",
    ],
)
def test_what_is_no_prose_does_not_count(text):
    assert sentences.long_sentences(text) == []


def test_the_report_names_pages_and_counts(tmp_path):
    (tmp_path / "book").mkdir()
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "01_one.md").write_text(f"# One\n\n{LONG}.\n")
    (tmp_path / "book" / "index.md").write_text("Short.\n")
    lines = sentences.report(tmp_path)
    assert lines[0].endswith("01_one.md: 1") and lines[1].startswith("    36 words: word word")
    assert lines[-1] == "1 sentences have more than 35 words."
