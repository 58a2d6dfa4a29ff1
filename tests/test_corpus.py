"""A text of any size: encoded to a file in bounded memory, mapped, split, counted."""

import io
import itertools
import os
import re
import resource
import sys
import threading
import tracemalloc
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from jaxrnn import Vocabulary
from jaxrnn._api.checks import InputError
from jaxrnn._app import corpus as corpora
from jaxrnn._app import directory
from jaxrnn._app.corpus import Corpus, Text, encode, open_corpus
from jaxrnn._app.sample import decoded, to_ids
from jaxrnn.text import streams

BYTES = tuple(map(chr, range(256)))
OPENED = Text("fox", "char", tuple("abc"), 1000, 0)


@pytest.fixture
def tiny(monkeypatch):
    """Chunks of a size that no character's bytes divide: they end anywhere."""
    monkeypatch.setattr(corpora, "CHUNK", 7)


def written(tmp_path, content, name="text"):
    path = tmp_path / name
    path.write_bytes(content)
    return str(path)


def encoded(sources, tmp_path, level="char"):
    path = tmp_path / "ids.npy"
    text = encode(sources, level, path)
    ids = np.load(path, mmap_mode="r")
    assert ids.shape == (text.length,) and not list(tmp_path.glob(".ids*"))
    return text, ids


def set_input(monkeypatch, content):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def random_text(length, seed=0):
    """Characters of one to four bytes, and those that other readers change or drop."""
    generator = np.random.default_rng(seed)
    ends = np.array([0x80, 0x800, 0xD800, 0x110000])[generator.integers(0, 4, length)]
    codes = generator.integers(0, ends)
    codes[(codes >= 0xD800) & (codes < 0xE000)] = 0x1D11E
    return "\r\n\ufeff\r\x00\x85\u2028" + "".join(map(chr, codes)) + "\U0010ffff\r"


@pytest.mark.parametrize("chunk", [1, 2, 7, 31, 2**20])
def test_ids_are_those_of_the_vocabulary(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "CHUNK", chunk)
    expected = random_text(900)
    text, ids = encoded([written(tmp_path, expected.encode())], tmp_path)
    vocabulary = Vocabulary(expected)
    assert text.characters == vocabulary.characters and len(vocabulary) > 256
    np.testing.assert_array_equal(ids, vocabulary.encode(expected))
    assert (text.name, text.level) == (str(tmp_path / "text"), "char")


@pytest.mark.parametrize(("distinct", "dtype"), [
    (1, "uint8"), (256, "uint8"), (257, "uint16"), (65_536, "uint16"), (65_537, "uint32"),
])  # fmt: skip
@pytest.mark.parametrize("chunk", [1009, 2**20])
def test_ids_widen_when_they_must(distinct, dtype, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "CHUNK", chunk)
    alphabet = [chr(n) for n in range(0x110000) if not 0xD800 <= n < 0xE000][-distinct:]
    # Ids that are written long before the one that widens them.
    expected = "".join(alphabet[:200] * 20 + alphabet + alphabet[:5])
    text, ids = encoded([written(tmp_path, expected.encode())], tmp_path)
    assert ids.dtype == dtype and len(text.characters) == distinct
    np.testing.assert_array_equal(ids, Vocabulary(expected).encode(expected))


def test_ids_widen_twice_at_once(tmp_path, tiny, monkeypatch):
    few = written(tmp_path, b"abcabcabcabcabcabcab", "few")
    many = "".join(map(chr, range(0x10000, 0x10000 + 70_000)))
    monkeypatch.setattr(corpora, "CHUNK", 2**20)
    text, ids = encoded([few, written(tmp_path, many.encode(), "many")], tmp_path)
    assert ids.dtype == np.uint32 and text.length == 70_020
    np.testing.assert_array_equal(ids[:20], [0, 1, 2] * 6 + [0, 1])
    np.testing.assert_array_equal(ids[20:], np.arange(3, 70_003))


def test_bytes_are_their_own_ids(tmp_path, tiny):
    content = np.random.default_rng(0).integers(0, 256, 1000, np.uint8).tobytes() + b"\r\n\xe9\x00"
    with pytest.raises(UnicodeDecodeError):
        content.decode()
    text, ids = encoded([written(tmp_path, content)], tmp_path, "byte")
    assert text == Text(str(tmp_path / "text"), "byte", BYTES, 1004, zlib.crc32(content))
    assert ids.dtype == np.uint8 and ids.tobytes() == content
    assert Vocabulary(text.characters).decode(ids).encode("latin-1") == content


