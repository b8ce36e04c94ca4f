"""Benchmarks of mmfast: `python -m bench` measures, `python -m bench.report` writes RESULTS.md."""
