"""Characters, ids, one-hot rows and parallel streams."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxrnn
from jaxrnn import Vocabulary, generate, one_hot
from jaxrnn.text import stream_ids, streams


def test_characters_become_ids_and_one_hot_rows():
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


IDS = {
    "floats": ([1.7, 2.2], TypeError, "ids: expected integers, got float64"),
    "integral floats": (np.array([1.0, 2.0], np.float32), TypeError, "got float32"),
    "JAX floats": (jnp.array([1.5, 2.0]), TypeError, "got float64"),
    "nan": ([1, float("nan")], TypeError, "got float64"),
    "complex": ([1j, 1], TypeError, "got complex128"),
    "bools": ([True, False], TypeError, "got bool"),
    "strings": (["1", "2"], TypeError, "got str"),
    "a string": ("hello", TypeError, "got str"),
    "None": (None, TypeError, "ids: expected integers, got None"),
    "a number": (3, TypeError, "ids: expected integers, got int"),
    "Nones": ([1, None], TypeError, "got object"),
    "objects": (np.array([1, 2], object), TypeError, "got object"),
    "masked": (np.ma.array([1, 2], mask=[0, 1]), TypeError, "got a masked array"),
    "a key": (jax.random.key(0), TypeError, "ids: expected integers, got key<fry> array"),
    "ragged": ([[1], [1, 2]], ValueError, "entries of different lengths"),
}


@pytest.mark.parametrize("name", IDS)
def test_ids_are_integers(name):
    ids, kind, message = IDS[name]
    for function in (Vocabulary("helo").decode, lambda ids: streams(ids, 1)):
        with pytest.raises(kind, match=r"^ids: expected ") as caught:
            function(ids)
        assert message in str(caught.value) and "\n" not in str(caught.value)
        assert type(caught.value) is kind


def test_ids_have_one_axis_and_are_in_range():
    decode = Vocabulary("helo").decode
    for ids in (np.array(1), jnp.array([[1]]), [[0], [1]]):
        with pytest.raises(ValueError, match=r"^ids: expected shape \[length\], got \["):
            decode(ids)
    for id_ in (2**40, 2**63, -(2**40)):
        with pytest.raises(ValueError, match=f"^ids: expected 0 to 3, got {id_} at position 0"):
            decode([id_])
    with pytest.raises(TypeError, match=r"^ids: expected integers, got traced int32") as caught:
        jax.jit(decode)(jnp.array([1, 2], np.int32))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64", "uint64", "int4", "uint4"])
def test_integers_of_every_dtype_are_ids(dtype):
    vocabulary = Vocabulary("helo" * 60)
    for array in (np.asarray([1, 2], jnp.dtype(dtype)), jnp.asarray([1, 2], dtype)):
        assert vocabulary.decode(array) == vocabulary.decode(array.tolist()) == "el"
    assert vocabulary.decode(iter(np.arange(2))) == vocabulary.decode(jnp.arange(2)) == "he"
    assert vocabulary.decode(()) == vocabulary.decode(np.zeros(0, dtype)) == ""


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (b"hello", "bytes; decode it first"),
        (bytearray(b"hello"), "bytearray; decode it first"),
        (io.StringIO("hello"), "StringIO; read it first"),
        (io.BytesIO(b"hello"), "BytesIO; read it first"),
        (None, "None"),
        (5, "int"),
        (2.5, "float"),
    ],
)
def test_text_is_a_str(value, got):
    with pytest.raises(TypeError, match=rf"^characters: expected a str or .*, got {got}$"):
        Vocabulary(value)
    with pytest.raises(TypeError, match=rf"^text: expected a str, got {got}$"):
        Vocabulary("helo").encode(value)
    with pytest.raises(TypeError, match=r"^text: expected a str, got list$"):
        Vocabulary("helo").encode(["h"])


def test_marks_and_surrogates_are_characters():
    text = "\ufeffe\u0301\ud800"
    vocabulary = Vocabulary(text)
    assert len(vocabulary) == 4 and vocabulary.decode(vocabulary.encode(text)) == text


SETTINGS = "jax_default_prng_impl", "jax_enable_custom_prng"
PARAMS = jaxrnn.init_params(jax.random.key(0), 4, 5, 4)
CALL = {"params": PARAMS, "key": jax.random.key(1), "prompt": [0, 1], "length": 3}


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"prompt": []}, ValueError, "prompt: expected at least one id, got none"),
        ({"prompt": np.zeros(0, int)}, ValueError, "prompt: expected at least one id, got none"),
        ({"prompt": [0.0]}, TypeError, "prompt: expected an integer dtype, got float"),
        ({"prompt": "he"}, TypeError, "prompt: expected an array, got str"),
        ({"prompt": [4]}, ValueError, "prompt: expected ids from 0 to 3, got 4 at index"),
        ({"temperature": float("nan")}, ValueError, "temperature: expected 0, or a finite"),
        ({"temperature": "1"}, TypeError, "temperature: expected a number, got str"),
        ({"length": True}, TypeError, "length: expected a whole number, got bool"),
        ({"key": None}, TypeError, "key: expected a JAX random key, got None"),
        ({"key": 0}, TypeError, "key: expected a JAX random key, got int"),
        ({"key": np.zeros(3, np.uint32)}, ValueError,
         "key: expected one JAX random key, got uint32 array of shape [3]"),
        ({"block": 0}, ValueError, "block: expected at least 1, got 0"),
        ({"block": 1.5}, TypeError, "block: expected a whole number, got float"),
    ],
)  # fmt: skip
def test_bad_arguments_of_generation_are_named(change, kind, message):
    for function in (generate, stream_ids)[1 if "block" in change else 0 :]:
        with pytest.raises(kind) as caught:
            function(**CALL | change)
        assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize("default", ["threefry2x32", "rbg"])
def test_generation_does_not_depend_on_the_default_prng(default, custom):
    expected = generate(**CALL | {"length": 20})
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    try:
        jax.config.update("jax_default_prng_impl", default)
        jax.config.update("jax_enable_custom_prng", custom)
        np.testing.assert_array_equal(generate(**CALL | {"length": 20}), expected)
        own, data = jax.random.key(5), jax.random.key_data(jax.random.key(5))
        drawn = generate(PARAMS, own, [0], 20)
        for key in (own, data, np.asarray(data), jax.random.PRNGKey(5)):
            np.testing.assert_array_equal(generate(PARAMS, key, [0], 20), drawn)
            streamed = np.concatenate([*stream_ids(PARAMS, key, [0], 20)])
            np.testing.assert_array_equal(streamed, drawn)
        other = np.zeros({"rbg": 2, "threefry2x32": 4}[default], np.uint32)
        for function in (generate, stream_ids):
            with pytest.raises(ValueError, match=r"^key: expected one JAX random key, got uint32"):
                function(PARAMS, other, [0], 20)
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def test_generation_uses_each_key_once():
    with jax.debug_key_reuse(True):
        key = jax.random.key(7)
        assert generate(PARAMS, key, [0], 40).shape == (40,)
        assert sum(map(len, stream_ids(PARAMS, jax.random.key(7), [0], 40))) == 40


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