def test_the_documentation_is_the_text_if_none_is_named(tmp_path):
    from pydoc_data.topics import topics

    expected = "".join(topics.values())
    text, ids = encoded([], tmp_path)
    assert text.name == "CPython's pydoc_data.topics"
    vocabulary = Vocabulary(expected)
    assert text.characters == vocabulary.characters
    np.testing.assert_array_equal(ids, vocabulary.encode(expected))
    assert encoded([], tmp_path, "byte")[1].tobytes() == expected.encode()


def test_files_are_read_in_their_order(tmp_path, tiny):
    parts = ["second é", "first", "second é", "𝄞"]
    files = [written(tmp_path, part.encode(), f"{n}") for n, part in enumerate(parts)]
    text, ids = encoded([files[1], files[0], files[3], files[0]], tmp_path)
    assert Vocabulary(text.characters).decode(ids) == parts[1] + parts[0] + parts[3] + parts[0]
    assert text.name == f"{files[1]} {files[0]} {files[3]} {files[0]}"
    assert encoded(files + files[:1], tmp_path)[0].name == f"{files[0]} and 4 more"


def test_a_character_does_not_go_on_in_the_next_file(tmp_path):
    halves = [written(tmp_path, half, name) for half, name in [(b"a\xc3", "1"), (b"\xa9b", "2")]]
    with pytest.raises(InputError, match="1: expected UTF-8, got byte 0xc3 at offset 1 "):
        encode(halves, "char", tmp_path / "ids.npy")


def test_directories_are_read_in_order_of_their_paths(tmp_path):
    (root := tmp_path / ".root").mkdir()
    for folder in ("b", "b/c", "b-c", ".hidden", "b/.hidden", "nothing"):
        (root / folder).mkdir()
    files = {"a": "1", "b/a": "2", "b/c/é": "3", "b/d": "4", "b-c/a": "5", "c": "6",
             ".hidden/a": "x", "b/.hidden/a": "x", "b/.a": "x", ".a": "x", "b/0": ""}  # fmt: skip
    for name, content in files.items():
        (root / name).write_text(content)
    os.mkfifo(root / "pipe")
    (root / "link").symlink_to(root / "b", target_is_directory=True)
    (root / "none").symlink_to(root / "gone")
    (root / "z").symlink_to(written(tmp_path, b"7"))
    text, ids = encoded([str(root)], tmp_path)
    assert Vocabulary(text.characters).decode(ids) == "1234567"
    assert text.name == str(root)
    both, ids = encoded([str(root / "c"), str(root / "b")], tmp_path)
    assert Vocabulary(both.characters).decode(ids) == "6234"


def test_runs_are_no_text(tmp_path):
    """Of a directory in which one was trained, and in which another has just begun."""
    for name in ("runs/a", "runs/b", "notes"):
        (tmp_path / "all" / name).mkdir(parents=True)
    (tmp_path / "all" / "notes" / "text").write_text("text")
    (tmp_path / "all" / "notes" / "config.json").write_text("[]")
    for name in ("a", "b"):
        directory.write(
            tmp_path / "all" / "runs" / name / "config.json", {"sources": [], "options": {}}
        )
    (tmp_path / "all" / "runs" / "a" / "ids.npy").write_bytes(b"\xff")
    text, ids = encoded([str(tmp_path / "all")], tmp_path)
    assert Vocabulary(text.characters).decode(ids) == "[]text"


def test_standard_input_is_one_of_the_files(tmp_path, monkeypatch, tiny):
    content = random_text(50).encode()
    before, after = (written(tmp_path, part, part.decode()) for part in (b"before", b"after"))
    set_input(monkeypatch, content)
    text, ids = encoded([before, "-", after], tmp_path, "byte")
    assert ids.tobytes() == b"before" + content + b"after"
    assert text.name == f"{before} standard input {after}"
    assert not sys.stdin.buffer.closed
    set_input(monkeypatch, content)
    assert encoded(["-"], tmp_path)[0].name == "standard input"


