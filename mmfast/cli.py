"""The command `mmfast`."""

import argparse
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata

import torch

import mmfast
from mmfast import _dispatch
from mmfast.ops import BACKENDS


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv` (default: the process's own) and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if list(argv[:1]) == ["gap"]:
        # imported here: `info` needs none of it
        from mmfast.gap.report import command

        return command.main(argv[1:])
    parser = argparse.ArgumentParser(prog="mmfast", description=mmfast.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("gap", help="how two modalities lie to each other, from two files")
    commands.add_parser("info", help="versions, devices, and each op's backends")
    parser.parse_args(argv)
    print("\n".join(info()))
    return 0


def info() -> Iterator[str]:
    """The lines of `mmfast info`."""
    yield f"mmfast    {mmfast.__version__}"
    yield f"python    {platform.python_version()}"
    yield f"torch     {torch.__version__}"
    # the metadata knows the version without an import
    for package in ("numpy", "triton"):
        yield f"{package:<9} {_version(package)}"
    yield f"cpu       {_cpu()}"
    yield f"threads   {torch.get_num_threads()}"
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        for i in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(i)
            yield (
                f"cuda:{i}    {card.name}, capability {card.major}.{card.minor}, "
                f"{card.total_memory / 2**30:.0f} GiB"
            )
    else:
        yield "cuda      no device"
    for op, table in BACKENDS.items():
        yield ""
        yield op
        for device in devices:
            probe = torch.ones(1, 1, device=device)
            for row in table:
                reason = row.refusal(probe, probe)
                state = "available" if reason is None else f"not available: {reason}"
                yield f"  {device:<5} {row.name:<7} {state}"
        for row in table:
            yield f"        {row.name:<7} {row.evidence}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    if _dispatch.core_error is not None:
        return _dispatch.core_error
    built = ", ".join(f"{key} {value}" for key, value in _dispatch.core.build_info().items())
    levels = ", ".join(_dispatch.core.isa_levels())
    return f"level {_dispatch.core.isa()} of {levels} (core built with {built})"
