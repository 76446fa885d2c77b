"""Tensor parallelism: the grid of ranks, differentiable collectives, sharded layers, and what each shard holds.

Tensors here are plain local shards; every exchange is an explicit call that names its axis.
"""
