"""Proof that the Triton kernels compile: ``python -m fastvlm compile``, on a machine without a GPU.

driver.py         records what the launchers launch, and compiles it, without a device
jobs.py           the calls of tools/calls, recorded for all dtypes and configs
architectures.py  the GPUs and their limits
sources.py        the digest of a kernel's code, by which kept counts are known to be true
code.py           instructions, loops, counts
nvidia.py amd.py  read a compiled kernel
cuda.py           the CUDA kernels, by nvcc (--cuda), and cuda_kept.py what is kept of them
work.py           the pool of processes that compiles
verdicts.py       what makes the command fail
report.py         tables, and all counts as a file
summary.py        the counts that are kept, and what differs from them
command.py        the command
"""
