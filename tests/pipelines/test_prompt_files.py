"""Prompts as the data sets of the field have them: forms, choices, and what is wrong with a file."""

import json

import pytest

from ecodiff import EcoDiffError, read_prompts

COCO = {
    "info": {},
    "images": [{"id": 1, "file_name": "1.jpg"}],
    "annotations": [{"image_id": 1, "id": 5, "caption": "A cat.\n"}, {"image_id": 1, "id": 6, "caption": " A dog"}],
}
FLICKR = {"images": [{"sentences": [{"raw": "A cat."}, {"raw": "A dog"}], "split": "test"}]}

FORMS = {
    "list.txt": "A cat.\n\nA dog\n",
    "gcc.tsv": "A cat.\thttp://a.b/1.jpg\nA dog\thttps://a.b/2.jpg\n",
    "parti.tsv": "Prompt\tCategory\tNote\nA cat.\tAbstract\t\nA dog\tAnimals\t\n",
    "results.token": "1.jpg#0\tA cat.\n1.jpg#1\tA dog\n",
    "results.csv": "image_name| comment_number| comment\n1.jpg| 0| A cat.\n1.jpg| 1| A dog\n",
    "table.csv": "id,Caption\n1,A cat.\n2,A dog\n",
    "captions.json": json.dumps(COCO),
    "flickr.json": json.dumps(FLICKR),
    "plain.json": json.dumps(["A cat.", "A dog"]),
    "rows.jsonl": '{"text": "A cat."}\n{"text": "A dog"}\n',
    "strings.jsonl": '"A cat."\n"A dog"\n',
}


@pytest.mark.parametrize("name", FORMS)
def test_each_form_gives_its_prompts(name, tmp_path):
    (tmp_path / name).write_text(FORMS[name], encoding="utf-8")
    assert read_prompts(tmp_path / name) == ["A cat.", "A dog"]


def test_a_quote_in_a_tsv_is_a_quote_and_in_a_csv_it_may_hold_a_comma(tmp_path):
    (tmp_path / "gcc.tsv").write_text('the " sign\thttp://a.b\nanother\thttp://a.b\n')
    assert read_prompts(tmp_path / "gcc.tsv") == ['the " sign', "another"]
    (tmp_path / "table.csv").write_text('prompt,n\n"a cat, a dog",1\n')
    assert read_prompts(tmp_path / "table.csv") == ["a cat, a dog"]


def test_malformed_entries_are_counted_reported_and_skipped(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "A cat."}\n{"text": \n{"label": 3}\n{"text": "  "}\n{"text": "A dog"}\n')
    assert read_prompts(path) == ["A cat.", "A dog"]
    assert "3 of 5 entries skipped: 1 empty, 2 without a prompt" in capsys.readouterr().err


def test_a_number_of_prompts_is_the_first_ones_or_a_choice_by_a_seed(tmp_path):
    path = tmp_path / "list.txt"
    everything = [f"prompt {number}" for number in range(50)]
    path.write_text("\n".join(everything))
    assert read_prompts(path, count=3) == everything[:3]
    chosen = read_prompts(path, count=10, seed=1)
    assert chosen == read_prompts(path, count=10, seed=1) != read_prompts(path, count=10, seed=2)
    assert len(set(chosen)) == 10 and chosen == sorted(chosen, key=everything.index) and chosen != everything[:10]


def test_a_local_data_set_is_read_by_split_and_column(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "train.jsonl").write_text('{"title": "A cat.", "n": 1}\n{"title": "A dog", "n": 2}\n')
    source = f"datasets:{tmp_path}:train"
    assert read_prompts(f"{source}:title") == read_prompts(source, column="title") == ["A cat.", "A dog"]
    with pytest.raises(EcoDiffError, match="It has title, n"):
        read_prompts(source)
    with pytest.raises(EcoDiffError, match="splits"):
        read_prompts(f"datasets:{tmp_path}")


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("list.txt", "\n \n", "holds no prompt"),
        ("table.csv", "a,b,c\n1,2,3\n", "which column"),
        ("captions.json", "{", "no .json file"),
        ("captions.json", '{"a": 1}', "no list of prompts"),
        ("deep.json", "[" * 100_000, "no .json file"),
    ],
)
def test_a_file_of_another_form_is_one_sentence(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(EcoDiffError, match=message):
        read_prompts(tmp_path / name)


def test_too_few_prompts_and_columns_that_are_not_there_are_named(tmp_path):
    (tmp_path / "table.csv").write_text("prompt,n\na cat,1\n")
    with pytest.raises(EcoDiffError, match="2 prompts were asked for, and there are 1"):
        read_prompts(tmp_path / "table.csv", count=2)
    with pytest.raises(EcoDiffError, match="no column 'title'"):
        read_prompts(tmp_path / "table.csv", column="title")
