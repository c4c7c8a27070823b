"""Text and JSON as they are read from any file, and files that are written whole or not at all."""

from __future__ import annotations

import io
import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lora_delta.commands import label, plot
from lora_delta.files import replaces, write_json
from qwen_functional.files import parse_json, read_json_object, read_lines, read_text

SEPARATORS = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\rh"  # str.splitlines splits at each of them


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file"


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "byte order mark"])
@pytest.mark.parametrize(
    "text", ["", "\n", "one", "one\n", "one\n\ntwo\n", f"{SEPARATORS}\n{SEPARATORS}", " é 日本 🙂 \n\ufeff"]
)
def test_lines_are_those_of_python_where_only_a_line_feed_ends_one(mark: bytes, text: str, path: Path) -> None:
    path.write_bytes(mark + text.encode())
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        expected = file.readlines()
    assert read_lines(path) == [line.removesuffix("\n") for line in expected]
    assert read_text(path) == "".join(expected)


def test_lines_may_end_as_windows_ends_them(path: Path) -> None:
    path.write_bytes(b"one\r\n\r\ntw\ro\r\n")
    assert read_lines(path) == ["one", "", "tw\ro"]


def test_probes_and_classes_are_read_so(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + f"{SEPARATORS}\r\n\n \r\nanother\n".encode())
    assert label._probes(path) == [SEPARATORS, "another"]
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({SEPARATORS: 1}, ensure_ascii=False).encode())
    assert plot._classes(path, [SEPARATORS]) == ["1"]


def test_what_is_not_utf_8_is_refused_by_its_name(path: Path) -> None:
    path.write_bytes(b"caf\xe9")
    for read in (read_text, read_lines, read_json_object):
        with pytest.raises(ValueError, match=f"^{path} is not UTF-8 text, expected .*0xe9 in position 3"):
            read(path)


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # nothing writes to it: reading it would never end
    for name in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(ValueError, match=f"^{name} is not a file, expected a list"):
            read_lines(name, "a list")
    with pytest.raises(ValueError, match="none does not exist, expected a list"):
        read_lines(tmp_path / "none", "a list")
    with pytest.raises(ValueError, match=r"cannot be read, expected a list: .*File name too long"):
        read_lines(tmp_path / ("x" * 300), "a list")


def test_a_file_that_is_too_large_is_refused_before_it_is_read(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(ValueError, match=f"^{path} has 1,099,511,627,776 bytes, expected .* of at most 268,435,456"):
        read_text(path)
    path.write_text("four")
    assert read_text(path, most_bytes=4) == "four"
    with pytest.raises(ValueError, match="has 4 bytes, expected a text file of at most 3"):
        read_text(path, most_bytes=3)


@pytest.mark.parametrize("text", ['{"a": [1, 2.5, null, "é"]}', "3", "[]", '"x"', "-0.0", "1e400"])
def test_json_is_that_of_python(text: str) -> None:
    assert parse_json(text, "here") == parse_json(text.encode(), "here") == json.loads(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "here is not valid JSON, expected a number"),
        ("{'a': 1}", "here is not valid JSON, expected a number: Expecting property name"),
        ("[" * 100_000, "here is nested too deeply, expected a number"),
        ('{"a":' * 100_000, "here is nested too deeply, expected a number"),
        ("1" * 5000, "here is not valid JSON, expected a number: Exceeds the limit"),
        (b"\xff\xfe\x00", "here is not valid JSON, expected a number"),
    ],
)
def test_what_is_not_json_is_refused_by_where_it_stands(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        parse_json(text, "here", "a number")


@pytest.mark.parametrize(("text", "kind"), [("[1]", "list"), ("3", "int"), ("null", "NoneType")])
def test_json_of_another_kind_than_an_object_is_refused(text: str, kind: str, path: Path) -> None:
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^{path} holds a {kind}, expected a JSON object"):
        read_json_object(path)


# --- Writing ------------------------------------------------------------------------------------------------


@contextmanager
def files_of_at_most(n_bytes: int) -> Iterator[None]:
    """Limits file sizes, as on a disk with ``n_bytes`` left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _torch(path: Path) -> None:
    torch.save({"a": torch.zeros(100_000)}, path)


def _safetensors(path: Path) -> None:
    save_file({"a": torch.zeros(100_000)}, path)


def _text(path: Path) -> None:
    path.write_text("x" * 400_000)


@pytest.mark.parametrize("write", [_torch, _safetensors, _text])
def test_a_full_disk_is_an_error_of_the_system_that_names_the_file_and_leaves_what_was_there(
    write: Any, path: Path
) -> None:
    path.write_text("what was there")
    with pytest.raises(OSError, match=f"File too large: '{path}'"), files_of_at_most(200_000), replaces(path) as new:
        write(new)
    assert path.read_text() == "what was there"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("write", [_torch, _safetensors, _text])
def test_what_cannot_be_made_is_an_error_of_the_system(write: Any) -> None:
    with pytest.raises(OSError, match="/proc/here") as caught, replaces("/proc/here/file") as new:
        write(new)
    assert caught.value.errno is not None


@pytest.mark.parametrize("error", [RuntimeError("another"), ValueError("another"), KeyboardInterrupt()])
def test_another_error_stays_what_it_is(error: BaseException, path: Path) -> None:
    def fail() -> None:
        with replaces(path) as new:
            new.write_text("half")
            raise error

    with pytest.raises(type(error)) as caught:
        fail()
    assert caught.value is error
    assert list(path.parent.iterdir()) == []


def test_what_is_written_is_there_whole(tmp_path: Path) -> None:
    write_json(tmp_path / "deep" / "file.json", {"é": [1, None]})
    assert read_json_object(tmp_path / "deep" / "file.json") == {"é": [1, None]}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["file.json"]
    with replaces(tmp_path / "tensors") as new:
        _torch(new)
    loaded = torch.load(io.BytesIO((tmp_path / "tensors").read_bytes()), weights_only=True)
    assert torch.equal(loaded["a"], torch.zeros(100_000))
