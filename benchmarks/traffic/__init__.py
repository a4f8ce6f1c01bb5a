"""Kernels launched and bytes moved by a decoder layer, counted on tensors without memory.

Counted, not timed: a launch is a kernel that eager PyTorch starts for an operator that computes, or
one of ours; its bytes are those of the tensors it is given and gives back, each once.
"""
