"""What samples the answers of a rollout: small objects, chosen by class path."""

from lit_align.rollout.engines.base import Engine
from lit_align.rollout.engines.continuous import ContinuousBatching
from lit_align.rollout.engines.decode import Decode
from lit_align.rollout.engines.generate import Generate
from lit_align.rollout.engines.vllm import VLLM

__all__ = ["VLLM", "ContinuousBatching", "Decode", "Engine", "Generate"]