def test_a_pipe_is_read_to_its_end(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    content = random_text(100_000).encode()  # more than a pipe holds
    writer = threading.Thread(target=lambda: path.write_bytes(content))
    writer.start()
    text, ids = encoded([str(path)], tmp_path)
    writer.join()
    assert Vocabulary(text.characters).decode(ids).encode() == content


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 2**20])
def test_a_byte_order_mark_is_no_character(chunk, tmp_path, monkeypatch):
    """At the beginning of each file or stream; anywhere else, and of bytes, it is one."""
    monkeypatch.setattr(corpora, "CHUNK", chunk)
    mark = "\ufeff".encode()
    first, second = written(tmp_path, mark + b"ab", "1"), written(tmp_path, mark + b"bc", "2")
    set_input(monkeypatch, mark + mark + b"d")
    text, ids = encoded([first, second, "-"], tmp_path)
    assert Vocabulary(text.characters).decode(ids) == "abbc\ufeffd"
    text, ids = encoded([first], tmp_path, "byte")
    assert ids.tobytes() == mark + b"ab"
    alone = written(tmp_path, mark, "alone")
    with pytest.raises(InputError, match="alone: expected text, got a byte-order mark alone"):
        encoded([alone], tmp_path)
    assert encoded([alone, first], tmp_path)[0].length == 2


BAD_SOURCES = {
    "missing": (["{0}/none"], "{0}/none: cannot be read: No such file or directory"),
    "missing later": (["{0}/good", "{0}/none"], "{0}/none: cannot be read: No such file"),
    "no folder": (["{0}/good/x"], "{0}/good/x: cannot be read: Not a directory"),
    "empty": (["{0}/empty"], "{0}/empty: expected text, got an empty file"),
    "empty later": (["{0}/good", "{0}/empty"], "{0}/empty: expected text, got an empty file"),
    "no file": (["{0}/folder"], "{0}/folder: expected text, got a directory without text files"),
    "twice": (["-", "{0}/good", "-"], "standard input: expected at most once, got 2 times"),
    "nothing": (["-"], "standard input: expected text, got nothing"),
    "latin": (["{0}/latin"],
     "{0}/latin: expected UTF-8, got byte 0xe9 at offset 18 (invalid continuation byte); "
     "--level byte takes any bytes"),
    "start": (["{0}/start"], "{0}/start: expected UTF-8, got byte 0xff at offset 0 (invalid start"),
    "surrogate": (["{0}/surrogate"], "expected UTF-8, got byte 0xed at offset 6 (invalid"),
    "second": (["{0}/good", "{0}/latin"], "{0}/latin: expected UTF-8, got byte 0xe9 at offset 18"),
    "cut": (["{0}/cut"], "{0}/cut: expected UTF-8, got byte 0xf0 at offset 19 (unexpected end"),
    "cut at a chunk": (["{0}/seven"], "expected UTF-8, got byte 0xe2 at offset 5 (unexpected end"),
}  # fmt: skip


@pytest.fixture
def bad(tmp_path):
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    for name, content in {
        "good": b"good", "empty": b"", "folder/inside/empty": b"", "folder/.hidden": b"text",
        "latin": "𝄞𝄞𝄞é€a".encode() + b"\xe9 au lait", "start": b"\xff",
        "surrogate": b"abcdef\xed\xa0\x80", "cut": "€€€€€€a".encode() + b"\xf0\x9d\x84",
        "seven": b"abcde\xe2\x82",
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.mark.parametrize("chunk", [1, 7, 2**20])
@pytest.mark.parametrize(("sources", "message"), BAD_SOURCES.values(), ids=BAD_SOURCES.keys())
def test_bad_sources_are_one_line(sources, message, chunk, bad, monkeypatch):
    monkeypatch.setattr(corpora, "CHUNK", chunk)
    set_input(monkeypatch, b"")
    names = [name.format(bad) for name in sources]
    (out := bad / "out").mkdir()
    with pytest.raises(InputError, match=re.escape(message.format(bad))) as caught:
        encode(names, "char", out / "ids.npy")
    assert "\n" not in str(caught.value) and not list(out.iterdir())
    if "UTF-8" in message:  # whole, it errs at the same place
        with pytest.raises(UnicodeDecodeError) as whole:
            Path(names[-1]).read_bytes().decode()
        assert f"at offset {whole.value.start} ({whole.value.reason})" in str(caught.value)
        assert encode(names, "byte", out / "ids.npy").level == "byte"


def test_unreadable_files_are_refused_in_one_line(bad, monkeypatch):
    out = bad / "ids.npy"
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match=r"^standard input: cannot be read: it is closed$"):
        encode(["-"], "char", out)

    class Broken(io.BytesIO):
        def read(self, _):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Broken()))
    with pytest.raises(InputError, match=r"^standard input: cannot be read: Input/output error$"):
        encode(["-"], "char", out)
    with pytest.raises(InputError, match=r"good/ids.npy: cannot be written: Not a directory$"):
        encode([], "char", bad / "good" / "ids.npy")
    with pytest.raises(ValueError, match=r"^level: expected one of 'char', 'byte', got 'word'$"):
        encode([], "word", out)
    listed = os.scandir

    def scandir(path):
        if str(path).endswith("inside"):
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(InputError, match=r"folder/inside: cannot be read: Permission denied$"):
        encode([str(bad / "folder")], "char", out)
    assert not out.exists() and not list(bad.glob(".ids*"))


