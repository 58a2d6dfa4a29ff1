"""The tool that measures what the schedule chooses."""

import re

import pytest
from helpers import assert_close

from benchmarks import tune
from jaxrnn._core import schedule

SHAPE = (6, 2, 3, 4)


def test_choosing_forces_an_answer_and_restores_the_table():
    lines = schedule.TABLE["segment_rows"]
    with pytest.raises(ZeroDivisionError), tune.choosing("segment_rows", 3 * 128):
        assert schedule.segment_length(783, (128,), 1, 128) == 3
        raise ZeroDivisionError
    assert schedule.TABLE["segment_rows"] is lines


@pytest.mark.parametrize(("seconds", "change"), [(0.8, True), (0.95, False)])
def test_a_slower_answer_of_the_table_is_marked(monkeypatch, seconds, change):
    answers = dict.fromkeys(tune.ANSWERS["segment_rows"], 1.0) | {128: seconds}
    monkeypatch.setattr(tune, "_compiled", lambda choice, answer, shape: answer)
    monkeypatch.setattr(tune, "calibrate", lambda call: 1)
    monkeypatch.setattr(tune, "sample", lambda call, repeats: answers[call])
    line, found = tune.measure("segment_rows", SHAPE, rounds=3)
    assert found is change and ("would change" in line) is change
    assert line.startswith(f"{SHAPE}") and f"128 {1e3 * seconds:.3g} ms ({seconds:.2f})" in line
    assert re.search(r"\[None 1e\+03 ms\]", line)


def test_every_line_of_the_table_takes_its_own_shape():
    for choice, lines in schedule.TABLE.items():
        for line in lines:
            assert tune.table_answer(choice, line.shape) == line.answer and line.measured
            assert line.shape in tune.SHAPES[choice]


@pytest.mark.parametrize("choice", ["hoists_inputs", "puts_weights_left"])
def test_answers_compute_the_same(choice):
    first, second = (tune._compiled(choice, answer, SHAPE)() for answer in tune.ANSWERS[choice])
    assert_close(first, second, 1e-5)


def test_tune_measures_every_shape_of_a_choice(monkeypatch, capsys):
    monkeypatch.setitem(tune.SHAPES, "hoists_inputs", [SHAPE])
    assert tune.tune(["hoists_inputs"], rounds=1) == 0
    title, line, end = capsys.readouterr().out.splitlines()
    assert title.startswith("hoists_inputs") and line.count(" ms") == 2
    assert end.startswith("would change: ")
