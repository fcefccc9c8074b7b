"""Side-by-side timings: `python -m benchmarks`; on a GPU, `python -m benchmarks.gpu_session`."""
