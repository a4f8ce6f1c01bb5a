"""Every instruction of csrc/cuda/gpu.h.

Its scalar model against what the PTX manual says of it; the PTX that nvcc emits for it, executed by
tests/ptx, against its model; and on a GPU the instruction itself.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cuda_emulator
import ptx
import pytest
import torch
from ptx.launch import missing
from torch import Tensor

SOURCE = Path(__file__).parent / "cuda" / "wrappers.cu"
Run = Callable[[str, Tensor], Tensor]
# words that come out
WORDS = {
    "multiply_add_bf16": 128,
    "multiply_add_half": 128,
    "load_matrices": 128,
    "load_matrices_transposed": 128,
    "copy_async": 256,
    "loads": 256,
    "shuffles": 480,
    "functions": 128,
}


def call(library: ctypes.CDLL, name: str, given: Tensor, out: Tensor) -> Tensor:
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (given, out))
    assert getattr(library, f"wrapper_{name}")(*pointers) == 0
    return out


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Words in, words out, by the emulator."""
    to = tmp_path_factory.mktemp("wrappers") / "wrappers.so"
    cuda_emulator.machine()
    engine = cuda_emulator.folder() / "libengine.so"
    cuda_emulator.compile_watched(SOURCE, to, engine, f"-I{cuda_emulator.sources()}")
    library = ctypes.CDLL(str(to))

    def run(name: str, given: Tensor) -> Tensor:
        out = torch.empty(WORDS[name], dtype=torch.int32)
        pointers = (ctypes.c_void_p(t.data_ptr()) for t in (given, out))
        library.wrapper_give(*pointers, given.numel(), out.numel())
        return call(library, name, given, out)

    return run


def words(*tensors: Tensor) -> Tensor:
    """As int32 words, of each lane those of all tensors [32, ...] in order."""
    return torch.cat([t.contiguous().view(torch.int32).reshape(32, -1) for t in tensors], 1)


def inputs(name: str) -> Tensor:
    """Words that mean something to the wrapper."""
    if name.startswith("multiply_add"):
        dtype = torch.bfloat16 if name.endswith("bf16") else torch.float16
        short = torch.randn(32, 12).to(dtype)
        return words(short, torch.randn(32, 4)).contiguous()
    if name == "functions":
        return words(torch.randn(32, 1) * 4)
    many = {"shuffles": 2}.get(name, 4)
    return torch.randint(-(2**31), 2**31 - 1, (32, many), dtype=torch.int32)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "half"])
