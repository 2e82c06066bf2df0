"""Reading a .gguf file once, and leaving the package that reads it as it was."""

import pytest

from fedspa.gguf_file import _read_once

gguf = pytest.importorskip("gguf")


def test_a_file_is_opened_once_and_the_package_left_as_it_was(monkeypatch):
    opened = []

    class Reader:
        def __init__(self, path):
            opened.append(path)

    monkeypatch.setattr(gguf, "GGUFReader", Reader)
    for _ in range(2):
        with pytest.raises(KeyError), _read_once():
            assert gguf.GGUFReader("a.gguf") is gguf.GGUFReader("a.gguf")
            raise KeyError
        assert gguf.GGUFReader is Reader
    # Nothing is kept from one load to the next: the file may be another by then.
    assert opened == ["a.gguf", "a.gguf"]


def test_loads_that_overlap_leave_the_package_as_it_was():
    plain = gguf.GGUFReader
    first, second = _read_once(), _read_once()
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    assert gguf.GGUFReader is not plain
    second.__exit__(None, None, None)
    assert gguf.GGUFReader is plain
