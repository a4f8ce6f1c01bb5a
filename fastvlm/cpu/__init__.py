"""The CPU backend: which calls the C++ extension serves, and how they reach it."""

from fastvlm.cpu import attention, loss, mlp, norm, rope
from fastvlm.ops.dispatch import register

KERNELS = {
    **attention.KERNELS,
    **mlp.KERNELS,
    **norm.KERNELS,
    **rope.KERNELS,
    **loss.KERNELS,
}

for _name, _kernel in KERNELS.items():
    register(_name, _kernel)
