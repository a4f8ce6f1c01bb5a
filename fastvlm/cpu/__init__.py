"""The CPU backend: which calls the C++ extension serves, and how they reach it."""

from fastvlm.cpu import attention, bf16, int8, loss, merge, mlp, norm, residual, rope, vision
from fastvlm.ops.dispatch import register

KERNELS = {
    **attention.KERNELS,
    **merge.KERNELS,
    **mlp.KERNELS,
    **norm.KERNELS,
    **rope.KERNELS,
    **loss.KERNELS,
    **residual.KERNELS,
    **vision.KERNELS,
    **int8.KERNELS,
    **bf16.KERNELS,
}

for _name, _kernel in KERNELS.items():
    register(_name, _kernel)