@pytest.mark.parametrize("level", ["char", "byte"])
def test_a_full_disk_leaves_nothing(level, tmp_path):
    source = written(tmp_path, "abcdéé".encode() * 5000)
    (out := tmp_path / "out").mkdir()
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (60, 20_000):  # at the header, which is still in a buffer, and in the middle
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
        try:
            with pytest.raises(InputError, match=r"out/ids.npy: cannot be written: File too large"):
                encode([source], level, out / "ids.npy")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        assert not list(out.iterdir())
    assert encode([source], level, out / "ids.npy").length


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError])
def test_old_ids_stay_until_all_is_written(error, tmp_path, tiny, monkeypatch):
    source, path = written(tmp_path, b"new" * 100), tmp_path / "ids.npy"
    path.write_bytes(b"old")
    seen, ids = [], corpora.Alphabet.ids

    def stop(self, text):
        seen.append((path.read_bytes(), sorted(p.name for p in tmp_path.iterdir())))
        if len(seen) == 40:
            raise error("not the file's")
        return ids(self, text)

    with monkeypatch.context() as patch, pytest.raises(error, match="not the file's"):
        patch.setattr(corpora.Alphabet, "ids", stop)
        encode([source], "char", path)
    assert len(seen) == 40 and all(old == b"old" for old, _ in seen)
    assert seen[0][1] == [".ids.npy.partial", "ids.npy", "text"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ids.npy", "text"]
    assert path.read_bytes() == b"old"
    (tmp_path / ".ids.npy.partial").write_bytes(b"of a process that was killed" * 100)
    text, ids = encoded([source], tmp_path)
    assert Vocabulary(text.characters).decode(ids) == "new" * 100


def test_the_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    partial, path = tmp_path / ".ids.npy.partial", tmp_path / "ids.npy"

    def synced(number):
        fsync(number)
        calls.append(("fsync", partial.read_bytes()))

    def renamed(*names):
        calls.append(names)
        replace(*names)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    encode([written(tmp_path, b"text")], "byte", path)
    assert calls == [("fsync", path.read_bytes()), (partial, path)]


def test_a_header_without_room_leaves_no_file(tmp_path, monkeypatch):
    grown = lambda dtype, length: b"\x93NUMPY" + b" " * len(str(length))  # noqa: E731
    monkeypatch.setattr(corpora, "_header", grown)
    with pytest.raises(RuntimeError, match=r"ids.npy: NumPy's header grew to 8 bytes"):
        encode([written(tmp_path, b"x" * 10)], "byte", tmp_path / "ids.npy")
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def corpus_of(content, tmp_path, level="char", evaluated=500_000, **how):
    path = tmp_path / "ids.npy"
    text = encode([written(tmp_path, content)], level, path)
    how = {"held_out": 0.1, "batch_size": 4, "seq_length": 8, **how}
    return open_corpus(path, text, evaluated=evaluated, **how)


def is_mapped(array):
    while isinstance(array, np.ndarray):
        if isinstance(array, np.memmap):
            return True
        array = array.base
    return False


@pytest.mark.parametrize("level", ["char", "byte"])
def test_a_corpus_is_views_of_the_file(level, tmp_path):
    content = random_text(4000).encode()
    whole = content if level == "byte" else content.decode()
    corpus = corpus_of(content, tmp_path, level, held_out=0.25)
    kept = round(len(whole) / 4)
    assert (len(corpus.train), len(corpus.held_out)) == (len(whole) - kept, kept)
    alphabet = BYTES if level == "byte" else tuple(dict.fromkeys(whole))
    assert corpus.vocabulary.characters == alphabet and corpus.text.level == level
    assert corpus.text.name == str(tmp_path / "text")
    ids = list(content) if level == "byte" else Vocabulary(whole).encode(whole)
    np.testing.assert_array_equal(np.concatenate([corpus.train, corpus.held_out]), ids)
    for part, view in [
        (corpus.train, corpus.train), (corpus.held_out, corpus.held_out),
        *((corpus.train, view) for view in streams(corpus.train, 3)),
        *((corpus.held_out, view) for view in corpus.held_out_streams(4)),
    ]:  # fmt: skip
        assert is_mapped(view) and np.shares_memory(part, view) and not view.flags.writeable
        assert type(view) is np.ndarray


@pytest.mark.parametrize(("length", "batch_size", "evaluated", "count"), [
    (100_000, 64, 500_000, 16), (100_000, 64, 40_000, 8), (100_000, 7, 500_000, 4),
    (100_000, 1, 500_000, 1), (5000, 64, 500_000, 1), (100, 64, 500_000, 1),
    (8192, 64, 500_000, 2), (100_000, 64, 4 * 4096 - 1, 2), (600_000, 64, 500_000, 64),
])  # fmt: skip
def test_held_out_streams_are_few_and_long(length, batch_size, evaluated, count):
    ids = np.random.default_rng(0).integers(0, 9, length, np.uint8)
    corpus = Corpus(OPENED, Vocabulary("abcdefghi"), ids, ids[:evaluated])
    inputs, targets = corpus.held_out_streams(batch_size)
    expected = streams(ids[:evaluated], count)
    np.testing.assert_array_equal(inputs, expected[0])
    np.testing.assert_array_equal(targets, expected[1])
    assert inputs.shape == ((min(length, evaluated) - 1) // count, count)


def bits_by_hand(train, held_out, size, k=0.1):
    """Of the character before, and of none, with Python's own integers."""
    ones, pairs = Counter(train), Counter(itertools.pairwise(train))
    firsts = Counter(train[:-1])
    unigram = [-np.log2((ones[b] + k) / (len(train) + size * k)) for b in held_out[1:]]
    bigram = [
        -np.log2((pairs[a, b] + k) / (firsts[a] + size * k))
        for a, b in itertools.pairwise(held_out)
    ]
    return {"unigram": np.mean(unigram), "bigram": np.mean(bigram)}


@pytest.mark.parametrize("level", ["char", "byte"])
@pytest.mark.parametrize("evaluated", [15, 500_000])
def test_references_are_those_of_the_whole(level, evaluated, tmp_path, tiny):
    generator = np.random.default_rng(1)
    text = "".join(generator.choice(list("aab é\n𝄞"), 3000)) + "unseen pairs: ʒʒ"
    corpus = corpus_of(text.encode(), tmp_path, level, evaluated, held_out=0.3)
    train, held_out = corpus.train.tolist(), corpus.held_out.tolist()
    assert len(held_out) == (evaluated if evaluated == 15 else corpus.text.length - len(train))
    expected = bits_by_hand(train, held_out, len(corpus.vocabulary))
    assert corpus.references() == pytest.approx(expected, rel=1e-12)


def test_pairs_of_large_alphabets_are_not_counted(tmp_path):
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 2049))) * 3
    corpus = corpus_of(text.encode(), tmp_path)
    assert corpus.references().keys() == {"unigram"}
    corpus = corpus_of(text.replace(text[0], "").encode(), tmp_path)
    assert corpus.references().keys() == {"unigram", "bigram"}


