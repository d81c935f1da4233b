"""Kernels for SinkGD and 8-bit updates, each with a torch twin elsewhere in the package, which is what runs without.

Triton on CUDA; C, compiled where it runs, for large matrices on CPU.
"""
