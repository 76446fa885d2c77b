"""Maths on local tensors: no communication, no modules, no configuration.

Each file is the torch reference (the CPU path and the oracle of faster kernels) plus its dispatch. Statistics, rotary
angles, losses and optimizer moments use `stat_dtype(compute)`: float32, or float64 when computing in float64.
"""
