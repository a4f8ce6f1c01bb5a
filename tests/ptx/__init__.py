"""What nvcc makes of the CUDA kernels, executed by numpy: PTX, inline assembly included.

The launches are those of the emulator: the same launchers, bindings and parameters on the same
memory, of which the emulator was told what it is for. All threads of a block are one array.

Faults: an access outside of what the launch was given, or of shared memory that nobody wrote, to
which a copy is under way, or that another warp touches without a barrier between; lanes that part;
what another block wrote, unless it was handed over. Not modelled: time, caches, wgmma, TMA.
An instruction that is not known is a fault, too.
"""

from ptx.launch import executed, programs
from ptx.program import PtxError

__all__ = ["PtxError", "executed", "programs"]
