"""``python -m kssm_kernels``: what was built, and what this machine runs."""

from kssm_kernels import __version__, build_info

if __name__ == "__main__":
    print(f"kssm-kernels {__version__}; {build_info()}")
