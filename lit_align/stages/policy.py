"""What the stages with a policy share: building it, sampling answers from it, predicting with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from lit_align.batch import LayOut, MicroBatch, PromptBatch, pack
from lit_align.models import base_model, sequence_sums, token_logps
from lit_align.models.compiling import uncompiled
from lit_align.models.load import load_causal_lm, load_tokenizer
from lit_align.models.logits import check_head
from lit_align.models.modes import has_adapters
from lit_align.models.reference import reference_mode
from lit_align.models.sharding import unsharded
from lit_align.models.source import ModelSource
from lit_align.models.tokens import end_of_turn_id
from lit_align.rollout.engines import Decode, Engine
from lit_align.rollout.experience import as_examples
from lit_align.rollout.sampling import Answer, Sampling
from lit_align.rollout.scoring import SCORED_TOKENS, answer_logps, micro_batches
from lit_align.stages.stage import SchedulerCallable, Stage


@contextmanager
def reference_policy(policy: nn.Module, reference: nn.Module | None) -> Iterator[nn.Module]:
    """The network that gives reference log-probabilities: the frozen copy, or the policy with its adapters off."""
    if reference is not None:
        yield reference
        return
    with reference_mode(policy):
        yield policy


class PolicyStage(Stage):
    """A stage that trains a causal language model, held as `policy`."""

    trained: ClassVar[tuple[str, ...]] = ("policy",)

    def __init__(self, policy: ModelSource, optimizer: OptimizerCallable, lr_scheduler: SchedulerCallable) -> None:
        super().__init__(optimizer, lr_scheduler)
        self.policy_source = policy.validate("policy", trained=True)
        self.policy = None
        self.sampling = Sampling()
        self.engine: Engine = Decode()

    def sources(self) -> dict[str, ModelSource]:
        """The policy's source."""
        return {"policy": self.policy_source}

    def configure_model(self) -> None:
        """Builds the policy, once."""
        if self.policy is None:
            self.tokenizer = self.with_data_template(load_tokenizer(self.policy_source, "policy"))
            self.policy = load_causal_lm(self.policy_source, "policy")
            with uncompiled(self.policy):
                check_head(base_model(self.policy))

    @property
    def lay_out(self) -> LayOut:
        """How answers are laid out: as the data module does; packed where it does not say."""
        return getattr(self.trainer.datamodule, "lay_out", pack)

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer: eos, what ends the template's turns, and those that the model's settings name."""
        named = self.policy.generation_config.eos_token_id
        named = named if isinstance(named, list) else [named]
        return sorted(
            {i for i in (*named, self.tokenizer.eos_token_id, end_of_turn_id(self.tokenizer)) if i is not None}
        )

    def answers(
        self,
        prompt_ids: Sequence[Tensor],
        num_answers: int,
        sampling: Sampling | None = None,
        noise: Tensor | None = None,
    ) -> list[tuple[Answer, ...]]:
        """Samples answers to each prompt from the policy as it is; see `Engine`. No other place calls an engine."""
        prompts = [ids.to(self.device) for ids in prompt_ids]
        with uncompiled(self.policy), unsharded(self.policy):  # on all ranks, those without prompts too
            if not prompts:
                return []
            return self.engine(self.policy, prompts, num_answers, self.stop_ids, sampling or self.sampling, noise)

    def answer(self, prompt_ids: Sequence[Tensor], sampling: Sampling | None = None) -> list[Answer]:
        """Samples one answer to each prompt."""
        return [answer for (answer,) in self.answers(prompt_ids, 1, sampling)]

    def generate_answers(self, batch: PromptBatch, sampling: Sampling | None = None) -> list[str]:
        """The answers' text, without special tokens."""
        answers = self.answer(batch.prompt_ids, sampling)
        return [self.tokenizer.decode(a.input_ids, skip_special_tokens=True) for a in answers]

    def predict_step(self, batch: MicroBatch | PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """One row per example: sampled answers for prompts, log-probabilities in nats for everything else."""
        indices = batch.indices.tolist()
        if isinstance(batch, PromptBatch):
            texts = self.generate_answers(batch)
            rows = zip(indices, batch.records, texts, strict=True)
            return [{"index": i, "record": record, "answer": text} for i, record, text in rows]
        logps = sequence_sums(token_logps(self.policy, batch), batch)[batch.groups].tolist()
        return [{"index": i, "logps": row} for i, row in zip(indices, logps, strict=True)]


class ReferencedStage(PolicyStage):
    """A stage that holds its policy against a frozen reference, held as `reference` (None with adapters)."""

    frozen: ClassVar[tuple[str, ...]] = ("reference",)

    has_reference = True

    def __init__(self, policy: ModelSource, optimizer: OptimizerCallable, lr_scheduler: SchedulerCallable) -> None:
        super().__init__(policy, optimizer, lr_scheduler)
        self.reference = None

    def kl_to_reference(self, batch: PromptBatch, sampling: Sampling) -> list[float] | None:
        """One sample of log policy - log reference, in nats, for each prompt: its mean estimates the KL of answers.

        Args:
            batch: The prompts.
            sampling: How answers are sampled; its temperature counts in both log-probabilities.

        Returns:
            One number per prompt; None if the stage has no reference, or only what it said of the data.
        """
        if not self.has_reference or (self.reference is None and not has_adapters(self.policy)):
            return None
        examples = as_examples(batch.prompt_ids, self.answers(batch.prompt_ids, 1, sampling))
        packed = list(micro_batches(examples, SCORED_TOKENS, self.device, self.lay_out))
        logps = answer_logps(self.policy, packed, sampling.temperature)
        with reference_policy(self.policy, self.reference) as reference:
            reference_logps = answer_logps(reference, packed, sampling.temperature)
        return [float((p - r).sum()) for p, r in zip(logps, reference_logps, strict=True)]
