"""Triton kernels for CUDA; each has a torch twin elsewhere in the package, which is also what runs without them."""
