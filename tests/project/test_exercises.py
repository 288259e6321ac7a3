"""Every exercise has a solution; what it says to run is run, and the numbers it states come out."""

import ast
import builtins
import re

import matplotlib
import pytest
import torch
from exercises import build, cells_of, checks, exercises, handed_over, number, own_parameters, run_cells, values_for

from ecodiff.lab.book.exercises import POINTS, UNANSWERED, check, feedback, known, right_and_wrong

ALL = exercises()
RUNS = [
    pytest.param(label, run, id=f"{label}-{i}", marks=[pytest.mark.slow] if run.get("slow") else [])
    for label, runs in checks()["runs"].items()
    for i, run in enumerate(runs)
]
CHECKED = {label: exercise for label, exercise in ALL.items() if exercise.starter}
BY_HAND = [
    pytest.param(label, setting, id=label, marks=[pytest.mark.slow] if handed_over(ALL[label])[1] else [])
    for label, setting in checks()["by_hand"].items()
    if label in CHECKED
]
every = pytest.mark.parametrize("exercise", ALL.values(), ids=list(ALL))
EVASIONS = ("your copy", "try several", "Measure it", "measure it rather", "depends on the site", "see for yourself")


def test_every_exercise_is_run_or_done_by_hand():
    run, by_hand = set(checks()["runs"]), set(checks()["by_hand"])
    assert not run & by_hand
    assert run | by_hand == set(ALL), "each exercise has an entry in exercises.yaml"


@every
def test_an_exercise_that_says_rerun_is_run(exercise):
    assert not exercise.runs or exercise.label in checks()["runs"]


@every
def test_a_solution_answers(exercise):
    assert [words for words in EVASIONS if words in exercise.solution] == []


@pytest.mark.slow
@every
def test_named_parameters_exist_and_are_of_their_type(exercise):
    own = own_parameters(exercise.notebook)
    for name, text in exercise.given:
        assert name in own, f"{exercise.notebook.name} has no parameter {name}"
        assert isinstance(read_as(text, type(own[name])), type(own[name])), f"-p {name} {text}"


@every
def test_every_run_that_is_named_is_executed(exercise):
    own = own_parameters(exercise.notebook)
    executed = [run.get("parameters", {}) for run in checks()["runs"].get(exercise.label, [])]
    for name, text in exercise.given:
        value = read_as(text, type(own[name]))
        assert any(given.get(name) == value for given in executed), f"no run of {exercise.label} has {name} = {text}"


def read_as(text: str, kind: type):
    """A value of a command line as papermill's -p reads it: numbers and truth values as such, all else as text."""
    if kind is str:
        return text
    value = ast.literal_eval(text)
    return float(value) if kind is float and isinstance(value, int) else value


@pytest.mark.slow
@pytest.mark.parametrize(("label", "run"), RUNS)
def test_the_solution_states_what_comes_out(label, run, monkeypatch):
    matplotlib.use("Agg")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    exercise = ALL[label]
    assert run["values"], "a run without a value shows nothing"
    checked = run.get("checked", True) and exercise.starter
    starter = exercise.starter if checked else ""
    names = run_cells(exercise.notebook, run.get("parameters", {}), run.get("cells", []), starter)
    exec(run.get("code", ""), names)
    if checked:
        assert_checked(exercise, names)
    for value in run["values"]:
        found = float(eval(value["is"], names))
        stated = str(value["text"])
        assert stated in exercise.solution, f"the solution does not state {stated} ({value['is']}: {found:.4f})"
        tolerance = value["tolerance"]
        assert abs(found - number(stated)) <= tolerance, f"{value['is']} is {found:.4f}, stated as {stated}"


def assert_checked(exercise, names):
    """The check of an exercise finds the right answers right, and each listed wrong one gets its sentence."""
    parts, values = known()[exercise.label], values_for(exercise, names)
    found = right_and_wrong(exercise.label, values)
    lines = feedback(exercise.label, [found[part["right"]] for part in parts], values)
    assert [line for line in lines if ": right" not in line] == []
    for place, part in enumerate(parts):
        answers = [...] * len(parts)
        for name, sentence in part["wrong"].items():
            answers[place] = found[name]
            said = feedback(exercise.label, answers, values)[place]
            assert said.endswith(f"not right. {sentence}"), (name, found[name], found[part["right"]], said)


@pytest.mark.parametrize(("label", "setting"), BY_HAND)
def test_a_check_tells_right_from_wrong(label, setting):
    matplotlib.use("Agg")
    exercise, names = ALL[label], {}
    if handed_over(exercise)[1]:
        names = run_cells(exercise.notebook, {}, setting.get("cells", []))
        exec(setting.get("code", "") + "\n" + exercise.starter, names)
    assert_checked(exercise, names)


def test_every_check_is_of_a_known_exercise_and_has_all_answers():
    assert list(CHECKED) and set(CHECKED) == set(known())
    for label, exercise in CHECKED.items():
        assert handed_over(exercise)[0] == len(known()[label]), label
        assert "= ..." in exercise.starter or "return ..." in exercise.starter, label


