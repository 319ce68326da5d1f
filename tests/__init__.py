"""Tests of both packages; ``tests.cases`` and ``tests.tolerance`` also serve the benchmarks and docs/accuracy.md."""
