"""Megatron-style 3D-parallel pretraining and supervised fine-tuning of decoder language models.

Importing this package imports nothing heavy: `megatron-llm --help` must not pay for torch. Start reading at
`training/step.py`, then `models/decoder.py`, `parallel/linear.py`, `pipeline/schedules.py`, `optim/zero1.py`.
"""

__version__ = "0.1.0"
