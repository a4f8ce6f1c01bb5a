"""The CPU backend: which calls the C++ extension serves, and how they reach it."""

from fastvlm.cpu import attention, loss, mlp, norm, rope

KERNELS = {
    **attention.KERNELS,
    **mlp.KERNELS,
    **norm.KERNELS,
    **rope.KERNELS,
    **loss.KERNELS,
}
