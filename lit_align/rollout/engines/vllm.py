"""vLLM as an engine: a second copy of the weights in this process, renewed before each rollout. Optional.

Written against vLLM's documented interface and tested with a stand-in for it. On hardware it has not been run.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from lit_align.models import base_model
from lit_align.models.adapters import merged_state
from lit_align.models.modes import has_adapters
from lit_align.rollout.engines.base import Engine, as_answer
from lit_align.rollout.sampling import Answer, Sampling


@dataclass(frozen=True)
class VLLM(Engine):
    """Samples with vLLM in this process. Untested on hardware.

    The live weights, adapters folded in, are loaded into vLLM's own copy before each rollout, and what it remembers of
    prompts is forgotten. vLLM draws by itself, seeded for each answer by the answer's first uniform number, and
    computes by itself: other kernels, mostly bfloat16. So its log-probabilities are not those of training;
    `rollout/logps_diff` says by how much, and with `ppo.old_logps: sampled` the ratio is against what was sampled from.

    Attributes:
        gpu_memory_utilization: Share of the GPU memory that vLLM may take, its weights included.
        dtype: Of vLLM's weights; "auto" = as the policy's configuration says.
        options: More arguments of `vllm.LLM`.
    """

    uses_noise: ClassVar[bool] = False

    gpu_memory_utilization: float = 0.3
    dtype: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)
    _engines: WeakKeyDictionary[nn.Module, Any] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False, compare=False
    )

    def sample(
        self,
        model: nn.Module,
        prompt_ids: list[Tensor],
        num_answers: int,
        stop_ids: list[int],
        sampling: Sampling,
        noise: Tensor,
    ) -> list[Answer]:
        """See `Engine`.

        Raises:
            ImportError: vLLM is not installed.
        """
        vllm = _vllm()
        llm = self._engines.get(model) or self._engine(vllm, model)
        push_weights(llm, model)
        asked = [{"prompt_token_ids": ids.tolist()} for ids in prompt_ids for _ in range(num_answers)]
        settings = [vllm.SamplingParams(**_settings(stop_ids, sampling, float(row[0]))) for row in noise]
        outputs = [request.outputs[0] for request in llm.generate(asked, settings, use_tqdm=False)]
        limit = sampling.max_new_tokens
        return [as_answer(list(o.token_ids), _logps(o, sampling), stop_ids, limit) for o in outputs]

    def _engine(self, vllm: Any, model: nn.Module) -> Any:
        """VLLM's copy of the network, built once from its configuration alone; the weights come later."""
        with tempfile.TemporaryDirectory() as folder:
            base_model(model).config.save_pretrained(folder)
            llm = vllm.LLM(
                model=folder,
                load_format="dummy",
                skip_tokenizer_init=True,
                generation_config="vllm",
                logprobs_mode="processed_logprobs",
                gpu_memory_utilization=self.gpu_memory_utilization,
                dtype=self.dtype,
                **self.options,
            )
        self._engines[model] = llm
        return llm


def push_weights(llm: Any, model: nn.Module) -> None:
    """Loads the model's weights as they are, under their plain names, adapters folded in, into vLLM's copy."""
    state = merged_state(model) if has_adapters(model) else model.state_dict()
    weights = list(state.items())
    llm.apply_model(lambda network: network.load_weights(iter(weights)))
    llm.reset_prefix_cache()  # its keys and values are those of the weights before


def _settings(stop_ids: Sequence[int], sampling: Sampling, uniform: float) -> dict[str, Any]:
    return {
        "temperature": sampling.temperature,
        "top_p": 1.0,
        "top_k": 0,
        "max_tokens": sampling.max_new_tokens,
        "stop_token_ids": list(stop_ids),
        "ignore_eos": True,
        "detokenize": False,
        "logprobs": 0,  # of the sampled token alone
        "seed": int(uniform * 2**31),
    }


def _logps(output: Any, sampling: Sampling) -> list[float]:
    if sampling.temperature == 0:
        return [0.0] * len(output.token_ids)
    return [entry[token].logprob for token, entry in zip(output.token_ids, output.logprobs, strict=True)]


def _vllm() -> Any:
    # Else the network lives in another process, where these weights cannot be handed over.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    try:
        import vllm
    except ImportError as error:
        raise ImportError(
            "engine VLLM needs vLLM, which is not installed: `pip install vllm` (the extra `vllm`), or set "
            "`engine: Decode`, which needs nothing"
        ) from error
    return vllm
