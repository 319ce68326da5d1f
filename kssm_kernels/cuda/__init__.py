"""CUDA C++ kernels: csrc/cuda, called through a C interface."""
