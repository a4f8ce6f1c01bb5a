"""`python -m fastvlm compile`: machine code, and what compilers say of it, is read rightly."""

from __future__ import annotations

import pytest

from tools.compiling import amd, code, nvidia, work
from tools.compiling.architectures import ARCHITECTURES

SASS = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDGSTS.E.BYPASS.LTC128B.64 [R3], desc[UR4][R4.64] ;
.L_x_0:
        /*0020*/              @!P1 LDG.E.128 R24, desc[UR22][R2.64+0x1000] ;
.L_x_1:
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0040*/               @P0 BRA `(.L_x_1) ;
        /*0050*/                   LDG.E.U16.CONSTANT R7, desc[UR4][R4.64] ;
        /*0060*/                   BRA P2, `(.L_x_3) ;
.L_x_2:
        /*0070*/              @!P0 BRA `(.L_x_0) ;
        /*0080*/                   LDL.128 R4, [R1] ;
        /*0090*/                   STG.E desc[UR4][R4.64], R7 ;
        /*00a0*/                   EXIT ;
.L_x_3:
        /*00b0*/                   LDG.E R7, desc[UR4][R4.64] ;
        /*00c0*/                   BRA `(.L_x_2) ;
.L_x_4:
        /*00d0*/                   BRA `(.L_x_4);
        /*00e0*/                   NOP;
"""

AMDGCN = """
kernel:
; %bb.0:
	s_load_dwordx4 s[12:15], s[0:1], 0x28
	s_cbranch_vccnz .LBB0_2
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	buffer_load_dwordx4 v[4:7], v13, s[20:23], 0 offen
	global_load_ushort v1, v2, s[4:5]
	v_mfma_f32_32x32x8_bf16_1k a[0:15], v[2:3], v[4:5], a[0:15]
	s_nop 1
	s_cbranch_vccnz .LBB0_1
.LBB0_2:
	global_store_dwordx2 v0, v[2:3], s[2:3]
	s_endpgm
	.section	.rodata,"a",@progbits
	.amdhsa_next_free_vgpr 61
amdhsa.kernels:
    .private_segment_fixed_size: 8
    .sgpr_count:     49
    .vgpr_count:     61
    .vgpr_spill_count: 2
"""


def test_sass_is_read() -> None:
    parsed = nvidia.parse(SASS)
    counts = nvidia.counts(40, 16, 512, parsed)
    assert counts.loads == {"128": 1, "64": 1, "32": 1, "16": 1}
    assert counts.stores == {"32": 1}
    assert counts.tensor == {"HMMA": 1}
    assert (counts.spill_loads, counts.spill_stores, counts.local) == (1, 0, 16)
    assert counts.instructions == 14
    # .L_x_2 is reached by a jump backwards from behind the exit, which is no loop
    assert sorted(len(loop) for loop in code.loops(parsed)) == [2, 8]
    assert counts.loop == 2
    assert counts.loop_loads == {"128": 1, "32": 1, "16": 1}


def test_resource_usage_is_read() -> None:
    line = "  REG:109 STACK:8 SHARED:1024 LOCAL:16 CONSTANT[0]:448 TEXTURE:0 SURFACE:0 SAMPLER:0"
    assert nvidia.resources(f" Function rope:\n{line}") == (109, 24)
    with pytest.raises(ValueError, match="no resource usage"):
        nvidia.resources("cuobjdump fatal")


@pytest.mark.parametrize(
    ("opcode", "bits"),
    [("LDG.E", 32), ("LDG.E.64.CONSTANT", 64), ("LDG.E.ENL2.256", 256), ("LDG.E.S8", 8)],
)
def test_width_of_an_access(opcode: str, bits: int) -> None:
    assert nvidia.width(opcode) == bits


def test_amdgcn_is_read() -> None:
    counts = amd.counts(AMDGCN, 0)
    assert (counts.registers, counts.local) == (61, 8)
    assert (counts.spill_loads, counts.spill_stores) == (2, 2)
    assert (counts.loads, counts.stores) == ({"128": 1, "16": 1}, {"64": 1})
    assert counts.tensor == {"MFMA": 1}
    assert (counts.loop, counts.instructions) == (4, 8)
    assert counts.loop_loads == {"128": 1, "16": 1}


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "expected"),
    [
        ("sm_90", 32, 0, 4, (16, "warps")),
        ("sm_90", 109, 8192, 8, (2, "registers")),
        ("sm_90", 64, 100 * 1024, 4, (2, "shared memory")),
        ("sm_90", 16, 0, 1, (32, "programs")),
        ("sm_120", 32, 0, 4, (12, "warps")),
        ("gfx942", 128, 0, 4, (4, "registers")),
    ],
)
def test_occupancy(
    arch: str, registers: int, shared: int, warps: int, expected: tuple[int, str]
) -> None:
    assert ARCHITECTURES[arch].occupancy(registers, shared, warps) == expected


def test_what_a_kernel_asks_for_is_read_from_its_ttir() -> None:
    ttir = """
    %6 = tt.load %SEED : !tt.ptr<i64> loc(#loc)
    %7 = tt.load %6, %5, %cst : tensor<128x!tt.ptr<bf16>> loc(#loc)
    %9 = tt.dot %a, %b, %c : tensor<64x32xbf16> * tensor<32x64xbf16> -> tensor<64x64xf32>
    """
    assert work.asked(ttir) == (1, ((64, 16),))
