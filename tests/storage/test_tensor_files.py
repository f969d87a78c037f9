"""safetensors files, also damaged and hostile ones."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fedtune.errors import ModelError
from fedtune.inference.engine.reference.tensors import as_tensor
from fedtune.storage.tensor_files import DTYPES, StoredTensor, read_header

NUMBERS = bytes(range(16))


def tensor(dtype: Any = "F32", shape: Any = (4,), begin: Any = 0, end: Any = 16, **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


def write(path: Path, header: Any, data: bytes = NUMBERS, length: int | None = None) -> Path:
    """A file with a header, an object or its text, that may declare another length."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def read_all(path: Path) -> dict[str, Any]:
    return {name: stored.read() for name, stored in read_header(path)[0].items()}


def test_every_dtype_and_shape_is_read_as_safetensors_reads_it(tmp_path: Path) -> None:
    path, dtypes = tmp_path / "x.safetensors", (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32)
    tensors = {f"{t}": torch.arange(-3000, 3000).reshape(3, 20, 100).to(t) for t in dtypes}
    # 255 bytes, so later tensors are not aligned
    tensors |= {"i8": torch.arange(-128, 128, dtype=torch.int8), "u8": torch.arange(256, dtype=torch.uint8)[1:]}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(3, 0, 2), "half": torch.randn(1001).bfloat16()}
    save_file(tensors, path, {"format": "pt", "more": "ü"})
    found, metadata = read_header(path)
    assert metadata == {"format": "pt", "more": "ü"} and {x.dtype for x in found.values()} == set(DTYPES)
    read = read_all(path)
    assert all(torch.equal(as_tensor(read[name]), wanted) for name, wanted in tensors.items()) and read.keys() == tensors.keys()
    before = path.read_bytes()
    read["half"][:] = 0  # a private copy: the file does not change
    assert path.read_bytes() == before


LARGE = 2**40
DAMAGED: dict[str, Any] = {
    "not JSON": b'{"a":', "not UTF-8": b'{"\xff": 1}', "a list": [], "a number": b"7", "deep": b'{"a":' + b"[" * 100_000,
    "no entry": {"a": 3}, "no dtype": {"a": {"shape": [4], "data_offsets": [0, 16]}}, "no offsets": {"a": {"dtype": "F32", "shape": [4]}},
    "wrong dtype": {"a": tensor("F31")}, "a list as dtype": {"a": tensor(["F32"])}, "wrong size": {"a": tensor(shape=[5])},
    "a number as shape": {"a": tensor(shape=4)}, "half a size": {"a": tensor(shape=[4.0])}, "negative size": {"a": tensor(shape=[-4])},
    "sizes that overflow": {"a": tensor(shape=[LARGE, LARGE])}, "sizes that overflow to 0": {"a": tensor(shape=[2**32, 2**32], end=0)},
    "negative offset": {"a": tensor(begin=-16, end=0)}, "offsets that overflow": {"a": tensor(begin=2**64 - 16, end=2**64)},
    "offsets past the end": {"a": tensor(begin=16, end=32)}, "swapped offsets": {"a": tensor(begin=16, end=0)},
    "a gap": {"a": tensor(shape=[1], end=4), "b": tensor(shape=[2], begin=8)}, "overlap": {"a": tensor(), "b": tensor()},
    "one name twice": b'{"a":%b,"a":%b}' % (json.dumps(tensor(shape=[8], end=32)).encode(), json.dumps(tensor(shape=[1], end=4)).encode()),
    "metadata of numbers": {"a": tensor(), "__metadata__": {"x": 3}}, "a list as metadata": {"a": tensor(), "__metadata__": []},
    "too many axes": {"a": tensor(shape=[1] * 100 + [4])},
    "an empty tensor of many": {"a": tensor(), "b": tensor(shape=[0, LARGE, LARGE], begin=16)},
    "numbers that the engine has not": {"a": tensor("BOOL", shape=[16])},
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_header_gives_a_one_sentence_error(damage: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", DAMAGED[damage])
    with pytest.raises(ModelError, match=r"x\.safetensors") as caught:
        read_all(path)
    assert len(str(caught.value)) < 250 + len(str(path)) and "\n" not in str(caught.value)


def test_metadata_may_be_null(tmp_path: Path) -> None:
    assert read_header(write(tmp_path / "x", {"a": tensor(), "__metadata__": None}))[1] == {}


def test_lengths_that_do_not_match_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"a": tensor()})
    whole = path.read_bytes()
    assert read_all(path)["a"].tobytes() == NUMBERS
    for end in (*range(0, len(whole), 7), len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(ModelError, match="not a valid safetensors file"):
            read_header(path)
    for length in (0, 1, 1 << 20, (1 << 25) + 1, 1 << 62, (1 << 64) - 1):
        with pytest.raises(ModelError, match="not a valid safetensors file"):
            read_header(write(path, {"a": tensor()}, length=length))
    with pytest.raises(ModelError, match="not a valid safetensors file"):
        read_header(write(path, {"a": tensor()}, NUMBERS + b"0"))


def test_a_path_that_is_not_a_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # a reader of a pipe would wait forever
    for name in ("pipe", "", "missing"):
        with pytest.raises(ModelError, match="not a valid safetensors file"):
            read_header(tmp_path / name)


def test_a_file_that_changes_after_its_header_was_read_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"a": tensor(shape=[4096], end=16384)}, bytes(16384))
    stored = read_header(path)[0]["a"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match="cannot be read .*: it is damaged"):
        stored.read()
    path.unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        stored.read()


@pytest.mark.parametrize(
    ("shape", "begin"), [((4,), -16), ((4,), 2**63), ((4,), 2**70), ((2**61,), 8), ((LARGE, LARGE), 8), ((-4,), 8192), ((-1, 0), 8)]
)
def test_numbers_of_another_header_are_refused(shape: tuple[int, ...], begin: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(bytes(16384))
    with pytest.raises(ModelError, match="cannot be read"):
        StoredTensor("a", "F32", shape, path, begin, 16).read()


def test_a_huge_header_that_is_allowed_is_parsed(tmp_path: Path) -> None:
    names = {f"{i:06d}": tensor("U8", shape=[0], end=0) for i in range(20_000)}
    found, _ = read_header(write(tmp_path / "x", names, b""))
    assert len(found) == 20_000 and np.size(found["000007"].read()) == 0
