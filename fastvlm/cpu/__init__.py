"""The CPU backend: which calls the C++ extension serves, and how they reach it."""

from fastvlm.cpu import attention, mlp

KERNELS = {**attention.KERNELS, **mlp.KERNELS}
