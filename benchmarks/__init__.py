"""Side-by-side timings, `python -m benchmarks`; all that a GPU is to show, `benchmarks/gpu.sh MINUTES DATA`."""