def test_multiply_add(dtype: torch.dtype, model: Run) -> None:
    """The fragments of mma.m16n8k16, as the PTX manual draws them."""
    a, b, d = torch.randn(16, 16), torch.randn(16, 8), torch.randn(16, 8)
    a, b = a.to(dtype), b.to(dtype)
    g, t = torch.arange(32) // 4, torch.arange(32) % 4
    rows = torch.stack([g, g, g + 8, g + 8] * 2, 1)
    columns = torch.stack([2 * t + i % 2 + 8 * (i // 4) for i in range(8)], 1)
    deep = torch.stack([2 * t + i % 2 + 8 * (i // 2) for i in range(4)], 1)
    at = (torch.stack([g, g, g + 8, g + 8], 1), torch.stack([2 * t, 2 * t + 1] * 2, 1))
    given = words(a[rows, columns], b[deep, g[:, None]], d[at])
    name = "multiply_add_" + ("bf16" if dtype == torch.bfloat16 else "half")
    out = model(name, given.contiguous()).view(torch.float32).view(32, 4)
    exact = d.double() + a.double() @ b.double()
    assert (out.double() - exact[at]).abs().max() < 1e-5


@pytest.mark.cuda
@pytest.mark.parametrize("transposed", [False, True])
def test_load_matrices(transposed: bool, model: Run) -> None:
    rows = torch.randint(-(2**15), 2**15, (4, 8, 8), dtype=torch.int16)
    name = "load_matrices_transposed" if transposed else "load_matrices"
    out = model(name, words(rows.view(32, 8)).contiguous()).view(torch.int16).view(8, 4, 4, 2)
    seen = rows.transpose(1, 2) if transposed else rows
    # row l / 4 of matrix i, elements 2 (l % 4) and the next, in word i of lane l
    assert torch.equal(out, seen.reshape(4, 8, 4, 2).permute(1, 2, 0, 3))


@pytest.mark.cuda
def test_copies_and_loads(model: Run) -> None:
    given = inputs("loads")
    out = model("loads", given).view(32, 2, 4)
    lane = torch.arange(32)
    assert torch.equal(out, torch.stack([given, given[lane ^ 3]], 1))
    first, second = model("copy_async", given).view(2, 32, 4)
    kept = given.clone()
    kept[lane % 3 == 0, 2:] = 0
    kept[lane % 5 == 0] = 0
    assert torch.equal(first, kept[lane ^ 1])
    assert torch.equal(second, given[31 - (lane ^ 1)])


@pytest.mark.cuda
def test_shuffles(model: Run) -> None:
    given = inputs("shuffles")
    out = model("shuffles", given).view(32, 5, 3)
    for i in range(5):
        other = given[torch.arange(32) ^ (1 << i)]
        assert torch.equal(out[:, i], torch.cat([other[:, :1], other], 1))


@pytest.mark.cuda
def test_functions(model: Run) -> None:
    given = inputs("functions")
    x = given.view(torch.float32).double()[:, 0]
    out = model("functions", given).view(torch.float32).view(32, 4).double()
    exact = torch.stack([torch.exp2(x), torch.tanh(x), 1 / x, x.abs().rsqrt()], 1)
    assert ((out - exact).abs() <= 1e-6 * exact.abs() + 1e-7).all()


def emitted_by(csrc: Path, to: Path) -> dict[str, Any]:
    return ptx.programs(SOURCE, to / "wrappers.ptx", f"-I{csrc}")


def agrees(name: str, found: dict[str, Any], model: Run) -> None:
    given = inputs(name)
    with ptx.executed(found) as ran:
        try:
            theirs = model(name, given)
        except AssertionError:
            raise AssertionError(ran.fault) from None
    assert len(ran.kernels) == 1
    ours = model(name, given)
    if name.startswith("multiply_add") or name == "functions":
        # sums in another order, other approximations
        ours, theirs = ours.view(torch.float32), theirs.view(torch.float32)
        torch.testing.assert_close(theirs, ours, rtol=2e-6, atol=2e-6)
    else:
        assert torch.equal(theirs, ours)


@pytest.fixture(scope="module")
def emitted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return emitted_by(cuda_emulator.sources(), tmp_path_factory.mktemp("ptx"))


needs_nvcc = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@needs_nvcc
@pytest.mark.cuda
@pytest.mark.parametrize("name", WORDS)
def test_emitted_ptx_does_what_the_model_says(
    name: str, emitted: dict[str, Any], model: Run
) -> None:
    agrees(name, emitted, model)


# bugs in the PTX of gpu.h, which the emulator does not see: the wrapper, what stands there, what
# is planted
PLANTED = [
    ("multiply_add_bf16", '"r"(a.word[0]), "r"(a.word[1])', '"r"(a.word[1]), "r"(a.word[0])'),
    ("multiply_add_half", '"r"(a.word[2]), "r"(a.word[3])', '"r"(a.word[3]), "r"(a.word[2])'),
    ("multiply_add_bf16", '"r"(b0)', '"r"(b1)'),
    ("multiply_add_bf16", '"+f"(d[0]), "+f"(d[1])', '"+f"(d[1]), "+f"(d[0])'),
    ("multiply_add_bf16", 'GPU_MMA("bf16");', 'GPU_MMA("f16");'),
    ("load_matrices_transposed", "m8n8.x4.trans.shared", "m8n8.x4.shared"),
    ("load_matrices", "m8n8.x4.shared", "m8n8.x4.trans.shared"),
    ("copy_async", '"r"(bytes)', '"r"(16)'),
    ("copy_async", '"n"(groups)', '"n"(groups + 1)'),
    ("copy_async", '"cp.async.commit_group;"', '""'),
    ("loads", "v4.u32 {%0, %1, %2, %3}, [%4]", "v4.u32 {%0, %2, %1, %3}, [%4]"),
    ("loads", "make_uint4(x.word[0], x.word[1]", "make_uint4(x.word[1], x.word[0]"),
    ("shuffles", "__shfl_xor_sync(kAll, x, lanes)", "__shfl_xor_sync(kAll, x, lanes ^ 1)"),
    ("functions", "ex2.approx.ftz.f32 %0, %1", "rsqrt.approx.ftz.f32 %0, %1"),
    ("functions", "__fdividef(a, b)", "__fdividef(b, a)"),
]


@needs_nvcc
@pytest.mark.cuda
@pytest.mark.parametrize("number", range(len(PLANTED)))
def test_a_bug_in_the_ptx_is_caught(number: int, model: Run, tmp_path: Path) -> None:
    name, old, new = PLANTED[number]
    csrc = tmp_path / "csrc"
    shutil.copytree(cuda_emulator.sources() / "cuda", csrc / "cuda")
    text = (csrc / "cuda" / "gpu.h").read_text()
    assert old in text, "gpu.h has changed: plant this bug anew"
    (csrc / "cuda" / "gpu.h").write_text(text.replace(old, new, 1))
    found = emitted_by(csrc, tmp_path)
    with pytest.raises(AssertionError) as caught:
        agrees(name, found, model)
    # what the interpreter does not know is no proof
    assert "not known" not in str(caught.value)


@pytest.mark.gpu
@pytest.mark.parametrize("name", WORDS)
def test_the_instruction_does_what_its_model_says(
    name: str, model: Run, tmp_path_factory: pytest.TempPathFactory
) -> None:
    to = tmp_path_factory.getbasetemp() / "wrappers-gpu.so"
    if not to.exists():
        command = ["nvcc", "-std=c++17", "-O3", "-arch=native", "-shared", "-Xcompiler=-fPIC"]
        command += [f"-I{cuda_emulator.sources()}", str(SOURCE), "-o", str(to)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    given = inputs(name)
    out = torch.full((WORDS[name],), -1, dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    call(ctypes.CDLL(str(to)), name, given.cuda(), out)
    torch.cuda.synchronize()
    ours, theirs = model(name, given), out.cpu()
    if name.startswith("multiply_add"):
        # 17 addends in any order, each cut off at a rounding of the largest: tensor cores truncate
        ours, theirs = ours.view(torch.float32), theirs.view(torch.float32)
        most = model(name, magnitudes(given)).view(torch.float32)
        assert ((theirs - ours).abs() <= 17 * 2.0**-22 * most).all()
    elif name == "functions":
        # approximations of the hardware: a few of its last bits, as the PTX manual bounds them
        ours, theirs = ours.view(torch.float32), theirs.view(torch.float32)
        torch.testing.assert_close(theirs, ours, rtol=2e-6, atol=2e-6)
    else:
        assert torch.equal(theirs, ours)


def magnitudes(given: Tensor) -> Tensor:
    """The words of multiply_add without their signs: six of two short numbers, four of a long."""
    short = given[:, :6] & 0x7FFF7FFF
    return torch.cat([short, given[:, 6:] & 0x7FFFFFFF], 1).contiguous()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["bf16", "half"])
def test_the_bound_on_a_gpu_notices_a_wrong_sum(dtype: str, model: Run) -> None:
    """An addend lost, or two columns exchanged, is far outside of it."""
    name = f"multiply_add_{dtype}"
    given = inputs(name)
    lost = given.clone()
    lost[:, 0] &= 0xFFFF
    most = model(name, magnitudes(given)).view(torch.float32)
    assert (most > 0).all()
    ours = model(name, given).view(torch.float32)
    for wrong in (
        model(name, lost).view(torch.float32),
        ours.view(32, 4)[:, [1, 0, 2, 3]].flatten(),
    ):
        assert ((wrong - ours).abs() > 17 * 2.0**-22 * most).any()


@pytest.mark.cuda
def test_the_models_run_beside_the_library_for_a_gpu() -> None:
    """Its ops have the names of the emulator's: where both are defined, the process ends."""
    code = (
        "import sys, pytest, torch\n"
        "library = torch.library.Library('fastvlm_cuda', 'DEF')\n"
        "library.define('linear_topk(Tensor h) -> Tensor')\n"
        f"sys.exit(pytest.main(['-q', '-p', 'no:xdist', '--cuda', 'full', {str(__file__)!r},\n"
        "                      '-k', 'test_shuffles']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "1 passed" in done.stdout
