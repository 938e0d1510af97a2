"""Files are read as they were written, and what is no whole file is refused."""

import json

import numpy as np
import pytest

from moejax.errors import UserError
from moejax.interop.safetensors import INDEX, open_folder, write_folder

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float32), "c": np.zeros((0, 2))}


def write(folder, size=10**9):
  write_folder(folder, [(n, a.shape) for n, a in TENSORS.items()], iter(TENSORS.values()), "F32", size)


@pytest.mark.parametrize("size", [10**9, 30], ids=["one file", "two files"])
def test_what_is_written_is_read(size, tmp_path):
  write(tmp_path, size)
  files = open_folder(tmp_path)
  assert set(files.places) == set(TENSORS) and (tmp_path / INDEX).exists() == (size == 30)
  for name, array in TENSORS.items():
    np.testing.assert_array_equal(files.read(name), array)


def test_the_library_of_hugging_face_reads_it_and_is_read(tmp_path):
  library = pytest.importorskip("safetensors.numpy", reason="needs safetensors")
  write(tmp_path)
  read = library.load_file(tmp_path / "model.safetensors")
  for name, array in TENSORS.items():
    np.testing.assert_array_equal(read[name], array)
  library.save_file({"d": np.full((3,), 0.5, np.float16)}, tmp_path / "model.safetensors")
  assert open_folder(tmp_path).read("d").tolist() == [0.5] * 3


def test_what_is_no_whole_file_is_refused(tmp_path):
  with pytest.raises(UserError, match=r"has no \.safetensors file$"):
    open_folder(tmp_path)
  (tmp_path / "pytorch_model.bin").touch()
  with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle file, which moejax does not load"):
    open_folder(tmp_path)
  write(tmp_path)
  path = tmp_path / "model.safetensors"
  whole = path.read_bytes()
  length = int.from_bytes(whole[:8], "little")
  header = json.loads(whole[8 : 8 + length])

  def with_header(content):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text + whole[8 + length :]

  for content, message in (
    (whole[:-1], "it has"), (whole[:20], "its header would have"), (b"", "its header"),
    (with_header(b"{..}"), "is not a complete safetensors file"),
    (with_header({"a": header["a"] | {"shape": [2, 4]}}), r"a of shape \(2, 4\) has 24 bytes"),
    (with_header({"a": header["a"] | {"dtype": "I64"}}), "a has dtype=I64; moejax reads F64, F32, F16, BF16"),
    (with_header({"a": {"dtype": "F32"}}), "in its header"), (with_header([1]), "in its header"),
    (with_header({"a": header["a"] | {"data_offsets": [-24, 0]}}), r"data_offsets=\[-24, 0\]"),
    (with_header({"a": header["a"] | {"shape": [-2, -3]}}), r"shape=\(-2, -3\)"),
    (with_header({"a": header["a"] | {"shape": [2.0, 3.0]}}), r"shape=\(2\.0, 3\.0\)"),
    (with_header({"a": header["a"] | {"shape": [10**30, 0], "data_offsets": [0, 0]}}), "has shape="),
    (with_header({"a": header["a"], "b": header["a"]}), "b begins at byte"),
    (with_header({"b": header["b"]}), "b begins at byte"), (whole + b"\0", "it has"),
    (with_header(b"[" * 10**5), "is not a complete safetensors file"),
  ):  # fmt: skip
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
      open_folder(tmp_path)


def test_an_index_must_have_the_tensors_of_its_files_and_none_elsewhere(tmp_path):
  write(tmp_path, 30)
  index = json.loads((tmp_path / INDEX).read_text())
  for weight_map, message in (
    (index["weight_map"] | {"z": "model-00001-of-00002.safetensors"}, "do not have the same tensors: z"),
    ({"a": "../secret.safetensors"}, "names files of another folder"), ([], "is not an index"),
    ({"a": ".."}, "cannot be read"), ({"a": "gone.safetensors"}, "cannot be read"), (None, "is not an index"),
  ):  # fmt: skip
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=message):
      open_folder(tmp_path)


def test_a_value_that_a_dtype_cannot_represent_is_refused(tmp_path):
  large = np.array([1.0, -70_000.0, np.inf], np.float32)
  with pytest.raises(UserError, match=r"w has the value 70000, which is too large for float16; use --dtype bfloat16"):
    write_folder(tmp_path, [("w", large.shape)], iter([large]), "F16")
  assert not list(tmp_path.glob("*.safetensors"))
  write_folder(tmp_path, [("w", large.shape)], iter([large]), "BF16")
  np.testing.assert_array_equal(np.isfinite(open_folder(tmp_path).read("w").astype(np.float32)), np.isfinite(large))