MEBIBYTE = 2**20
# Of each byte of a chunk: itself and the one before it; its character, of up to 4 bytes, and code
# point, 4; its id, int32, twice, its place as an index, 8; and where all are new, as at the
# beginning, what it takes to sort them, 16. The alphabet is a table of 4.25 MiB.
ENCODING = 40 * corpora.CHUNK + 5 * MEBIBYTE
# The ids of a chunk as int64, their pairs, and what each step of that holds; and tables of 500²
# int64 in four steps.
COUNTING = 24 * corpora.CHUNK + 8 * MEBIBYTE


def peak(function, *args, **how):
    tracemalloc.start()
    try:
        result = function(*args, **how)
        return result, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("level", ["char", "byte"])
def test_memory_does_not_grow_with_the_text(level, tmp_path):
    """64 MiB: in the middle of nothing, which takes no room on the disk, a few characters."""
    source, path = tmp_path / "text", tmp_path / "ids.npy"
    with source.open("wb") as file:
        file.seek(32 * MEBIBYTE)
        file.write(random_text(400).encode())
        file.truncate(64 * MEBIBYTE)
    text, used = peak(encode, [str(source)], level, path)
    assert text.length > 63 * MEBIBYTE and (level == "byte" or len(text.characters) > 256)
    assert used < ENCODING < 48 * MEBIBYTE
    how = {"held_out": 0.5, "batch_size": 64, "seq_length": 64, "evaluated": 2**40}
    corpus, used = peak(open_corpus, path, text, **how)
    assert used < 5 * MEBIBYTE
    (inputs, targets), used = peak(corpus.held_out_streams, 64)
    assert used < MEBIBYTE // 64 and inputs.nbytes + targets.nbytes > 60 * MEBIBYTE
    references, used = peak(corpus.references)
    assert used < COUNTING < 48 * MEBIBYTE, used
    assert 0 < references["bigram"] < references["unigram"] < 0.01


