"""The tool that measures what the schedule chooses."""

import re

import jax.numpy as jnp
import pytest
from helpers import assert_close

from benchmarks import tune
from jaxrnn._core import schedule


def test_a_choice_is_forced_and_given_back():
    lines = schedule.TABLE["segment_rows"]
    with pytest.raises(ZeroDivisionError), tune.choosing("segment_rows", 3 * 128):
        assert schedule.segment_length(783, (128,), 1, 128) == 3
        raise ZeroDivisionError
    assert schedule.TABLE["segment_rows"] is lines


def test_a_line_has_the_choice_in_brackets_and_the_others_beside_it():
    line, change = tune.measure("segment_rows", tune._gradient, (6, 2, 3, 4), 12, (2, 3), rounds=1)
    ms, ratio = r"[\d.e+-]+ ms", r"\([\d.]+\)"
    expected = rf"\(6, 2, 3, 4\) +\[12 {ms}\], 2 {ms} {ratio}, 3 {ms} {ratio}"
    assert re.fullmatch(expected + "  <- would change" * change, line), line


@pytest.mark.parametrize(("seconds", "change"), [(0.8, True), (0.95, False)])
def test_a_line_that_loses_is_marked(monkeypatch, seconds, change):
    def paired(calls, rounds):
        return {answer: jnp.full(rounds, 1.0 if answer else seconds) for answer in calls}

    monkeypatch.setattr(tune, "paired", paired)
    how = "hoists_inputs", tune._forward, (6, 2, 3, 4), True, (True, False)
    line, found = tune.measure(*how, rounds=3)
    assert found is change and ("would change" in line) is change


def test_every_line_of_the_table_takes_its_own_shape():
    for choice, lines in schedule.TABLE.items():
        for line in lines:
            assert tune._told(choice, line.shape) == line.answer and line.measured


def test_every_answer_is_another_program_with_the_same_results(monkeypatch):
    results = {}

    def called(calls, rounds):
        results.update({answer: call() for answer, call in calls.items()})
        return {answer: jnp.ones(rounds) for answer in calls}

    monkeypatch.setattr(tune, "paired", called)
    for rule, answers in {
        "hoists_inputs": (True, False), "implementation": ("scan", "associative"),
    }.items():  # fmt: skip
        results.clear()
        tune.measure(rule, tune._gradient, (6, 2, 3, 4), answers[0], answers, rounds=1)
        assert tuple(results) == answers
        assert_close(*results.values(), 1e-5)
