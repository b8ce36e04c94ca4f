"""Rows from every kind of file, read in pieces, and what is said of files that do not serve."""

import json
import struct
import zipfile

import numpy as np
import pytest
import torch

import mmfast
from mmfast.gap.files import open_rows

WORDS = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def rows(dtype=torch.float32, n=7, d=3):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(n)).to(dtype)


def save_safetensors(path, **tensors):
    header, data = {"__metadata__": {"made": "here"}}, b""
    for name, x in tensors.items():
        raw = x.contiguous().view(torch.uint8).numpy().tobytes()
        ends = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": WORDS[x.dtype], "shape": list(x.shape), "data_offsets": ends}
        data += raw
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + data)


def save_header(path, **entry):
    head = json.dumps({"x": {"dtype": "F32", "shape": [7, 3], "data_offsets": [0, 84], **entry}})
    path.write_bytes(len(head).to_bytes(8, "little") + head.encode() + bytes(84))


def assert_same(found, expected):
    assert found.shape == tuple(expected.shape)
    assert found.dtype == expected.dtype
    n = len(expected)
    for start, stop in ((0, n), (2, 5), (n - 1, n), (3, 3)):
        assert torch.equal(found.read(start, stop), expected[start:stop])
    index = torch.tensor([5, 0, 1, 1, n - 1])
    assert torch.equal(found.take(index), expected[index])
    assert found.take(index[:0]).shape == (0, expected.shape[1])
    # what was read is the caller's own
    found.read(0, 1).zero_()
    assert torch.equal(found.read(0, n), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trips(tmp_path, dtype):
    x, other = rows(dtype), rows(dtype, 9)
    stack = torch.stack([x, 2 * x])
    save_safetensors(tmp_path / "a.safetensors", x=x, other=other, stack=stack)
    torch.save(x, tmp_path / "a.pt")
    torch.save({"x": x, "other": other, "step": 3}, tmp_path / "b.pth")
    for name, key, expected in (
        ("a.safetensors", "x", x),
        ("a.safetensors", "other", other),
        ("a.safetensors", "stack:1", 2 * x),
        ("a.pt", None, x),
        ("b.pth", "other", other),
    ):
        found = open_rows(tmp_path / name, key)
        assert_same(found, expected)
        assert found.name == (name if key is None else f"{name}[{key}]")
    assert_same(open_rows(x), x)
    assert_same(open_rows(stack, 1), 2 * x)
    assert_same(open_rows(x.T.contiguous().T), x)
    shards = open_rows([str(tmp_path / "a.pt"), x[:2], x[2:3]])
    assert_same(shards, torch.cat([x, x[:3]]))
    assert shards.name == "a.pt to array (3 shards)"
    assert open_rows(shards) is shards
    if dtype == torch.bfloat16:
        return
    array = x.numpy()
    np.save(tmp_path / "a.npy", array)
    np.save(tmp_path / "big.npy", array.astype(array.dtype.newbyteorder(">")))
    np.save(tmp_path / "stack.npy", stack.numpy())
    np.savez(tmp_path / "one.npz", x=array)
    np.savez(tmp_path / "two.npz", x=array, other=other.numpy(), stack=stack.numpy())
    for name, key, expected in (
        ("a.npy", None, x),
        ("big.npy", None, x),
        ("stack.npy", "1", 2 * x),
        ("stack.npy", 0, x),
        ("one.npz", None, x),
        ("two.npz", "other", other),
        ("two.npz", "stack:1", 2 * x),
    ):
        assert_same(open_rows(tmp_path / name, key), expected)
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    assert_same(open_rows(mapped), x)
    assert open_rows(mapped).name == "a.npy"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_parquet(tmp_path, dtype):
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    x = rows(dtype)
    kind = arrow.from_numpy_dtype(x.numpy().dtype)
    flat = arrow.array(x.numpy().reshape(-1), kind)
    tables = {
        "fixed": {"x": arrow.FixedSizeListArray.from_arrays(flat, 3), "n": arrow.array(range(7))},
        "lists": {"x": arrow.ListArray.from_arrays(arrow.array(range(0, 22, 3), "int32"), flat)},
        "columns": {str(i): arrow.array(x[:, i].numpy(), kind) for i in range(3)},
    }
    for name, columns in tables.items():
        path = tmp_path / f"{name}.parquet"
        parquet.write_table(arrow.table(columns), path, row_group_size=3)
        assert_same(open_rows(path, "x" if name == "fixed" else None), x)
    ragged = {"x": arrow.array([[1.0], [1.0, 2.0]], arrow.list_(kind))}
    holes = {"x": arrow.array([[1.0], None], arrow.list_(kind))}
    for columns in (ragged, holes):
        path = tmp_path / "bad.parquet"
        parquet.write_table(arrow.table(columns), path)
        with pytest.raises(ValueError, match=r"^bad.parquet must have 1 numbers in every row$"):
            open_rows(path).read(0, 2)
    parquet.write_table(arrow.table({"x": flat, "n": arrow.array(range(21))}), path)
    with pytest.raises(TypeError, match="got columns of several types"):
        open_rows(path)
    whole = (tmp_path / "fixed.parquet").read_bytes()
    for bad in (whole[:40], whole[:-60] + b"\xff" * 50 + whole[-10:]):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"^bad.parquet is damaged or truncated: .+$"):
            open_rows(path)
    path.write_bytes(whole[:4] + b"\xff" * 60 + whole[64:])
    with pytest.raises(ValueError, match=r"^bad.parquet is damaged or truncated: .+$"):
        open_rows(path, "x").read(0, 7)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr("mmfast.gap._formats.import_module", missing)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(ValueError, match=r"^a.parquet: .parquet needs pyarrow \(pip install"):
        open_rows(tmp_path / "a.parquet")


