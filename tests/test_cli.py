import subprocess
import sys

import pytest
import torch

import mmfast
from mmfast import _dispatch
from mmfast.cli import main
from mmfast.ops import BACKENDS


def info(capsys):
    assert main(["info"]) == 0
    return capsys.readouterr().out


def test_info_names_versions_and_threads(capsys):
    lines = dict(line.split(maxsplit=1) for line in info(capsys).split("\n\n")[0].splitlines())
    assert lines["mmfast"] == mmfast.__version__
    assert lines["torch"] == torch.__version__
    assert lines["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert lines["threads"] == str(torch.get_num_threads())
    assert {"numpy", "triton", "cpu"} < lines.keys()


def test_info_says_of_every_backend_whether_it_can_run(capsys, backend):
    ops = [part.splitlines() for part in info(capsys).split("\n\n")[1:]]
    (lines,) = (lines for op, *lines in ops if op == "pairwise_lse")
    assert f"  cpu   {backend:<7} available" in lines


def test_info_says_what_evidence_stands_behind_each(capsys):
    for part in info(capsys).split("\n\n")[1:]:
        op, *lines = part.splitlines()
        for row in BACKENDS[op]:
            assert f"        {row.name:<7} {row.evidence}" in lines
            assert row.evidence


def test_info_says_why_not(capsys, monkeypatch):
    monkeypatch.setattr(_dispatch, "core_error", "the core is away")
    out = info(capsys)
    assert "  cpu   cpp     not available: the core is away" in out
    assert "cpu       the core is away" in out


@pytest.mark.skipif(_dispatch.core_error is not None, reason=str(_dispatch.core_error))
def test_info_names_the_level(capsys):
    out = info(capsys)
    assert f"level {_dispatch.core.isa()} of {', '.join(_dispatch.core.isa_levels())}" in out


def test_info_without_a_package(capsys, monkeypatch):
    def version(package):
        raise mmfast.cli.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(mmfast.cli.metadata, "version", version)
    assert "triton    not installed" in info(capsys)


def test_module_is_the_command():
    out = subprocess.run(
        [sys.executable, "-m", "mmfast", "info"], capture_output=True, text=True, check=True
    )
    assert out.stdout.startswith(f"mmfast    {mmfast.__version__}")


def test_no_command_is_an_error(capsys):
    with pytest.raises(SystemExit) as error:
        main([])
    assert error.value.code == 2
    assert "command" in capsys.readouterr().err
