"""What GPUs and their links can do, and what share of it training gets. Called by `planning/step_time.py` and `cli/plan.py`.

Figures of devices are those of the vendors' data sheets: dense bfloat16, links one way. The shares are of two kinds: measured
ones carry their source, and two are fitted to two published training speeds (`tests/planning/test_step_time.py` holds them to
these, and says how well the other published speeds are met).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_llm.planning.flops import PEAKS


@dataclass(frozen=True)
class Device:
    """One GPU in its node.

    Attributes:
        flops: dense bfloat16 FLOP/s. memory: GiB that CUDA reports. stream: bytes/s of device memory.
        link: bytes/s one way to the other GPUs of the node together; network: to other nodes, a GPU's share.
        node: GPUs of a node.
    """

    name: str
    flops: float
    memory: float
    stream: float
    link: float
    network: float
    node: int = 8


DEVICES = {
    device.name: device
    for device in (
        Device("a100-80", PEAKS["A100"], 79.1, 2.04e12, 300e9, 25e9),
        Device("h100", PEAKS["H100"], 79.1, 3.35e12, 450e9, 50e9),
        Device("h200", PEAKS["H200"], 139.8, 4.8e12, 450e9, 50e9),
        Device("b200", PEAKS["B200"], 178.0, 7.7e12, 900e9, 50e9),
    )
}
"""By the name that `plan --device` takes; as in HGX boards of eight, with one 200 Gbit/s (A100) or 400 Gbit/s adapter a GPU."""


@dataclass(frozen=True)
class Shares:
    """What is had of a device's figures.

    Attributes:
        products: of FLOP/s in large matrix products, the first fitted number.
        exposed: of the time that collectives between tensor-parallel ranks take, what no product hides, the second.
        scores, scores_backward: of FLOP/s in causal attention at 4k to 16k tokens, head size 128: 529 and 446 of 989 TFLOP/s with
            cuDNN on an H100 and an H200 (FlashAttention-3's figures; NVIDIA's cudnn-frontend tables, head size 128).
        stream: of memory bandwidth in element-wise kernels: 2.9 of 3.35 TB/s (quack's RMSNorm on an H100).
        link: of NVLink's and the network's figures in large collectives.
        call, hop, network_hop: seconds that a collective takes besides, and for each step of its ring inside a node and between
            nodes (NCCL's own table for its ring and the protocol of large messages, src/graph/tuning.cc of 2.11; 14 us since).
    """

    products: float = 0.635
    exposed: float = 0.222
    scores: float = 0.535
    scores_backward: float = 0.45
    stream: float = 0.87
    link: float = 0.8
    call: float = 8.4e-6
    hop: float = 3.4e-6
    network_hop: float = 9.6e-6


SHARES = Shares()
"""Fitted to 16B on 192 and 70B on 768 H100 (model table of Megatron-LM's README, megatron-core 0.8, bfloat16, rows of 4,096)."""
