"""What those who work on fastvlm run in a checkout; no wheel carries it.

compiling  compiles every Triton and CUDA kernel for several GPUs, without one, and counts
calls      calls of each op at the true shapes of models, which lead to these kernels
"""
