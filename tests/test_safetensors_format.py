"""The safetensors format read by hand, against the library: the same tensors, and no growth in files or memory."""

from __future__ import annotations

import gc
import os
import random
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

from qwen_functional.safetensors_format import DISK_DTYPES, SafetensorsFile, parse_header, tensor_in


def some_tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = [(3, 5), (7,), (0, 4), (), (2, 3, 4), (1, 1)]
    floats = {f"{dtype}.{shape}": torch.randn(shape).to(dtype) for dtype in DISK_DTYPES.values() for shape in shapes}
    return floats | {"ids": torch.arange(3)}


def equal(found: Tensor, expected: Tensor) -> bool:
    same_bits = torch.equal(found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))
    return found.dtype == expected.dtype and found.shape == expected.shape and same_bits


def test_every_tensor_is_bit_for_bit_the_librarys(tmp_path: Path) -> None:
    save_file(some_tensors(), tmp_path / "file", metadata={"format": "pt"})
    content = bytearray((tmp_path / "file").read_bytes())
    expected, file = load_file(tmp_path / "file"), SafetensorsFile(tmp_path / "file")
    header = parse_header(content, "bytes")
    assert header == file.tensors
    assert header.keys() == expected.keys()
    for name, stored in header.items():
        assert stored.shape == tuple(expected[name].shape)
        if stored.dtype not in DISK_DTYPES:
            assert stored.dtype == "I64"
            continue
        assert equal(tensor_in(content, stored), expected[name])
        if not stored.shape:
            continue
        for start in range(stored.shape[0] + 1):
            for stop in range(start, stored.shape[0] + 1):
                assert equal(file.read_rows(stored, slice(start, stop)), expected[name][start:stop])
        into = torch.empty_like(expected[name])
        assert file.read_rows(stored, slice(0, stored.shape[0]), into) is into
        assert equal(into, expected[name])


def test_what_is_read_is_a_copy() -> None:
    content = bytearray(save({"a": torch.ones(3)}))
    stored = parse_header(content, "bytes")["a"]
    tensor_in(content, stored).zero_()
    assert torch.equal(tensor_in(content, stored), torch.ones(3))


def spoilt(content: bytes, rng: random.Random) -> bytes:
    """The file with bytes changed, cut out or inserted."""
    header = int.from_bytes(content[:8], "little") + 8
    at = rng.randrange(header if rng.random() < 0.6 else len(content))
    kind = rng.randrange(6)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
    if kind == 2:
        return content[:at] + content[at + rng.randrange(1, 9) :]
    if kind == 3:
        return content[:at] + rng.choice([b"0", b"9", b"-", b"{", b'"', b"1e9", b"null,"]) + content[at:]
    if kind == 4:  # the same length, with a wrong offset or size
        digits = [i for i in range(8, header) if content[i : i + 1].isdigit()]
        at = rng.choice(digits)
        return content[:at] + str(rng.randrange(10)).encode() + content[at + 1 :]
    length = (header - 8 + rng.choice([-8, -1, 1, 8, 1 << 40])) % (1 << 64)
    return length.to_bytes(8, "little") + content[8:]