@pytest.mark.parametrize("exercise", CHECKED.values(), ids=list(CHECKED))
def test_what_a_check_is_handed_is_defined_above_it(exercise):
    above = names_above(exercise)
    for keyword in handed_over(exercise)[1]:
        used = {node.id for node in ast.walk(keyword.value) if isinstance(node, ast.Name)}
        assert used - above - set(dir(builtins)) == set(), f"{exercise.notebook.name}: {exercise.label}"


def names_above(exercise):
    """Names that the cells of a chapter define, down to the starter code of an exercise."""
    names = set()
    for cell in cells_of(exercise.notebook):
        if cell.cell_type == "code":
            code = re.sub(r"^(\s*)[%!].*", r"\1pass", cell.source, flags=re.M)  # what only IPython understands
            for node in ast.parse(code).body:
                names |= defined(node)
            if cell.source == exercise.starter:
                return names
    raise AssertionError(exercise.label)


def defined(statement):
    """Names that a statement of a cell defines."""
    names = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def test_every_exercise_without_a_check_asks_for_an_argument():
    """Whoever adds an exercise whose answer is a number or a formula gives it a check."""
    assert set(ALL) - set(CHECKED) == {"ex-models-scope", "ex-why-not-channels"}


@every
def test_difficulty_is_marked(exercise):
    assert exercise.text.startswith(tuple(f"*Difficulty: {'★' * n}{'☆' * (3 - n)}" for n in (1, 2, 3)))


@pytest.mark.parametrize("source", build.sources(), ids=lambda source: source.stem)
def test_each_chapter_has_an_exercise_that_surprises(source):
    mine = [exercise for exercise in ALL.values() if exercise.notebook == source]
    assert any("guess first" in exercise.text.splitlines()[0] for exercise in mine)


@pytest.mark.parametrize("label", CHECKED)
def test_starter_code_says_that_it_is_not_answered(label):
    """As papermill runs it: nothing is computed, and nothing fails."""
    (said,) = feedback(label, [...] * len(known()[label]), {"no": "values"})
    assert said == f"{label}: {UNANSWERED}"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("0.044", "a number is asked for, and '0.044' (str) was given"),
        (True, "a number is asked for, and True (bool) was given"),
        (float("nan"), "a finite number is asked for, and nan"),
        (torch.tensor(float("inf")), "a finite number is asked for"),
        (torch.zeros(3), "one number is asked for, and an array of shape (3,) was given"),
        ([0.044], "a number is asked for, and [0.044] (list) was given"),
        (torch.tensor([[0.0443]]), "right (within 0.002)"),
        (10**400, "a finite number is asked for"),
        (print, "a number is asked for"),
        (4.43, "not right. This is per cent"),
        (-0.0443, "not right. The sign is the other one"),
        (0.7, "not right. `1 - gate.prob_open"),
        (None, UNANSWERED),
    ],
)
def test_an_answer_of_another_kind_gets_one_sentence(answer, said, capsys):
    check("ex-rerun", answer)
    printed = capsys.readouterr().out
    assert printed.startswith("ex-rerun: ") and said in printed and printed.count("\n") == 1


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (0.5, "a function is asked for, and 0.5 (float) was given"),
        (lambda log_alpha: 0.5, "your function fails at (-2, 0): TypeError"),
        (lambda log_alpha, delta: ..., UNANSWERED),
        (lambda log_alpha, delta: "0.5", "at (-2, 0) a number is asked for"),
        (lambda log_alpha, delta: 1 / 0, "ZeroDivisionError"),
        (lambda log_alpha, delta: 0.5, "not right. Start from z > 0"),
    ],
)
def test_an_answer_that_is_a_function_is_compared_at_points(answer, said):
    (line,) = feedback("ex-prob-open", [answer], {})
    assert said in line
    assert right_and_wrong("ex-prob-open", {})[POINTS][0] == (-2.0, 0.0)


def test_several_numbers_may_be_in_any_order_and_of_any_type():
    images = {"learned": torch.rand(4, 3, 16, 16), "original": torch.rand(4, 3, 16, 16)}
    values = {"images": images, "ratio": 0.7}
    right = right_and_wrong("ex-intro-ratio", values)["least_like"]
    for answer in (set(right), list(right)[::-1], tuple(torch.tensor(one) for one in right)):
        assert feedback("ex-intro-ratio", [answer], values) == ["ex-intro-ratio: right."]
    assert "several numbers are asked for" in feedback("ex-intro-ratio", [3], values)[0]
    assert UNANSWERED in feedback("ex-intro-ratio", [{..., 2}], values)[0]
    assert "this run has 0.2: change it" in feedback("ex-intro-ratio", [right], {**values, "ratio": 0.2})[0]


def test_a_check_of_nothing_known_or_with_too_few_answers_says_so():
    assert "There is no check of 'ex-none'" in feedback("ex-none", [1], {})[0]
    assert "asks for 3 answers, and 1 were given" in feedback("ex-never-closed", [1], {})[0]
    assert (
        "cannot be checked with the parameters of this run (KeyError"
        in feedback("ex-toy", [1, 1], {"runs": {}, "weight": 2})[0]
    )