def mapped(path):
    """Bytes of a file that this process has in its memory."""
    text = Path("/proc/self/smaps").read_text()
    found = re.findall(rf" {re.escape(str(path))}\n(?:.*\n)*?Rss:\s+(\d+) kB\n", text)
    return 1024 * sum(map(int, found))


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux alone says it")
def test_memory_of_read_pages_is_given_back(tmp_path):
    """Of 64 MiB that are mapped; as many are in memory where nothing gives them back."""
    path, length = tmp_path / "ids.npy", 64 * MEBIBYTE
    np.lib.format.open_memmap(path, "w+", np.uint8, (length,))[-1] = 1
    ids, most = corpora.open_ids(path, length, 256), 0
    seen = []
    for chunk in corpora.chunks(ids, overlap=1):
        seen.append((len(chunk), int(chunk.sum())))
        most = max(most, mapped(path))
    assert seen == [(corpora.CHUNK + 1, 0)] * 63 + [(corpora.CHUNK, 1)]
    assert most < 16 * MEBIBYTE  # the kernel maps somewhat more than it is asked for
    assert ids[:-9].sum() == 0 and mapped(path) > 32 * MEBIBYTE
    corpora.release(ids[:-9])
    assert mapped(path) < 4 * MEBIBYTE and ids[-1] == 1
    corpora.release(np.zeros(3))  # which is not mapped


@pytest.mark.parametrize(("ids", "message"), [
    (None, "ids.npy: cannot be read: No such file or directory$"),
    (b"", "ids.npy: expected the ids of a text, got EOF: reading magic string"),
    (b"no numpy file at all", "ids.npy: expected the ids of a text, got the magic string"),
    ("short", "ids.npy: expected the ids of a text, got mmap length is greater"),
    ("pickle", "ids.npy: expected the ids of a text, got Array can't be memory-mapped: Python"),
    ("archive", "ids.npy: expected the ids of a text, got the magic string"),
    ("folder", "ids.npy: cannot be read: Is a directory$"),
    (np.zeros(999, np.uint8),
     r"ids.npy: expected uint8 array of shape \[1000\], got uint8 array of shape \[999\]$"),
    (np.zeros(1000, np.int32),
     r"ids.npy: expected uint8 array of shape \[1000\], got int32 array of shape \[1000\]$"),
    (np.zeros((1000, 1), np.uint8), r"got uint8 array of shape \[1000, 1\]$"),
    (np.array(1, np.uint8), r"got uint8 array of shape \[\]$"),
], ids=lambda case: None if isinstance(case, str) else type(case).__name__)  # fmt: skip
def test_a_damaged_file_of_ids_is_one_line(ids, message, tmp_path):
    path = tmp_path / "ids.npy"
    if isinstance(ids, bytes):
        path.write_bytes(ids)
    elif isinstance(ids, np.ndarray):
        np.save(path, ids)
    elif ids == "short":
        np.save(path, np.zeros(1000, np.uint8))
        os.truncate(path, 1000)
    elif ids == "pickle":
        np.save(path, np.array([{}] * 1000), allow_pickle=True)
    elif ids == "archive":
        with path.open("wb") as file:
            np.savez(file, np.zeros(1000, np.uint8))
    elif ids == "folder":
        path.mkdir()
    with pytest.raises(InputError, match=message) as caught:
        open_corpus(path, OPENED, held_out=0.1, batch_size=4, seq_length=8)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_header_with_any_bit_turned_over_is_one_line_or_none(tmp_path):
    path = tmp_path / "ids.npy"
    np.save(path, np.zeros(1000, np.uint8))
    content, refused = path.read_bytes(), 0
    for bit in range(8 * 128):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:  # a space may have become another one
            corpora.open_ids(path, 1000, 3)
        except InputError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert refused > 400


