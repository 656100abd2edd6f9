"""PPO, built of nothing but the library's functions, reaches optima that are known in closed form.

The task: write T tokens of a vocabulary of 4; the score is the share of token 0; the reference is uniform. With the
KL penalty beta the best policy is pi*(y) ~ pi_ref(y) exp(score / beta), which takes token 0 with the same probability
at every position, and its value is J* = beta log E_ref exp(score / beta).

Actor and critic are tables over states (tokens so far, zeros so far), which is all that the score depends on. A wrong
edit of any part is injected by replacing one function of `Parts`: it must miss the optimum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from lit_align.losses import clipped_policy_loss, clipped_value_loss
from lit_align.rollout.advantages import (
    broadcast_to_tokens,
    gae,
    rloo_advantages,
    shaped_rewards,
    whiten_advantages,
)

VOCABULARY = 4
EPISODES = 512
ITERATIONS = 200
EPOCHS = 4
LEARNING_RATE = 0.04
SEEDS = [0, 1]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Task:
    """Length, KL penalty, and the temperature at which the policy samples (and is judged)."""

    length: int
    beta: float
    temperature: float = 0.7

    @property
    def num_states(self) -> int:
        return self.length * (self.length + 1)

    @property
    def best_probability(self) -> float:
        """pi*(token 0): a token 0 is worth 1 / T, so its odds are multiplied by exp(1 / (T beta))."""
        weight = math.exp(1 / (self.length * self.beta))
        return weight / (weight + VOCABULARY - 1)

    @property
    def best_value(self) -> float:
        weight = math.exp(1 / (self.length * self.beta))
        return self.beta * self.length * math.log((weight + VOCABULARY - 1) / VOCABULARY)


BANDIT = Task(length=1, beta=0.5)
SHORT_FREE = Task(length=4, beta=0.05)
SHORT_HELD = Task(length=4, beta=0.25)
LONG = Task(length=8, beta=0.1)


def estimate(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return gae(rewards, values, mask, gamma=1.0, lam=0.95)


@dataclass(frozen=True)
class Parts:
    """What one iteration is made of, in its order; a test replaces one."""

    shaped_rewards: Callable[..., Tensor] = shaped_rewards
    estimate: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = estimate
    whiten: Callable[[Tensor, Tensor], Tensor] = whiten_advantages
    policy_loss: Callable = clipped_policy_loss
    value_loss: Callable = clipped_value_loss
    training_temperature: float | None = None


@dataclass
class Tables:
    """A tabular actor (logits per state) and critic (value per state)."""

    task: Task
    logits: Tensor = field(init=False)
    values: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.logits = torch.zeros(self.task.num_states, VOCABULARY, requires_grad=True)
        self.values = torch.zeros(self.task.num_states, requires_grad=True)

    def logps(self, temperature: float) -> Tensor:
        return (self.logits / temperature).log_softmax(-1)

    @torch.no_grad()
    def sample(self) -> tuple[Tensor, Tensor, Tensor]:
        """Actions [S, T], the states in which they were taken [S, T], and the score of each episode [S]."""
        probabilities = self.logps(self.task.temperature).exp()
        zeros, states, actions = torch.zeros(EPISODES, dtype=torch.long), [], []
        for t in range(self.task.length):
            states.append(t * (self.task.length + 1) + zeros)
            actions.append(torch.multinomial(probabilities[states[-1]], 1)[:, 0])
            zeros = zeros + (actions[-1] == 0)
        return torch.stack(actions, 1), torch.stack(states, 1), zeros / self.task.length


def train(task: Task, parts: Parts, seed: int) -> Tables:
    """PPO as the papers have it: roll out, shape rewards, estimate advantages, whiten, a few clipped epochs."""
    torch.manual_seed(seed)
    tables = Tables(task)
    optimizer = torch.optim.Adam([tables.logits, tables.values], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=ITERATIONS)
    temperature = parts.training_temperature or task.temperature
    mask = torch.ones(EPISODES, task.length, dtype=torch.bool)
    reference_logps = torch.full((EPISODES, task.length), -math.log(VOCABULARY))
    for _ in range(ITERATIONS):
        actions, states, scores = tables.sample()
        old_logps = tables.logps(temperature).detach()[states, actions]
        old_values = tables.values.detach()[states]
        rewards = parts.shaped_rewards(scores, old_logps, reference_logps, mask, task.beta)
        advantages, returns = parts.estimate(rewards, old_values, mask)
        advantages = parts.whiten(advantages, mask)
        for _ in range(EPOCHS):
            logps, values = tables.logps(temperature)[states, actions], tables.values[states]
            policy = parts.policy_loss(logps[mask], old_logps[mask], advantages[mask])
            value = parts.value_loss(values[mask], old_values[mask], returns[mask])
            optimizer.zero_grad(set_to_none=True)
            (policy.loss.mean() + value.loss.mean()).backward()
            optimizer.step()
        schedule.step()
    return tables


@torch.no_grad()
def judge(tables: Tables) -> tuple[float, float]:
    """Exact mean probability of token 0 over the states that the policy visits, and exact J = E[score] - beta KL."""
    task, logps = tables.task, tables.logps(tables.task.temperature).double()
    reached = torch.zeros(task.length + 1, dtype=torch.float64)
    reached[0], share, kl = 1.0, 0.0, 0.0
    for t in range(task.length):
        here = logps[t * (task.length + 1) : (t + 1) * (task.length + 1)]
        zero = here[:, 0].exp()
        share += float((reached * zero).sum()) / task.length
        kl += float((reached * (here.exp() * (here + math.log(VOCABULARY))).sum(-1)).sum())
        reached = reached * (1 - zero) + torch.cat([torch.zeros(1), (reached * zero)[:-1]])
    return share, share - task.beta * kl


def distance(task: Task, parts: Parts, seed: int) -> tuple[float, float]:
    """How far training ends from pi*(token 0) and from J*."""
    probability, value = judge(train(task, parts, seed))
    return abs(probability - task.best_probability), abs(value - task.best_value)


@pytest.mark.parametrize(
    ("task", "probability", "value"),
    [
        (BANDIT, 0.711235, 0.477229),
        (SHORT_FREE, 0.980187, 0.72674),
        (SHORT_HELD, 0.475367, 0.35737),
        (LONG, 0.537775, 0.38722),
    ],
)
def test_the_optimum_is_the_known_one(task, probability, value):
    assert task.best_probability == pytest.approx(probability, abs=1e-6)
    assert task.best_value == pytest.approx(value, abs=1e-5)


def test_the_judge_agrees_with_the_closed_form_on_the_best_policy():
    tables = Tables(LONG)
    tables.logits.data[:, 0] = LONG.temperature / (LONG.length * LONG.beta)
    assert judge(tables) == pytest.approx((LONG.best_probability, LONG.best_value), abs=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("task", [BANDIT, SHORT_FREE, SHORT_HELD, LONG], ids=str)
def test_ppo_reaches_the_optimum(task, seed):
    off_policy, off_value = distance(task, Parts(), seed)
    assert off_policy < 0.005 and off_value < 0.002


def test_the_critic_knows_what_is_still_to_come():
    """V(t, z) = z / T + (T - t) J* / T: what is written counts, and each token to come is worth the same."""
    task, tables = SHORT_HELD, train(SHORT_HELD, Parts(), seed=0)
    for t in range(task.length):
        for zeros in range(t + 1):
            expected = zeros / task.length + (task.length - t) * task.best_value / task.length
            assert tables.values[t * (task.length + 1) + zeros].item() == pytest.approx(expected, abs=0.02)


def test_critic_free_ppo_with_leave_one_out_baselines_reaches_the_optimum():
    def rloo(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return broadcast_to_tokens(rloo_advantages(rewards.sum(1), 8), mask), torch.zeros_like(values)

    off_policy, off_value = distance(SHORT_HELD, Parts(estimate=rloo), seed=0)
    assert off_policy < 0.005 and off_value < 0.002


# ---- wrong edits, each of which must miss


def values_shifted_by_one(rewards, values, mask):
    later = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    return estimate(rewards, later, mask)


def score_one_token_early(scores, logps, reference_logps, mask, kl_coef):
    kl_alone = shaped_rewards(torch.zeros_like(scores), logps, reference_logps, mask, kl_coef)
    kl_alone[:, -2] += scores
    return kl_alone


def kl_of_the_wrong_sign(scores, logps, reference_logps, mask, kl_coef):
    return shaped_rewards(scores, reference_logps, logps, mask, kl_coef)


def advantages_shifted_by_one(rewards, values, mask):
    advantages, returns = estimate(rewards, values, mask)
    return torch.cat([advantages[:, 1:], torch.zeros_like(advantages[:, :1])], dim=1), returns


def immediate_rewards_alone(rewards, values, mask):
    return rewards - values, rewards


WRONG = {
    "values shifted by one": {"estimate": values_shifted_by_one},
    "score one token early": {"shaped_rewards": score_one_token_early},
    "KL of the wrong sign": {"shaped_rewards": kl_of_the_wrong_sign},
    "no temperature in the training logits": {"training_temperature": 1.0},
    "advantages shifted by one": {"estimate": advantages_shifted_by_one},
    "immediate rewards instead of GAE": {"estimate": immediate_rewards_alone},
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_edit_ends_far_from_the_optimum(wrong, seed):
    off_policy, off_value = distance(SHORT_HELD, replace(Parts(), **WRONG[wrong]), seed)
    assert off_policy > 0.02 or off_value > 0.01
