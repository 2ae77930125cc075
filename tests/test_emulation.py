"""The emulation of thread blocks (tests/emulation/) on kernels of its own."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import emulated
import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))

SOURCES = [emulated.EMULATION / "selftest.cu"]
ORDERS = (0, 1, 2, 3, 4)
HERE = Path(__file__).parent


def opened(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.last_error.restype = ctypes.c_char_p
    library.emulation_switches.restype = ctypes.c_int64
    return library


@pytest.fixture(scope="module", params=["", "EMULATION_UCONTEXT"], ids=["own switch", "ucontext"])
def library(request: pytest.FixtureRequest) -> ctypes.CDLL:
    return opened(emulated.build(SOURCES, "selftest", define=[request.param] if request.param else []))


def at(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def count(n: int) -> ctypes.c_int64:
    return ctypes.c_int64(n)


def check(library: ctypes.CDLL, code: int) -> None:
    assert code == 0, library.last_error().decode()


def sums(library: ctypes.CDLL, x: Tensor, order: int, barrier: bool) -> Tensor:
    out = torch.zeros_like(x)
    with emulated.ordered(library, order):
        check(library, library.run_sums(barrier, *x.shape, at(x), at(out)))
    return out


@pytest.mark.parametrize("threads", [1, 31, 40, 96, 256, 1024])
def test_barriers_make_the_order_of_threads_meaningless(library: ctypes.CDLL, threads: int) -> None:
    x = torch.randint(-99, 99, (5, threads)).float()  # any sum of them is exact
    found = [sums(library, x, order, barrier=True) for order in ORDERS]
    assert torch.equal(found[0], x.sum(1, keepdim=True).expand(-1, threads))
    for other in found[1:]:
        assert torch.equal(other, found[0])


def test_a_race_shows_in_another_order(library: ctypes.CDLL) -> None:
    x = torch.randn(2, 64)
    found = [sums(library, x, order, barrier=False) for order in ORDERS]
    right = sums(library, x, 0, barrier=True)
    assert torch.equal(found[0][:, -1], right[:, -1])  # the last thread: all others have written
    assert torch.equal(found[1][:, 0], right[:, 0])
    for one in found:
        assert not torch.equal(one, right)
    for one, other in zip(found, found[1:], strict=False):
        assert not torch.equal(one.isnan(), other.isnan())  # NaN is what shared memory holds at first


@pytest.mark.parametrize("order", ORDERS)
def test_each_thread_of_a_grid_runs_once(library: ctypes.CDLL, order: int) -> None:
    dims = (ctypes.c_uint * 6)(3, 4, 5, 7, 3, 2)
    counts = torch.zeros(3 * 4 * 5 * 7 * 3 * 2, dtype=torch.int32)
    with emulated.ordered(library, order):
        check(library, library.run_places(dims, at(counts)))
    assert counts.eq(1).all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
@pytest.mark.parametrize("threads", [32, 96, 40])
def test_shuffles(library: ctypes.CDLL, threads: int, dtype: torch.dtype, order: int) -> None:
    x = torch.randn(threads) if dtype.is_floating_point else torch.randint(-(2**62), 2**62, (threads,))
    out = torch.zeros(7, threads, dtype=dtype)
    with emulated.ordered(library, order):
        run = library.run_shuffles if dtype.is_floating_point else library.run_shuffles_int64
        check(library, run(threads, at(x), at(out)))
    lane, first = torch.arange(threads) % 32, torch.arange(threads) // 32 * 32
    sources = [
        torch.full_like(lane, 5), lane // 8 * 8 + (lane + 1) % 8, lane ^ 3,
        torch.where(lane < 2, lane, lane - 2), torch.where(lane > 29, lane, lane + 2), lane ^ 16,
    ]  # fmt: skip
    for row, source in zip(out, sources, strict=False):
        place = first + source
        exists = place < threads  # a lane that does not: all bits 1
        poison = torch.full((threads,), -1, dtype=torch.int32 if dtype == torch.float32 else dtype).view(
            dtype
        )
        expected = torch.where(exists, x[place.clamp(max=threads - 1)], poison)
        torch.testing.assert_close(row, expected, rtol=0, atol=0, equal_nan=True)
    third = torch.tensor([sum(i % 3 == 0 for i in range(w, min(w + 32, threads))) for w in first.tolist()])
    assert torch.equal(out[6], third.to(dtype))


@pytest.mark.parametrize("order", ORDERS)
def test_parts_of_a_warp_shuffle_on_their_own(library: ctypes.CDLL, order: int) -> None:
    out = torch.zeros(32, dtype=torch.int32)
    with emulated.ordered(library, order):
        check(library, library.run_halves(at(out)))
    lane = torch.arange(32)
    pair = lane + (lane ^ 1)
    assert torch.equal(out, torch.where(lane < 16, pair, 2 * pair).int())


def test_the_last_block_sees_what_all_wrote(library: ctypes.CDLL) -> None:
    x, found = torch.randn(1000), []
    for order in ORDERS:
        parts, counter, out = torch.full((8,), torch.nan), torch.zeros(1, dtype=torch.int32), torch.zeros(1)
        with emulated.ordered(library, order):
            check(library, library.run_total(8, 128, at(x), 1000, at(parts), at(counter), at(out)))
        found.append(out)
        assert counter.item() == 8
    torch.testing.assert_close(found[0][0], x.sum(), rtol=0, atol=1e-3)
    assert all(torch.equal(one, found[0]) for one in found)


FAULTS = {
    1: r"waits forever at __syncthreads in fault, selftest.cu:\d+: 1 of the block's 64 threads have ended",
    2: r"one barrier at two places",
    3: r"waits forever at a shuffle of lanes 0xffffffff in over_warp, .*: 32 of the block's 64",
    4: r"thread \(.*\) of block \(0, 0, 0\) waits at a shuffle .* must be at the same place",
    5: r"lane 16 of its warp, is at a shuffle of lanes 0x0000ffff .* which does not name it",
    6: r"waits forever at __syncthreads .* waits at __syncwarp of lanes 0xffffffff .*, and 31 of the block",
    7: r"address 0x\w+ is not aligned in selftest.cu:\d+",
    8: r"thread \(9, 0, 0\) .* accesses address 0x\w+, which is not aligned, in fault, selftest.cu:\d+",
    9: r"thread \(63, 0, 0\) of block \(0, 0, 0\): access through a null pointer in selftest.cu:\d+",
    10: r"thread \(63, 0, 0\) .*: index 64 is outside of the array in selftest.cu:\d+",
    11: r"thread \(63, 0, 0\) .*: a product of integers overflows in selftest.cu:\d+",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_gpu_would_hang_or_stumble_over_is_an_error(library: ctypes.CDLL, fault: int) -> None:
    x, out = torch.ones(68), torch.zeros(64)
    for order in ORDERS:
        with emulated.ordered(library, order):
            assert library.run_fault(fault, at(x), at(out)) == 719
        sentence = library.last_error().decode()
        assert order or re.search(FAULTS[fault], sentence), sentence
        assert library.last_error() == b"no error"
    check(library, library.run_fault(0, at(x), at(out)))  # and the next launch is as good as any
    assert torch.equal(out, x[:64])


def test_launches_that_are_refused(library: ctypes.CDLL) -> None:
    x = torch.ones(4)
    for blocks, threads, sentence in (
        (0, 32, b"a grid has 1 to"),
        (1, 0, b"a block has 1 to"),
        (1, 1025, b"1024"),
    ):
        assert library.run_copy(blocks, threads, at(x), at(x), 4) == 9
        assert sentence in library.last_error()


def test_threads_that_never_wait_share_a_stack(library: ctypes.CDLL) -> None:
    x = torch.randn(1000)
    out = torch.zeros_like(x)
    before = library.emulation_switches()
    check(library, library.run_copy(4, 256, at(x), at(out), 1000))
    assert torch.equal(out, x)
    assert library.emulation_switches() - before == 2 * 4  # to the block and back


def test_shared_memory_holds_nothing_of_the_block_before(library: ctypes.CDLL) -> None:
    out = torch.zeros(3, 32)
    check(library, library.run_left_over(at(out)))
    assert out.isnan().all()


def floats() -> Tensor:
    """Random bits, all kinds of small numbers, and what lies at and beside every tie of the two types."""
    bits = torch.randint(-(2**31), 2**31, (300_000,), dtype=torch.int64)
    small = torch.randint(0x33000000 - 64, 0x38900000, (200_000,))  # around float16's subnormal numbers
    ends = torch.tensor(
        [0, 1, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0x7F7FFFFF, 0x477FE000, 0x477FF000]
    )
    high = torch.arange(1 << 16) << 16
    ties = torch.cat([high + 0x8000 + step for step in (-1, 0, 1)])
    half = (torch.arange(1 << 17) << 13) + (0x30000000 + 0x1000)
    ties = torch.cat([ties, *[half + step for step in (-1, 0, 1)]])
    bits = torch.cat([bits, small, small + 2**31, ends, ends + 2**31, ends - 1, ties])
    return (bits & 0xFFFFFFFF).to(torch.uint32).view(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_are_those_of_torch(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    name = "bf16" if dtype == torch.bfloat16 else "half"
    x = floats()
    out = torch.zeros(len(x), dtype=torch.int16)
    getattr(library, f"to_{name}")(at(x), at(out), count(len(x)))
    number = ~x.isnan()
    assert torch.equal(out[number], x.to(dtype).view(torch.int16)[number])
    assert out.view(dtype)[~number].isnan().all()

    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)
    wide = torch.zeros(len(every))
    getattr(library, f"from_{name}")(at(every), at(wide), count(len(every)))
    number = ~wide.isnan()
    assert torch.equal(number, ~every.view(dtype).isnan())
    assert torch.equal(wide.view(torch.int32)[number], every.view(dtype).float().view(torch.int32)[number])


STRAY = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
if sys.argv[2] == "tensor":
    import torch
    tensors = torch.ones(64), torch.zeros(65)
    x, out = (ctypes.c_void_p(one.data_ptr()) for one in tensors)
else:
    x, out = (ctypes.c_float * 64)(), (ctypes.c_float * 65)()
for order in range(5):
    library.emulation_set_order(order)
    assert library.run_copy(2, 64, x, out, 64) == 0
    assert library.run_fault(3, x, out) == 719
    assert library.run_barriers(2, 256, 3, out) == 0
print("so far all is well", flush=True)
if sys.argv[2] == "tensor":
    library.run_copy(2, 64, x, out, 65)
else:
    library.run_past_shared(out, 48)
print("not found", flush=True)
"""


