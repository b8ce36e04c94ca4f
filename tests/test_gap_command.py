"""`mmfast gap`: its output, its one line for each error, its exit codes, and how it goes on."""

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from mmfast.cli import main
from mmfast.gap.report import command, pictures

N, D = 100, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of every kind, good and bad."""
    folder = tmp_path_factory.mktemp("files")
    random = np.random.default_rng(0)
    x = random.normal(size=(N, D)).astype(np.float32)
    y = (x + random.normal(size=(N, D)) + 0.5).astype(np.float32)
    np.save(folder / "x.npy", x)
    np.save(folder / "y.npy", y)
    np.save(folder / "both.npy", np.stack([x, y]))
    np.save(folder / "short.npy", y[:70])
    np.save(folder / "thin.npy", y[:, :4])
    np.save(folder / "nan.npy", np.where(np.arange(N)[:, None] == 7, np.nan, y))
    np.save(folder / "zero.npy", np.where(np.arange(N)[:, None] == 7, 0, y))
    np.savez(folder / "many.npz", text=y, other=x)
    np.save(folder / "labels.npy", np.arange(N) // 2)
    np.save(folder / "words.npy", np.array(["a", None], dtype=object))
    (folder / "empty.npy").touch()
    (folder / "cut.npy").write_bytes((folder / "y.npy").read_bytes()[:-100])
    (folder / "cut.npz").write_bytes((folder / "many.npz").read_bytes()[:-100])
    (folder / "y.csv").write_text("1,2\n")
    (folder / "none").mkdir()
    for half, name in enumerate(("shard-0.npy", "shard-1.npy")):
        (folder / "shards").mkdir(exist_ok=True)
        np.save(folder / "shards" / name, y[half * 50 : half * 50 + 50])
    return folder


@pytest.fixture(autouse=True)
def _inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


@pytest.fixture
def undrawn(monkeypatch):
    """Reports without the seconds that pictures take."""
    monkeypatch.setattr(pictures, "rendered", lambda figure, form: b"<svg><defs></defs></svg>")


def gap(capsys, *arguments):
    """Exit code, stdout and stderr of `mmfast gap`."""
    code = main(["gap", *arguments])
    return code, *capsys.readouterr()


def as_json(capsys, *arguments):
    """The survey that is printed."""
    code, out, err = gap(capsys, *arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)["survey"]


def test_as_a_process(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mmfast", "gap", "x.npy", "y.npy", "--out", str(tmp_path / "new")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["Each", "side", "x.npy", "y.npy"]
    assert any(line.startswith("How wide is the gap? ") for line in lines)
    assert lines[-1] == f"See {tmp_path / 'new' / 'report.html'}"
    assert max(map(len, lines[:-1])) <= 92
    written = json.loads((tmp_path / "new" / "report.json").read_text())
    assert written["survey"]["paired"] == N


def test_sources_and_keys_are_one_thing(capsys):
    """A folder, a pattern and planes of one array hold the same rows."""

    def numbers(*arguments):
        found = as_json(capsys, *arguments)
        for side in (found["x"], found["y"]):
            del side["name"]
        return {**found, "seconds": 0, "notes": None}

    plain = numbers("x.npy", "y.npy")
    for arguments in (
        ("x.npy", "shards"),
        ("x.npy", "shards/*.npy"),
        ("both.npy", "both.npy", "--keys", "0", "1"),
        ("many.npz", "many.npz", "--keys", "other", "text"),
    ):
        assert numbers(*arguments) == plain
    assert (
        numbers("many.npz", "many.npz", "--key", "text")["gap"]["x_mean"]
        == (plain["gap"]["y_mean"])
    )


def test_options_arrive(capsys):
    found = as_json(
        capsys,
        *("x.npy", "y.npy", "--logit-scale", "20", "--bins", "64", "--budget", "1.5M"),
    )
    options = found["options"]
    assert (options["logit_scale"], options["bins"]) == (20, 64)
    assert options["budget"] == 3 << 19
    assert len(found["pairs"]["histogram"]) == 64


def test_labels_for_both_or_each(capsys):
    one = as_json(capsys, "x.npy", "y.npy", "--labels", "labels.npy")
    two = as_json(capsys, "x.npy", "y.npy", "--labels", "labels.npy", "labels.npy")
    assert one["labelled"]
    assert one["retrieval"] == two["retrieval"]
    assert one["retrieval"] != as_json(capsys, "x.npy", "y.npy")["retrieval"]


def test_rows_of_nan_and_zeros(capsys):
    found = as_json(capsys, "x.npy", "nan.npy", "--skip-nan")
    assert (found["y"]["nan_rows"], found["y"]["first_nan_rows"], found["paired"]) == (1, [7], 99)
    assert as_json(capsys, "x.npy", "zero.npy")["y"]["zero_rows"] == 1
    code, out, _ = gap(capsys, "x.npy", "zero.npy")
    assert code == 0
    assert next(line for line in out.splitlines() if "zeros" in line).split()[-2:] == ["0", "1"]


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_nobody_reads_on(capsys, monkeypatch, form):
    """Not a word, not when python flushes what is left either."""
    ours, theirs = os.pipe()
    os.close(ours)
    with os.fdopen(theirs, "w") as out, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        assert main(["gap", "x.npy", "y.npy", *form]) == 141
    assert capsys.readouterr() == ("", "")


def test_a_terminal_of_few_letters(capsys, monkeypatch, tmp_path):
    np.save(tmp_path / "日.npy", np.load("y.npy"))
    out = io.TextIOWrapper(io.BytesIO(), "latin-1")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        assert main(["gap", "x.npy", str(tmp_path / "日.npy")]) == 0
    assert capsys.readouterr() == ("", "")
    text = out.buffer.getvalue().decode("latin-1")
    assert "?.npy" in text
    # the least cosine in the table and in the words
    assert len(re.findall(r"-0\.\d{3}\b", text)) > 2
    assert not re.search(r"\?0\.\d{3}\b", text)


def test_what_cannot_be_printed_is_one_line(capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(command, "tables", full)
    code, out, err = gap(capsys, "x.npy", "y.npy")
    assert (code, out) == (1, "")
    assert err == f"mmfast gap: [Errno {errno.ENOSPC}] No space left on device\n"


def test_quiet_says_nothing(capsys):
    assert gap(capsys, "x.npy", "y.npy", "--quiet") == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["x.npy", "short.npy"], "short.npy has 70 rows and x.npy has 100: without labels row i"),
        (["x.npy", "thin.npy"], "thin.npy: rows must be 8 wide like those of x.npy, got 4"),
        (["x.npy", "nan.npy"], "nan.npy: 1 of 100 rows hold NaN or infinity (rows 7); --skip-nan"),
        (["x.npy", "many.npz"], "many.npz holds several arrays, choose one by key: other, text"),
        (["x.npy", "many.npz", "--key", "z"], "x.npy holds one array without a name, got key 'z'"),
        (["x.npy", "many.npz", "--keys", "", "z"], "many.npz has no key 'z', only: other, text"),
        (["x.npy", "cut.npy"], "cut.npy is truncated"),
        (["x.npy", "missing.npy"], "missing.npy cannot be read: No such file"),
        (["x.npy", "y.csv"], "y.csv: suffix must be one of .npy"),
        (["x.npy", "none"], "none has no file that ends in .npy"),
        (["x.npy", "no-*.npy"], "no-*.npy matches no file"),
        (["x.npy", "y.npy", "--logit-scale", "0"], "logit_scale must be positive, got 0"),
        (["x.npy", "y.npy", "--bins", "-1"], "bins must be from 0 to 65536, got -1"),
        (["x.npy", "y.npy", "--budget", "1"], "budget must be "),
        (["x.npy", "y.npy", "--labels", "x.npy"], "labels must be"),
        (["x.npy", "y.npy", "--labels", "words.npy"], "words.npy is no .npy file of integers"),
        (["x.npy", "y.npy", "--labels", "empty.npy"], "empty.npy is no .npy file of integers"),
        (["x.npy", "y.npy", "--labels", "cut.npz"], "cut.npz is no .npy file of integers"),
        (["x.npy", "y.npy", "--labels", *["labels.npy"] * 3], "--labels takes one file or two, go"),
        (["x.npy", "y.npy", "--out", "y.csv"], "y.csv: File exists"),
    ],
)
def test_data_that_cannot_be_used_is_one_line(capsys, arguments, line):
    code, out, err = gap(capsys, *arguments)
    assert (code, out) == (1, "")
    assert err.startswith(f"mmfast gap: {line}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["x.npy"], "the following arguments are required: TEXTS"),
        (["x.npy", "y.npy", "--budget", "5x"], "a size must be like 512M or 2G, got '5x'"),
        (["x.npy", "y.npy", "--resume"], "--resume keeps its state in --out DIR, and there is"),
        (["x.npy", "y.npy", "--key", "a", "--keys", "b", "c"], "not allowed with argument --key"),
    ],
)
def test_wrong_usage(capsys, arguments, line):
    with pytest.raises(SystemExit) as error:
        main(["gap", *arguments])
    assert error.value.code == 2
    assert line in capsys.readouterr().err


def test_full_disk_is_one_line(capsys, monkeypatch, tmp_path, undrawn):
    def fsync(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    code, out, err = gap(capsys, "x.npy", "y.npy", "--out", str(tmp_path))
    assert (code, out) == (1, "")
    assert "No space left on device" in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


class Interrupting(command._Progress):
    """Ctrl-C after the third step."""

    def __call__(self, *told):
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps == 3:
            os.kill(os.getpid(), signal.SIGINT)


def test_interrupt_and_resume(capsys, monkeypatch, tmp_path, undrawn):
    arguments = ["x.npy", "y.npy", "--out", str(tmp_path), "--resume", "--quiet"]
    with monkeypatch.context() as patch:
        patch.setattr(command, "_Progress", Interrupting)
        assert gap(capsys, *arguments) == (
            130,
            "",
            "mmfast gap: interrupted; run it again to go on\n",
        )
        told = gap(capsys, "x.npy", "y.npy")
        assert told[0] == 130
        assert "with --resume it would go on from here" in told[2]
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]
    # other options and other data are refused
    code, _, err = gap(capsys, *arguments, "--bins", "32")
    assert (code, err.count("\n")) == (1, 1)
    assert "bins 256, not 32" in err
    changed = tmp_path.parent / "changed.npy"
    np.save(changed, np.load("y.npy"))
    code, _, err = gap(capsys, "x.npy", str(changed), *arguments[2:])
    assert (code, err.count("\n")) == (1, 1)
    assert "y.npy, not changed.npy" in err
    assert gap(capsys, *arguments) == (0, "", "")
    assert not (tmp_path / "state.pt").exists()
    resumed = json.loads((tmp_path / "report.json").read_text())["survey"]
    assert {**resumed, "seconds": 0} == {**as_json(capsys, "x.npy", "y.npy"), "seconds": 0}


def test_progress_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(command.time, "monotonic", iter(range(10**6)).__next__)
    code, out, err = gap(capsys, "x.npy", "y.npy")
    assert code == 0
    assert "left" not in out
    drawn = err.split("\r\x1b[K")
    assert len(drawn) > 3
    # the line is gone before anything else is printed
    assert drawn[-1] == ""
    shares = [int(line.partition("%")[0]) for line in drawn[1:-1]]
    assert shares == sorted(shares)
    assert 0 <= shares[0] < shares[-1] <= 100


def test_clock():
    assert command._clock(59.6) == "1:00"
    assert command._clock(3 * 3600 + 61) == "3:01:01"


def test_help_names_the_formats(capsys):
    with pytest.raises(SystemExit) as error:
        main(["gap", "--help"])
    assert error.value.code == 0
    assert ".safetensors" in capsys.readouterr().out


def test_tensors_of_torch_are_read(capsys, tmp_path):
    torch.save(torch.randn(20, D), tmp_path / "x.pt")
    np.save(tmp_path / "y.npy", np.random.default_rng(0).normal(size=(20, D)))
    found = as_json(capsys, str(tmp_path / "x.pt"), str(tmp_path / "y.npy"))
    assert (found["x"]["dtype"], found["y"]["dtype"]) == ("float32", "float64")
