"""Speed and memory of kssm_kernels beside the formulas it replaces: ``pytest bench/ --benchmark-only``.

``python -m bench.report`` runs that and writes docs/performance.md; ``python -m bench.sweep`` draws docs/sweep.svg.
``KSSM_BENCH_SMOKE=1`` makes every case tiny: it shows that the bench runs, and its figures mean nothing.
"""
