"""Of the GPU kernels: on a device (pytest -m gpu), through Triton's front end, and as CUDA sources on the CPU."""
