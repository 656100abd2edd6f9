"""What a rollout leaves behind: answers with everything that the update needs to know about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lit_align.batch import Branch, Example
from lit_align.rollout.advantages import explained_variance
from lit_align.rollout.sampling import Answer


@dataclass(frozen=True)
class Trajectory:
    """A prompt, its n answers, and what was computed about them while the policy was frozen; all on the CPU.

    Attributes:
        index: Of the prompt in its dataset.
        prompt_ids: int64 [P].
        answers: The n sampled answers.
        scores: Reward of each answer as a whole, float32 [n].
        logps: log pi_old of each answer's tokens, in nats; n tensors, float32 [R_i]. The answers' own `logps` where
            it was not computed anew.
        reference_logps: log pi_ref of the same tokens.
        values: Critic's value before each token; zeros without a critic.
        repeat: How often the rollout holds the same prompt before it.
    """

    index: int
    prompt_ids: Tensor
    answers: tuple[Answer, ...]
    scores: Tensor
    logps: tuple[Tensor, ...]
    reference_logps: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    repeat: int = 0


class Rollout(NamedTuple):
    """All answers of a rollout as one rectangle; S answers, those of one prompt next to each other.

    Attributes:
        scores: float32 [S].
        logps: log pi_old, float32 [S, R]; 0 outside the mask, like the next two.
        reference_logps: log pi_ref, float32 [S, R].
        values: float32 [S, R].
        response_mask: True = token sampled by the policy, bool [S, R].
        finished: True = the answer ended with a stop token, bool [S].
        num_answers: Answers per prompt.
        sampled_logps: What the engine said of the same tokens, float32 [S, R].
    """

    scores: Tensor
    logps: Tensor
    reference_logps: Tensor
    values: Tensor
    response_mask: Tensor
    finished: Tensor
    num_answers: int
    sampled_logps: Tensor

    @property
    def kl(self) -> Tensor:
        """k1 estimate of KL(pi_old || pi_ref) summed over each answer, in nats, float32 [S]."""
        return (self.logps - self.reference_logps).sum(-1)


def as_examples(prompt_ids: Sequence[Tensor], answers: Sequence[Sequence[Answer]]) -> list[Example]:
    """One example per prompt, its answers hanging from it, every sampled token scored."""
    return [
        Example(prompt.cpu(), tuple(Branch(a.input_ids, torch.ones(len(a.input_ids))) for a in group))
        for prompt, group in zip(prompt_ids, answers, strict=True)
    ]


def as_rollout(trajectories: Sequence[Trajectory]) -> Rollout:
    """Lays the answers of all trajectories in one rectangle."""
    answers = [a for t in trajectories for a in t.answers]
    ones = [torch.ones(len(a.input_ids), dtype=torch.bool) for a in answers]
    return Rollout(
        scores=torch.cat([t.scores for t in trajectories]),
        logps=_rectangle([row for t in trajectories for row in t.logps]),
        reference_logps=_rectangle([row for t in trajectories for row in t.reference_logps]),
        values=_rectangle([row for t in trajectories for row in t.values]),
        response_mask=_rectangle(ones),
        finished=torch.tensor([a.finished for a in answers]),
        num_answers=len(trajectories[0].answers),
        sampled_logps=_rectangle([a.logps for a in answers]),
    )


def from_all_ranks(trajectories: list[Trajectory]) -> list[Trajectory]:
    """All ranks' trajectories, ordered by prompt, so that their order does not depend on the number of ranks."""
    if dist.is_available() and dist.is_initialized():
        gathered: list[list[Trajectory]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, trajectories)
        trajectories = [t for part in gathered for t in part]
    return sorted(trajectories, key=lambda t: (t.index, t.repeat))


def rollout_metrics(
    rollout: Rollout, kl_coef: float, returns: Tensor | None = None, recomputed: bool = True
) -> dict[str, float]:
    """What is logged of a rollout, under the names that PPO users know; KL and entropy in nats per answer.

    Args:
        rollout: All of it.
        kl_coef: Weight of the KL in the reward; 0 where it is not part of it.
        returns: What the critic was to predict, float32 [S, R]; None without a critic.
        recomputed: Whether `rollout.logps` come from a forward of their own: then their distance from what the engine
            said is logged, in nats per token. It is rounding, or else sampling and training differ.
    """
    kl, scores = rollout.kl.mean(), rollout.scores.mean()
    finished = rollout.finished.float()
    metrics = {
        "objective/scores": scores,
        "objective/scores_std": rollout.scores.std(correction=0),
        "objective/kl": kl,
        "objective/kl_coef": kl_coef,
        "objective/entropy": -rollout.logps.sum(-1).mean(),
        "objective/non_score_reward": -kl_coef * kl,
        "objective/rlhf_reward": scores - kl_coef * kl,
        "val/num_eos_tokens": finished.sum(),
        "response_length/mean": rollout.response_mask.sum(-1).float().mean(),
        "response_length/clip_ratio": 1 - finished.mean(),
    }
    if returns is not None:
        metrics["val/explained_variance"] = explained_variance(rollout.values, returns, rollout.response_mask)
    if recomputed:
        difference = (rollout.logps - rollout.sampled_logps).abs()[rollout.response_mask]
        metrics |= {"rollout/logps_diff": difference.mean(), "rollout/logps_diff_max": difference.max()}
    return {name: float(value) for name, value in metrics.items()}


def rollout_counts(prompt_ids: Sequence[Tensor], answers: Sequence[Sequence[Answer]]) -> dict[str, int]:
    """Work of sampling: prompts and their tokens, each seen once, answers and their tokens."""
    sizes = [len(answer.input_ids) for group in answers for answer in group]
    prompt_tokens = sum(len(ids) for ids in prompt_ids)
    return {
        "prompts": len(prompt_ids),
        "prompt_tokens": prompt_tokens,
        "answers": len(sizes),
        "sampled_tokens": sum(sizes),
    }


def with_tokens(trajectories: Sequence[Trajectory], rollout: Rollout, **numbers: Tensor) -> list[Example]:
    """The examples of the update: each scored token carries its old value, reference log-prob, the given [S, R]."""
    examples = as_examples([t.prompt_ids for t in trajectories], [t.answers for t in trajectories])
    numbers |= {"reference_logps": rollout.reference_logps, "old_values": rollout.values}
    done, row = [], 0
    for example in examples:
        branches = []
        for branch in example.branches:
            size = len(branch.input_ids)
            branches.append(replace(branch, tokens={name: v[row, :size] for name, v in numbers.items()}))
            row += 1
        done.append(replace(example, branches=tuple(branches)))
    return done


def _rectangle(rows: list[Tensor]) -> Tensor:
    return pad_sequence(rows, batch_first=True)
