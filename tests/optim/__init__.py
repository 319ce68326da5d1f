"""Of kssm_kernels.optim, and of the program behind docs/optimizer.md."""
