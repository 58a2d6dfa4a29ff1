"""The tool that measures what the schedule chooses."""

import re

import jax.numpy as jnp
import pytest
from helpers import assert_close

from benchmarks import tune
from jaxrnn._core import schedule


def test_a_choice_is_forced_and_given_back():
    rule = schedule.segment_length
    with pytest.raises(ZeroDivisionError), tune.choosing("segment_length", 3):
        assert schedule.segment_length(784, (128,), 128) == 3
        raise ZeroDivisionError
    assert schedule.segment_length is rule


def test_a_line_has_the_choice_in_brackets_and_the_others_beside_it():
    line = tune.measure("segment_length", tune._gradient, (6, 2, 3, 4), 6, (2, 3), rounds=1)
    ms, ratio = r"[\d.e+-]+ ms", r"\([\d.]+\)"
    expected = rf"\(6, 2, 3, 4\) +\[6 {ms}\], 2 {ms} {ratio}, 3 {ms} {ratio}"
    assert re.fullmatch(expected, line), line


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