@pytest.mark.parametrize("memory", ["tensor", "shared"])
def test_reads_out_of_bounds_are_found(memory: str) -> None:
    path = emulated.build(SOURCES, "selftest", sanitize=True)
    environment = emulated.sanitized()
    command = [sys.executable, "-c", STRAY, str(path), memory]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode != 0 and done.stdout == "so far all is well\n", done.stdout + done.stderr
    kind = "heap-buffer-overflow" if memory == "tensor" else "global-buffer-overflow"
    assert kind in done.stderr and "selftest.cu" in done.stderr, done.stderr


def test_what_the_compiler_says_is_shown(tmp_path: Path) -> None:
    bad = tmp_path / "bad.cu"
    bad.write_text("int f() { return nothing; }\nint g(int unused) { return 0; }\n")
    with pytest.raises(RuntimeError, match=r"(?s)bad\.cu:1.*nothing.*bad\.cu:2.*unused"):
        emulated.build([bad], "bad")


def test_of_several_processes_one_builds(tmp_path: Path) -> None:
    compiler, source = tmp_path / "compiler", tmp_path / "some.cu"
    compiler.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nsleep 0.2\n'
        'while [ $# -gt 0 ]; do if [ "$1" = -o ]; then echo made > "$2"; fi; shift; done\n'
    )
    compiler.chmod(0o755)
    source.write_text("")
    paths = {"CXX": compiler, "XDG_CACHE_HOME": tmp_path, "PYTHONPATH": HERE}
    environment = {**os.environ, **{name: str(path) for name, path in paths.items()}}
    program = "import emulated, pathlib, sys\n"
    program += "print(emulated.build([pathlib.Path(sys.argv[1])], 'some').read_text())"
    command = [sys.executable, "-c", program, str(source)]
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    assert [one.communicate()[0].split() for one in running] == [["made"]] * 3
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len([call for call in calls if " -o " in call]) == 3, calls  # two objects and the library
    assert not list(tmp_path.rglob("making-*"))
