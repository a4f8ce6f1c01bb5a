"""The CPU backend: which calls the C++ extension serves, and how they reach it."""

from fastvlm.cpu import attention, loss, mlp

KERNELS = {**attention.KERNELS, **mlp.KERNELS, **loss.KERNELS}