def test_a_spoilt_file_is_refused_in_a_line_or_means_what_it_means_to_the_library() -> None:
    rng = random.Random(0)
    whole = save({f"layer.{i}": torch.randn(i % 3 + 1, 4) for i in range(8)} | {"half": torch.ones(4).half()})
    refused, accepted = [], 0
    for _ in range(2000):
        content = bytearray(spoilt(whole, rng))
        try:
            header = parse_header(content, "the file")
        except ValueError as error:
            refused.append((str(error), len(content)))
            continue
        if any(stored.dtype not in DISK_DTYPES for stored in header.values()):
            continue  # an unknown dtype, refused only when the tensor is read
        accepted += 1
        expected = load(bytes(content))
        assert header.keys() == expected.keys()
        assert all(equal(tensor_in(content, stored), expected[name]) for name, stored in header.items())
    assert len(refused) > 1000
    assert accepted > 50
    for message, size in refused:
        assert message.startswith(f"the file, of {size} bytes, is truncated or corrupt, expected a safetensors file")
        assert len(message) < 500
        assert message.isprintable()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}', "its header is not valid JSON"),
        ("[" * 100_000, "its header is not a JSON object"),
        ('{"a":' + "[" * 100_000, "its header is nested too deeply"),
        ('{"a": {"dtype": "F32", "shape": [1e400], "data_offsets": [0, 8]}}', "expected its dtype, shape and data_off"),
        ('{"a": {"dtype": "F32", "shape": [true, 2], "data_offsets": [0, 8]}}', "expected its dtype, shape and data"),
        ('{"a": {"dtype": "F32", "shape": [9223372036854775808], "data_offsets": [0, 8]}}', "expected its dtype, shap"),
        ('{"a": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 8]}}', "'a' has 8 bytes"),
        ('{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}', "'a' has 8 bytes, expected 12 for F32 [3]"),
        ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', "'a' begins at byte"),
        ('{"a": {"dtype": "I8", "shape": [1], "data_offsets": [8, 0]}}', "has data_offsets [8, 0], expected them"),
        ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', "expected them to end with the file"),
        ('{"a\\nb": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', r"names a tensor 'a\nb', expected p"),
        ('{"a": 5}', "'a' is 5, expected its dtype"),
    ],
)
def test_a_header_that_lies_is_refused(header: str, message: str, tmp_path: Path) -> None:
    content = len(header).to_bytes(8, "little") + header.encode() + bytes(8)
    (tmp_path / "file").write_bytes(content)
    for read in (lambda: parse_header(content, "the file"), lambda: SafetensorsFile(tmp_path / "file")):
        with pytest.raises(ValueError, match="is truncated or corrupt, expected a safetensors file") as caught:
            read()
        assert message in str(caught.value)


def test_a_header_of_a_gigabyte_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        file.write((1 << 30).to_bytes(8, "little"))
        file.truncate(1 << 33)  # sparse
    with pytest.raises(ValueError, match=r"its header has 1,073,741,824 bytes, expected at most"):
        SafetensorsFile(tmp_path / "file")


def test_a_file_that_is_replaced_is_read_as_it_was_and_one_that_is_cut_short_is_an_error(tmp_path: Path) -> None:
    save_file({"a": torch.arange(6.0).view(3, 2)}, tmp_path / "file")
    file = SafetensorsFile(tmp_path / "file")
    save_file({"a": torch.zeros(3, 2)}, tmp_path / "other")
    (tmp_path / "other").replace(tmp_path / "file")
    assert torch.equal(file.read_rows(file.tensors["a"], slice(1, 3)), torch.tensor([[2.0, 3.0], [4.0, 5.0]]))
    file = SafetensorsFile(tmp_path / "file")
    os.truncate(tmp_path / "file", file.tensors["a"].stop - 1)
    file.read_rows(file.tensors["a"], slice(0, 2))
    with pytest.raises(ValueError, match="file has become shorter, expected it unchanged"):
        file.read_rows(file.tensors["a"], slice(0, 3))


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_memory_and_files_are_flat_over_thousands_of_reads(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4, 4)}, tmp_path / "file")

    def use(times: int) -> None:
        for _ in range(times):
            file = SafetensorsFile(tmp_path / "file")
            for row in range(4):
                file.read_rows(file.tensors["a"], slice(row, row + 1))

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def traced() -> int:
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    use(200)
    gc.collect()
    files, before = len(os.listdir("/proc/self/fd")), resident()  # noqa: PTH208
    tracemalloc.start()
    use(100)
    grown = []
    for _ in range(3):
        first = traced()
        use(700)
        grown.append(traced() - first)
    tracemalloc.stop()
    # 2 bytes per read. A leak shows in every round; a growing table of the interpreter, in only one.
    assert min(grown) < 7_000
    assert resident() - before < 4 << 20  # the library's slices took 5 KB each: 40 MB
    assert len(os.listdir("/proc/self/fd")) == files  # noqa: PTH208
