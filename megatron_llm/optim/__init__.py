"""Gradient buffers, the ZeRO-1 optimizer, learning-rate schedules. Sees parameters and their ShardSpec, not the model."""
