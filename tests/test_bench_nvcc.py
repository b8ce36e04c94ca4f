"""What `bench.nvcc` reads out of the compiler's words, and what it says where there is none."""

import shutil

import pytest

from bench import nvcc

KERNEL = "_ZN6kernelI4PlanIfLi4ELi32ELi2EEE"
ONE_BY_ONE = "_ZN6kernelI4PlanIfLi1ELi32ELi0EEE"
PTXAS = """
ptxas info    : Compiling entry function '{0}' for 'sm_80'
ptxas info    : Function properties for {0}
    32 bytes stack frame, {1} bytes spill stores, {1} bytes spill loads
ptxas info    : Used 56 registers, used 1 barriers, 32 bytes cumulative stack size, 48 bytes smem
ptxas info    : Function properties for helper
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""
WIDE = "\t\tFunction : {0}\n /*0010*/ LDG.E.128 R4, [R2] ;\n /*0020*/ STG.E.EF.128 [R2], R4 ;\n"
NARROW = "\t\tFunction : {0}\n /*0010*/ LDG.E.64 R4, [R2] ;\n /*0020*/ STG.E.128 [R2], R4 ;\n"


@pytest.fixture(autouse=True)
def _no_demangler(monkeypatch):
    monkeypatch.setattr(nvcc, "_readable", lambda symbols: symbols)


def test_rows_are_what_the_compiler_said():
    assert nvcc.rows_of("sm_80", PTXAS.format(KERNEL, 0), WIDE.format(KERNEL)) == [
        {
            "kernel": KERNEL,
            "arch": "sm_80",
            "registers": 56,
            "stack_bytes": 32,
            "spill_bytes": 0,
            "shared_bytes": 48,
            "wide_loads": 1,
            "wide_stores": 1,
            "complaint": "",
        }
    ]


@pytest.mark.parametrize(
    ("symbol", "spilled", "code", "complaint"),
    [
        (KERNEL, 4, WIDE, "spills 8 bytes"),
        (KERNEL, 0, NARROW, "reads or writes fewer than 16 bytes at a time"),
        (ONE_BY_ONE, 0, NARROW, ""),
        (ONE_BY_ONE, 4, NARROW, "spills 8 bytes"),
    ],
)
def test_complaints(symbol, spilled, code, complaint):
    (row,) = nvcc.rows_of("sm_80", PTXAS.format(symbol, spilled), code.format(symbol))
    assert row["complaint"] == complaint


def test_missing_tools_are_a_reason(monkeypatch):
    monkeypatch.setattr(nvcc, "_tool", lambda name: None)
    rows = nvcc.cuda_rows(["80", "90a"])
    assert {row["arch"] for row in rows} == {"sm_80", "sm_90a"}
    assert all(row["reason"] == "nvcc and cuobjdump not found" for row in rows)
    assert {"slerp", "sparsemax"} <= {row["kernel"] for row in rows}


@pytest.mark.skipif(nvcc._tool("nvcc") is None, reason="no nvcc here")
def test_compile_error_is_a_reason(monkeypatch, tmp_path):
    (tmp_path / "wrong.cu").write_text("__global__ void kernel() { undeclared(); }\n")
    monkeypatch.setattr(nvcc, "SOURCES", [tmp_path / "wrong.cu"])
    monkeypatch.setattr(nvcc, "_tool", lambda name: shutil.which(name) or f"{nvcc.TOOLKIT}/{name}")
    (row,) = nvcc.cuda_rows(["80"])
    assert row["kernel"] == "wrong"
    assert "undeclared" in row["reason"]


@pytest.mark.slow
@pytest.mark.skipif(
    nvcc._tool("nvcc") is None or nvcc._tool("cuobjdump") is None, reason="no nvcc or cuobjdump"
)
@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_kernels_do_not_spill_and_read_16_bytes_at_a_time(arch):
    rows = nvcc.cuda_rows([arch])
    assert len(rows) >= 96
    assert not [row for row in rows if row.get("reason") or row["complaint"]]
