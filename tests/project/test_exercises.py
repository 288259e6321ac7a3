"""Every exercise has a solution; what it says to run is run, and the numbers it states come out."""

import ast

import matplotlib
import pytest
from exercises import checks, exercises, number, own_parameters, run_cells

ALL = exercises()
RUNS = [
    pytest.param(label, run, id=f"{label}-{i}", marks=[pytest.mark.slow] if run.get("slow") else [])
    for label, runs in checks()["runs"].items()
    for i, run in enumerate(runs)
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
    names = run_cells(exercise.notebook, run.get("parameters", {}), run.get("cells", []))
    exec(run.get("code", ""), names)
    for value in run["values"]:
        found = float(eval(value["is"], names))
        stated = str(value["text"])
        assert stated in exercise.solution, f"the solution does not state {stated} ({value['is']}: {found:.4f})"
        tolerance = value["tolerance"]
        assert abs(found - number(stated)) <= tolerance, f"{value['is']} is {found:.4f}, stated as {stated}"