def test_changed_ids_are_one_line(tmp_path):
    corpus_of(b"abcabcab" * 100, tmp_path)
    path, text = (
        tmp_path / "ids.npy",
        encode([str(tmp_path / "text")], "char", tmp_path / "ids.npy"),
    )
    how = {"held_out": 0.1, "batch_size": 4, "seq_length": 8, "verify": True}
    assert len(open_corpus(path, text, **how).train) == 720
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        InputError, match=rf"{re.escape(str(path))}: expected the ids of .* different ids"
    ):
        open_corpus(path, text, **how)


def test_short_and_uniform_texts_are_one_line(tmp_path):
    name = re.escape(str(tmp_path / "text"))
    for content, level, message in [
        (b"a" * 5000, "char", "expected two distinct characters, got only 'a'"),
        (b"a" * 5000, "byte", "expected two distinct bytes, got only 0x61"),
        (b"abc" * 5, "char", "expected at least 33 characters for training, 4 streams of one "
         "window of 8, got 13; lower --batch-size, --seq-length or --held-out"),
        (b"abc" * 5, "byte", "expected at least 33 bytes for training, .* got 13; lower"),
        (b"ab", "char", "expected at least 33 characters for training, .* got 0; lower"),
        ("é".encode() * 17 + b"a", "char", "expected at least 33 characters .* got 16; lower"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=f"^{name}: {message}"):
            corpus_of(content, tmp_path, level)
    assert len(corpus_of("é".encode() * 18, tmp_path, "byte", held_out=0.01).train) == 34
    assert len(corpus_of(b"ab" + b"a" * 35, tmp_path).train) == 33


def test_a_second_distinct_byte_may_be_anywhere(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxrnn._app.corpus.CHUNK", 7)
    for n in (1, 6, 7, 8, 99):
        content = bytearray(b"a" * 100)
        content[n] = 0
        assert len(corpus_of(bytes(content), tmp_path, "byte").held_out) == 10


def test_prompts_become_ids():
    vocabulary = Vocabulary("hé")
    np.testing.assert_array_equal(to_ids(vocabulary, "char", "éh"), [1, 0])
    with pytest.raises(ValueError, match=r"text: expected the 2 characters .* 'x' at position 1"):
        to_ids(vocabulary, "char", "hx")
    vocabulary = Vocabulary(BYTES)
    given = os.fsdecode(b"h\xc3\xa9\xe9\x00")
    ids = to_ids(vocabulary, "byte", given)
    assert bytes(ids.tolist()) == b"h\xc3\xa9\xe9\x00" and ids.dtype == np.int32
    assert to_ids(vocabulary, "byte", "").shape == (0,)
    message = r"^text: expected characters that UTF-8 can encode, got '\\ud800' at position 1$"
    with pytest.raises(ValueError, match=message):
        to_ids(vocabulary, "byte", "a\ud800")


def test_ids_become_text_piece_by_piece():
    content = "é€𝄞".encode() + b"\xe9a\xff\x00" + "€".encode()[:2]
    vocabulary = Vocabulary(BYTES)
    for size in range(1, len(content) + 1):
        pieces = [list(content[n : n + size]) for n in range(0, len(content), size)]
        text = "".join(decoded(vocabulary, "byte", pieces))
        assert text == "é€𝄞\\xe9a\\xff\x00\\xe2\\x82"
    read = []
    pieces = (read.append(n) or [n] for n in "aé𝄞".encode())
    shown = [(text, len(read)) for text in decoded(vocabulary, "byte", pieces)]
    assert shown == [("a", 1), ("é", 3), ("𝄞", 7)]
    with pytest.raises(ValueError, match="ids: expected 0 to 255, got 256 at position 0"):
        list(decoded(vocabulary, "byte", [[256]]))
    assert list(decoded(Vocabulary("hé"), "char", [[1, 0], [0]])) == ["éh", "h"]
