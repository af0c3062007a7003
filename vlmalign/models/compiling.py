"""What the compiler is told about programs whose time is the reading of weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: For programs that decode. XLA's GPU compiler makes one product of several that share an operand (q, k and v; gate and
#: up; scores over two pieces of a cache) by joining their other operands first: in a loop over tokens, a copy of
#: weights and caches for every token (MedGemma-4B: three per layer, 160 MB). On other devices it has no effect.
DECODING: Mapping[str, Any] = {"xla_gpu_dot_merger_threshold_mb": 0}
