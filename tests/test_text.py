"""Characters, ids, one-hot rows and parallel streams."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrnn import Vocabulary, one_hot
from jaxrnn.text import streams


def test_section_1():
    vocabulary = Vocabulary("hello")
    assert (
        vocabulary.characters == ("h", "e", "l", "o") == Vocabulary(["h", "e", "l", "o"]).characters
    )
    assert vocabulary == Vocabulary.from_text("hello") and len(vocabulary) == 4
    rows = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0]]
    np.testing.assert_array_equal(one_hot(vocabulary.encode("hell"), 4), rows)
    targets = one_hot(vocabulary.encode("ello"), 4, jnp.float64)
    assert targets.dtype == jnp.float64
    np.testing.assert_array_equal(targets, [*rows[1:], [0, 0, 0, 1]])


@settings(max_examples=50, deadline=None)
@given(st.text(min_size=1, max_size=60))
def test_decode_undoes_encode(text):
    vocabulary = Vocabulary(text)
    ids = vocabulary.encode(text)
    assert ids.dtype == np.int32 and ids.shape == (len(text),)
    assert vocabulary.decode(ids) == text
    assert list(ids) == [vocabulary.characters.index(c) for c in text]


def test_empty_texts_are_texts():
    assert Vocabulary("a").encode("").shape == (0,)
    assert Vocabulary("a").decode([]) == ""


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Vocabulary("abc").encode("ab\tc"), r"text: .*3 characters.*'\\t' at position 2"),
        (lambda: Vocabulary("abc").encode("é"), "text: .*'é' at position 0"),
        (lambda: Vocabulary("abc").decode([0, 3]), "ids: expected 0 to 2, got 3 at position 1"),
        (lambda: Vocabulary("abc").decode([0, -1]), "got -1 at position 1"),
        (lambda: Vocabulary("abc").decode([[0]]), r"ids: expected shape \[length\], got \[1, 1\]"),
        (lambda: Vocabulary(""), "characters: expected at least one"),
        (lambda: Vocabulary(["a", "bc"]), "single characters, got 'bc' at 1"),
        (lambda: Vocabulary(["a", "b", "a"]), "distinct characters, got 'a' twice"),
        (lambda: one_hot(jnp.array([0, 4]), 4), "ids from 0 to 3, got 4 at index"),
        (lambda: one_hot(jnp.array([0]), 0), "size: expected at least 1, got 0"),
    ],
)  # fmt: skip
def test_errors_name_the_argument_and_the_place(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_one_hot_takes_ids_only():
    with pytest.raises(TypeError, match="ids: expected an integer dtype, got float64"):
        one_hot(jnp.ones(3), 4)
    assert not np.any(jax.jit(lambda n: one_hot(n, 4))(jnp.array([9])))


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 60), st.integers(1, 7))
def test_streams_are_the_text_in_order(length, count):
    ids = np.arange(length)
    if length <= count:
        with pytest.raises(ValueError, match=rf"^ids: expected shape \[N\], N above {count}, got"):
            streams(ids, count)
        return
    inputs, targets = streams(ids.tolist(), count)
    assert inputs.shape == targets.shape == ((length - 1) // count, count)
    np.testing.assert_array_equal(targets, inputs + 1)
    read = inputs.T.ravel()
    np.testing.assert_array_equal(read, ids[: len(read)])
    assert length - 1 - len(read) < count
