"""``python -m bench.gpu_compile``: what the compilers make of the GPU kernels, and the bytes that they move."""
