"""What the compiler made of the product loops: sums kept in memory cost speed, silently."""

import platform
import re
import shutil
import subprocess

import pytest

from mmfast import _dispatch

core = getattr(_dispatch, "core", None)
pytestmark = [
    pytest.mark.skipif(core is None, reason="no compiled core"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86 instructions"),
    pytest.mark.skipif(not shutil.which("objdump"), reason="objdump is not installed"),
]

LINE = re.compile(r"^ *([0-9a-f]+):\t(\S+) *(\S*)")
PRODUCT = re.compile(r"vfmadd|vdpbf16ps")
# a tile is 6 rows by 4 vectors of 512 bits or 2 of 256; a loop adds to each of them once a step
TILES = {"zmm": 24, "ymm": 12}


def loops():
    """Bodies of the innermost loops of at most 120 instructions, as (name, operands)."""
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", core.__file__],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    seen, places = [], {}
    for line in listing.splitlines():
        if not (match := LINE.match(line)):
            continue
        address, name, operands = match.groups()
        start = places.get(operands) if name.startswith("j") else None
        if start is not None and len(seen) - start <= 120:
            body = seen[start:]
            if not any(inner.startswith("j") for inner, _ in body):
                yield body
        places[address] = len(seen)
        seen.append((name, operands))


@pytest.mark.parametrize("register", TILES)
def test_no_product_loop_keeps_a_sum_in_memory(register):
    found = 0
    for body in loops():
        products = sum(bool(PRODUCT.match(name)) and register in ops for name, ops in body)
        if products != TILES[register]:
            continue
        found += 1
        kept = [ops for _, ops in body if register in ops and re.search(r"\(%r[sb]p", ops)]
        assert not kept, f"in a loop of {len(body)} instructions: {kept}"
    # at least the scores of both directions and the two products of the gradients
    assert found >= 4
