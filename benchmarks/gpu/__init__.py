"""What the kernels and a training step reach on a GPU: `python -m benchmarks.gpu.all`. How to read it: `docs/kernels.md`."""