def test_written_by_safetensors(tmp_path):
    saved = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    x = {"x": rows(torch.bfloat16)}
    saved.save_file(x, tmp_path / "a.safetensors")
    assert_same(open_rows(tmp_path / "a.safetensors"), x["x"])


def test_fingerprints(tmp_path):
    """Another key, other bytes, another time of writing: another fingerprint; else the same."""
    path, x = tmp_path / "a.npy", rows()
    np.save(path, torch.stack([x, x]).numpy())
    first, second = open_rows(path, 0), open_rows(path, 1)
    assert first.fingerprint == open_rows(str(path), "0").fingerprint != second.fingerprint
    np.save(path, torch.stack([x, x, x]).numpy())
    assert open_rows(path, 0).fingerprint != first.fingerprint
    assert open_rows(x).fingerprint == open_rows(x.clone()).fingerprint
    assert open_rows(x).fingerprint != open_rows(x + 1).fingerprint
    assert open_rows([x, x]).fingerprint == 2 * [open_rows(x).fingerprint]


def test_a_file_that_shrinks_is_an_error(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, rows().numpy())
    found = open_rows(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(OSError, match=r"a.npy is shorter than when it was opened"):
        found.read(0, 7)
    assert torch.equal(found.read(0, 6), rows()[:6])


def make(folder):
    """One file for each way to be of no use."""
    x = rows()
    array = x.numpy()
    np.save(folder / "good.npy", array)
    np.save(folder / "whole.npy", array.astype(int))
    np.save(folder / "words.npy", np.array([["a"]]))
    np.save(folder / "flat.npy", array[0])
    np.save(folder / "stack.npy", array[None])
    np.save(folder / "four.npy", array[None, None])
    np.save(folder / "empty.npy", array[:0])
    np.save(folder / "thin.npy", array[:, :0])
    np.save(folder / "turned.npy", np.asfortranarray(array))
    np.save(folder / "wide.npy", np.ones((2, 5), np.float32))
    np.save(folder / "half.npy", array.astype(np.float16))
    np.savez(folder / "two.npz", x=array, y=array)
    np.savez(folder / "none.npz")
    np.savez_compressed(folder / "packed.npz", x=array)
    with zipfile.ZipFile(folder / "words.npz", "w") as archive:
        archive.writestr("x", "no array")
    save_safetensors(folder / "a.safetensors", n=torch.ones(2, 2, dtype=torch.int64), x=x)
    (folder / "no.safetensors").write_bytes(b"short")
    (folder / "list.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]")
    data = (folder / "a.safetensors").read_bytes()
    (folder / "odd.safetensors").write_bytes(data.replace(b"[7, 3]", b"[9, 3]"))
    save_header(folder / "minus.safetensors", shape=[-7, -3])
    save_header(folder / "back.safetensors", data_offsets=[-8, 76])
    save_header(folder / "typed.safetensors", dtype=["F32"])
    data = (folder / "good.npy").read_bytes()
    (folder / "brace.npy").write_bytes(data.replace(b"}", b" ", 1))
    (folder / "bracket.npy").write_bytes(data.replace(b"3)", b"3 ", 1))
    (folder / "minus.npy").write_bytes(data.replace(b"(7, 3)", b"(-7,3)", 1))
    data = (folder / "two.npz").read_bytes()
    (folder / "sign.npz").write_bytes(data.replace(b"PK\x03\x04", b"PK\x03\x05", 1))
    place = data.index(b"PK\x01\x02") + 42
    (folder / "far.npz").write_bytes(data[:place] + struct.pack("<I", 1 << 20) + data[place + 4 :])
    torch.save(x.to_sparse(), folder / "sparse.pt")
    torch.save([x], folder / "list.pt")
    torch.save(x, folder / "new.pt")
    torch.save({"step": 3}, folder / "empty.pt")
    torch.save(x, folder / "old.pt", _use_new_zipfile_serialization=False)
    (folder / "junk.npy").write_bytes(b"junk")
    (folder / "words.txt").touch()
    (folder / "folder.npy").mkdir()
    for name, cut in (
        ("good.npy", 4),
        ("two.npz", 60),
        ("a.safetensors", 4),
        ("old.pt", 40),
        ("new.pt", 9),
    ):
        data = (folder / name).read_bytes()
        (folder / f"cut_{name}").write_bytes(data[:-cut])


@pytest.mark.parametrize(
    ("name", "key", "error", "message"),
    [
        ("gone.npy", None, FileNotFoundError, "gone.npy cannot be read: No such file"),
        ("folder.npy", None, IsADirectoryError, "folder.npy is a directory; name its files"),
        ("words.txt", None, ValueError, "^words.txt: suffix must be one of .npy, .*, got '.txt'"),
        ("junk.npy", None, ValueError, "^junk.npy is no .npy data: "),
        ("brace.npy", None, ValueError, "^brace.npy is no .npy data: "),
        ("bracket.npy", None, ValueError, "^bracket.npy is no .npy data: "),
        ("minus.npy", None, ValueError, r"^minus.npy is no .npy data: its shape is \[-7, 3\]$"),
        ("sign.npz", "x", ValueError, "^sign.npz is damaged: 'x' is not where it should begin$"),
        ("far.npz", "x", ValueError, "^far.npz is damaged: 'x' is not where it should begin$"),
        ("minus.safetensors", "x", ValueError, r": the shape of 'x' is \[-7, -3\]$"),
        ("back.safetensors", "x", ValueError, r"^back.saf.*: the place of 'x' is \[-8, 76\]$"),
        ("typed.safetensors", "x", TypeError, r"^typed.safetensors: 'x' must be .*\['F32'\]$"),
        ("sparse.pt", None, TypeError, "^sparse.pt: the array must be .*, got torch.sparse_coo$"),
        ("cut_good.npy", None, ValueError, "^cut_good.npy is truncated: it has 208 bytes of 212$"),
        ("cut_two.npz", None, ValueError, "^cut_two.npz is damaged or truncated: "),
        ("cut_a.safetensors", "x", ValueError, "^cut_a.safetensors is truncated: it has"),
        ("cut_old.pt", None, ValueError, "^cut_old.pt cannot be loaded by torch: "),
        ("cut_new.pt", None, ValueError, "^cut_new.pt cannot be loaded by torch: "),
        ("old.pt", None, ValueError, "^old.pt cannot be loaded by torch: mmap can only be used"),
        ("list.pt", None, ValueError, "^list.pt must hold a tensor or a dict of them, got list"),
        ("empty.pt", None, ValueError, "^empty.pt holds no arrays$"),
        ("none.npz", None, ValueError, "^none.npz holds no arrays$"),
        ("packed.npz", None, ValueError, "^packed.npz: 'x' is compressed .*by numpy.savez$"),
        ("words.npz", None, ValueError, "^words.npz is no .npy data: "),
        ("no.safetensors", None, ValueError, "^no.safetensors is no safetensors file, or trunc"),
        ("list.safetensors", None, ValueError, "^list.safetensors is no safetensors file: "),
        ("odd.safetensors", "x", ValueError, r"^odd.safetensors is no .*: 'x' is \[9, 3\] in"),
        ("two.npz", None, ValueError, "^two.npz holds several arrays, choose one by key: x, y$"),
        ("two.npz", "z", ValueError, "^two.npz has no key 'z', only: x, y$"),
        ("two.npz", "x:0", ValueError, r"^two.npz: 'x' must be \[A, N, D\] for a plane of it, got"),
        ("good.npy", "x", ValueError, "^good.npy holds one array without a name, got key 'x'$"),
        ("good.npy", 0, ValueError, r"^good.npy: the array must be \[A, N, D\] for a plane of it"),
        ("stack.npy", None, ValueError, r"is \[1, 7, 3\], not \[N, D\]: .* by key, '0' to '0'$"),
        ("stack.npy", 1, ValueError, "^stack.npy: the array has planes 0 to 0, got key 1$"),
        ("stack.npy", -1, ValueError, "^stack.npy holds one array without a name, got key '-1'$"),
        ("flat.npy", None, ValueError, r"^flat.npy: the array must be \[N, D\], got \[3\]$"),
        ("four.npy", None, ValueError, r"must be \[N, D\], got \[1, 1, 7, 3\]$"),
        ("whole.npy", None, TypeError, "^whole.npy: the array must be float16, .*, got int64$"),
        ("words.npy", None, TypeError, "must be float16, bfloat16, float32 or float64, got <U1$"),
        ("a.safetensors", "n", TypeError, "^a.safetensors: 'n' must be float16, .*, got I64$"),
        ("empty.npy", None, ValueError, r"^empty.npy: the array is empty, \[0, 3\]$"),
        ("thin.npy", None, ValueError, r"is empty, \[7, 0\]$"),
        ("turned.npy", None, ValueError, r"^turned.npy is stored by columns \(Fortran order\)"),
        (["good.npy", "wide.npy"], None, ValueError, "^wide.npy: rows must be 3 wide like those"),
        (["good.npy", "half.npy"], None, TypeError, "^half.npy: rows must be float32 like those"),
        ([], None, ValueError, "source must hold one shard or more, got none$"),
    ],
)  # fmt: skip
def test_messages(tmp_path, name, key, error, message):
    make(tmp_path)
    named = [tmp_path / it for it in name] if isinstance(name, list) else tmp_path / name
    with pytest.raises(error, match=message) as caught:
        open_rows(named, key)
    assert "\n" not in str(caught.value)


def test_what_is_no_source():
    with pytest.raises(TypeError, match="shards must be paths, tensors or arrays, got int"):
        open_rows([1, 2])
    with pytest.raises(ValueError, match="array is open already, choose its key before: got 1"):
        open_rows(open_rows(rows()), 1)
    with pytest.raises(TypeError, match="source must be a tensor or a numpy array, got int"):
        open_rows(1)
    with pytest.raises(ValueError, match=r"^array: the array must be \[N, D\], got \[3\]$"):
        open_rows(torch.ones(3))


@pytest.mark.parametrize("normalize", [True, False])
def test_measures_of_files_are_those_of_tensors(tmp_path, normalize):
    x, y = rows(n=500, d=24), rows(n=300, d=24)
    np.save(tmp_path / "x.npy", x.numpy())
    np.save(tmp_path / "x0.npy", x[:201].numpy())
    np.save(tmp_path / "x1.npy", x[201:].numpy())
    np.save(tmp_path / "y.npy", y.numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    sources = (str(tmp_path / "x.npy"), mapped, [tmp_path / "x0.npy", tmp_path / "x1.npy"])
    # blocks of 70 rows
    options = {"normalize": normalize, "budget": 70 * 24 * 4 * 8}
    for other in ([], [y]):
        expected = mmfast.cosine_stats(x, *other, bins=99, normalize=normalize)
        there = [tmp_path / "y.npy"] if other else []
        for source in sources:
            found = mmfast.cosine_stats(source, *there, bins=99, **options)
            for name in ("count", "nan", "min", "max", "argmin", "argmax", "below", "above"):
                assert getattr(found, name) == getattr(expected, name), name
            assert torch.equal(found.histogram, expected.histogram)
            assert found.moments == pytest.approx(expected.moments, abs=1e-12)
    expected = mmfast.modality_gap(x, y, normalize=normalize)
    found = mmfast.modality_gap(sources[0], y, **options)
    assert found.x_mean.dtype == torch.float32
    torch.testing.assert_close(found.vector, expected.vector, rtol=0, atol=1e-7)
    with pytest.raises(ValueError, match=r"modality_gap: array must be 24 wide like x.npy, got 3"):
        mmfast.modality_gap(sources[0], rows())
    with pytest.raises(ValueError, match="budget must be 49152 bytes or more for rows 24 wide, go"):
        mmfast.cosine_stats(mapped, budget=49151)
    with pytest.raises(TypeError, match="cosine_stats: budget must be an int, got float"):
        mmfast.cosine_stats(mapped, budget=1e9)
