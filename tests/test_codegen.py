import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels are compiled by triton")

ROOT = Path(__file__).resolve().parents[1]
if "bench" not in sys.modules:
    # bench/ is not installed and the root must stay off sys.path: the package is loaded by place
    spec = importlib.util.spec_from_file_location("bench", ROOT / "bench" / "__init__.py")
    sys.modules["bench"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["bench"])

from bench import codegen  # noqa: E402 (needs the package loaded above)
from bench.codegen import Job, Row  # noqa: E402


def test_kernels_compile_within_their_budgets():
    # the interpreter, once chosen, is all that a process can do
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.codegen", "--check", "--quick"],
        cwd=ROOT, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert " kernels compiled, 0 complaints" in done.stdout


@pytest.mark.slow
def test_every_kernel_compiles_within_its_budget():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.codegen", "--check"],
        cwd=ROOT, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def job(**options):
    return Job("kernel", None, 90, {}, {}, **options)


def test_complaints_name_what_is_wrong():
    fine = Row("kernel sm_90", "-", registers=128, shared=1000, mma="HGMMA x8")
    code = "ST.E.128 [R2], R4 ;"
    assert codegen.complaint_of(job(tensor_cores=True), fine, code) == ""
    for changed, said in (
        ({"spills": 3}, "spills 3 times"),
        ({"shared": 300_000}, "takes 300000 bytes of shared memory, and there are 232448"),
        ({"tensor_memory": 576}, "takes 576 columns of tensor memory, and there are 512"),
        ({"mma": "-"}, "has no tensor-core instruction"),
    ):
        row = Row(**{**vars(fine), **changed})
        assert codegen.complaint_of(job(tensor_cores=True), row, code) == said


@pytest.mark.parametrize(
    "line",
    [
        "REDG.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R5 ;",
        "RED.E.ADD.F32.FTZ.RN.STRONG.GPU [R2.64], R5 ;",
        "ATOMG.E.ADD.F32.FTZ.RN.STRONG.GPU PT, R5, desc[UR4][R2.64], R5 ;",
        "RED.E.ADD.F16x2.RN.STRONG.GPU [R2.64], R5 ;",
        "RED.E.ADD.BF16_V2.RN.STRONG.GPU [R2.64], R5 ;",
        "ATOM.E.ADD.F64.RN.STRONG.GPU PT, R4, [R2.64], R6 ;",
    ],
)
def test_atomic_float_additions_are_found(line):
    row = Row("kernel sm_90", "-")
    assert codegen.complaint_of(job(), row, line) == "adds floating-point numbers atomically"


@pytest.mark.parametrize(
    "line",
    ["ATOMG.E.EXCH.STRONG.GPU PT, R5, [R2.64], R5 ;", "REDUX.SUM UR4, R2 ;", "FADD R1, R2, R3 ;"],
)
def test_other_instructions_are_not(line):
    assert codegen.complaint_of(job(), Row("kernel sm_90", "-"), line) == ""


def test_check_speaks_in_sentences():
    rows = [
        Row("fits sm_80", "-", registers=100, shared=10),
        Row("grew sm_80", "-", registers=101, shared=11),
        Row("new sm_80", "-"),
        Row("spilled sm_80", "-", complaint="spills 2 times"),
    ]
    budget = {"registers": 100, "shared": 10}
    budgets = dict.fromkeys(("fits sm_80", "grew sm_80", "spilled sm_80"), budget)
    assert codegen.check(rows, budgets) == [
        "spilled sm_80 spills 2 times",
        "grew sm_80 takes 101 registers, and its budget is 100",
        "grew sm_80 takes 11 bytes of shared memory, and its budget is 10",
        "new sm_80 has no budget in codegen.json; --update writes one",
    ]


def test_budgets_are_those_of_the_report():
    budgets = json.loads(codegen.BUDGETS.read_text())["kernels"]
    report = codegen.REPORT.read_text()
    assert budgets
    assert [key for key in budgets if f"| {key} |" not in report] == []


def test_refuses_the_interpreter(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        codegen.main(["--check"])
    assert "the interpreter compiles nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--quick"], ["--arch", "90"], ["--check", "--update", "--quick"]]
)
def test_refuses_to_write_a_part(arguments, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit):
        codegen.main(arguments)
    assert "a part of the kernels can only be checked" in capsys.readouterr().err
