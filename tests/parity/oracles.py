"""Independent, slow references: Python floats and loops, written from the papers' equations.

Nothing here imports the library or torch; lists of floats in, lists of floats out.
"""

from __future__ import annotations

import math

Numbers = list[float]


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def log_logistic(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


# ---- preference losses: (c, r, ref_c, ref_r, len_c, len_r) are lists over the pairs; one number per pair comes back


def dpo(c, r, ref_c, ref_r, len_c, len_r, beta, label_smoothing=0.0):
    losses = []
    for i in range(len(c)):
        x = beta * (c[i] - ref_c[i]) - beta * (r[i] - ref_r[i])
        losses.append(-(1 - label_smoothing) * log_logistic(x) - label_smoothing * log_logistic(-x))
    return losses


def dpo_length_normalised(c, r, ref_c, ref_r, len_c, len_r, beta):
    return [
        -log_logistic(beta / len_c[i] * (c[i] - ref_c[i]) - beta / len_r[i] * (r[i] - ref_r[i])) for i in range(len(c))
    ]


def hinge(c, r, ref_c, ref_r, len_c, len_r, beta):
    return [max(0.0, 1 - beta * ((c[i] - ref_c[i]) - (r[i] - ref_r[i]))) for i in range(len(c))]


def ipo(c, r, ref_c, ref_r, len_c, len_r, beta, length_normalised=True):
    losses = []
    for i in range(len(c)):
        n_c, n_r = (len_c[i], len_r[i]) if length_normalised else (1, 1)
        losses.append(((c[i] - ref_c[i]) / n_c - (r[i] - ref_r[i]) / n_r - 1 / (2 * beta)) ** 2)
    return losses


def robust(c, r, ref_c, ref_r, len_c, len_r, beta, label_smoothing=0.0):
    """Equation of the unbiased loss: ((1-e) L(c, r) - e L(r, c)) / (1 - 2e), with DPO's loss L."""
    straight = dpo(c, r, ref_c, ref_r, len_c, len_r, beta)
    swapped = dpo(r, c, ref_r, ref_c, len_r, len_c, beta)
    e = label_smoothing
    return [((1 - e) * a - e * b) / (1 - 2 * e) for a, b in zip(straight, swapped, strict=True)]


def exo_pair(c, r, ref_c, ref_r, len_c, len_r, beta, smoothing):
    """KL from the policy's pairwise distribution to the smoothed labels, each written out as a distribution."""
    losses = []
    for i in range(len(c)):
        rewards = [beta * (c[i] - ref_c[i]), beta * (r[i] - ref_r[i])]
        top = max(rewards)
        mass = [math.exp(reward - top) for reward in rewards]
        q = [m / sum(mass) for m in mass]
        target = [1 - smoothing, smoothing]
        losses.append(sum(a * (math.log(a) - math.log(b)) for a, b in zip(q, target, strict=True)))
    return losses


def discopop(c, r, ref_c, ref_r, len_c, len_r, beta, tau=0.05):
    losses = []
    for i in range(len(c)):
        x = beta * ((c[i] - ref_c[i]) - (r[i] - ref_r[i]))
        modulation = logistic(x / tau)
        losses.append((1 - modulation) * -log_logistic(x) + modulation * math.exp(-x))
    return losses


def nca_pair(c, r, ref_c, ref_r, len_c, len_r, beta):
    losses = []
    for i in range(len(c)):
        r_c, r_r = beta * (c[i] - ref_c[i]), beta * (r[i] - ref_r[i])
        losses.append(-log_logistic(r_c) - 0.5 * (log_logistic(-r_c) + log_logistic(-r_r)))
    return losses


def bco_pair(c, r, ref_c, ref_r, len_c, len_r, beta):
    """Two binary cross-entropies: the chosen response has label 1, the rejected one label 0."""
    losses = []
    for i in range(len(c)):
        p_c, p_r = logistic(beta * (c[i] - ref_c[i])), logistic(beta * (r[i] - ref_r[i]))
        losses.append(-math.log(p_c) - math.log(1 - p_r))
    return losses


def sppo_hard(c, r, ref_c, ref_r, len_c, len_r, beta):
    """(log ratio - eta (win rate - 1/2))^2 for both, eta = 1 / beta, win rates 1 and 0."""
    losses = []
    for i in range(len(c)):
        total = 0.0
        for log_ratio, win_rate in [(c[i] - ref_c[i], 1.0), (r[i] - ref_r[i], 0.0)]:
            total += (log_ratio - (win_rate - 0.5) / beta) ** 2
        losses.append(total)
    return losses


def apo_zero(c, r, ref_c, ref_r, len_c, len_r, beta):
    return [1 - logistic(beta * (c[i] - ref_c[i])) + logistic(beta * (r[i] - ref_r[i])) for i in range(len(c))]


def apo_down(c, r, ref_c, ref_r, len_c, len_r, beta):
    losses = []
    for i in range(len(c)):
        r_c, r_r = beta * (c[i] - ref_c[i]), beta * (r[i] - ref_r[i])
        losses.append(logistic(r_c) + 1 - logistic(r_c - r_r))
    return losses


def aot(c, r, ref_c, ref_r, len_c, len_r, beta, label_smoothing=0.0):
    policy = sorted(c[i] - r[i] for i in range(len(c)))
    reference = sorted(ref_c[i] - ref_r[i] for i in range(len(c)))
    return _quantile_losses(policy, reference, beta, label_smoothing)


def aot_unpaired(c, r, ref_c, ref_r, len_c, len_r, beta, label_smoothing=0.0):
    chosen = sorted(c[i] - ref_c[i] for i in range(len(c)))
    rejected = sorted(r[i] - ref_r[i] for i in range(len(c)))
    return _quantile_losses(chosen, rejected, beta, label_smoothing)


def _quantile_losses(upper, lower, beta, e):
    losses = []
    for a, b in zip(upper, lower, strict=True):
        x = beta * (a - b)
        losses.append(-(1 - e) * log_logistic(x) - e * log_logistic(-x))
    return losses


def orpo(c, r, ref_c, ref_r, len_c, len_r, beta):
    losses = []
    for i in range(len(c)):
        p_c, p_r = math.exp(c[i] / len_c[i]), math.exp(r[i] / len_r[i])
        odds_ratio = (p_c / (1 - p_c)) / (p_r / (1 - p_r))
        losses.append(-math.log(p_c) - beta * log_logistic(math.log(odds_ratio)))
    return losses


def simpo(c, r, ref_c, ref_r, len_c, len_r, beta, gamma_beta_ratio):
    gamma = gamma_beta_ratio * beta
    return [-log_logistic(beta / len_c[i] * c[i] - beta / len_r[i] * r[i] - gamma) for i in range(len(c))]


def pairwise_reward(chosen: Numbers, rejected: Numbers, margin: Numbers | None, center_coef: float) -> Numbers:
    """Minus the log-probability that chosen beats rejected by the margin (Bradley-Terry), plus the pull to 0."""
    losses = []
    for i, (c, r) in enumerate(zip(chosen, rejected, strict=True)):
        gap = margin[i] if margin else 0.0
        beats = math.exp(c - gap) / (math.exp(c - gap) + math.exp(r))
        losses.append(-math.log(beats) + center_coef * (c + r) ** 2)
    return losses


# ---- language


def shifted_cross_entropy(logits: list[list[Numbers]], labels: list[list[int]], ignore_index: int = -100) -> float:
    """Mean over trained tokens, by the definition of softmax."""
    total, count = 0.0, 0
    for row_logits, row_labels in zip(logits, labels, strict=True):
        for t in range(1, len(row_labels)):
            if row_labels[t] == ignore_index:
                continue
            scores = row_logits[t - 1]
            top = max(scores)
            log_mass = top + math.log(sum(math.exp(s - top) for s in scores))
            total += log_mass - scores[row_labels[t]]
            count += 1
    return total / count


# ---- PPO


def clipped_policy(logp, old, advantage, low, high, dual=None):
    """The objective's minimum, case by case, negated."""
    ratio = math.exp(logp - old)
    clipped = min(max(ratio, 1 - low), 1 + high)
    objective = min(ratio * advantage, clipped * advantage)
    if dual is not None and advantage < 0:
        objective = max(objective, dual * advantage)
    return -objective


def clipped_value(value, old, target, clip_range):
    errors = [(value - target) ** 2]
    if clip_range is not None:
        errors.append((min(max(value, old - clip_range), old + clip_range) - target) ** 2)
    return max(errors) / 2


def shaped_rewards(score: float, logps: Numbers, reference: Numbers, mask: list[bool], kl_coef: float) -> Numbers:
    rewards = [-kl_coef * (a - b) if m else 0.0 for a, b, m in zip(logps, reference, mask, strict=True)]
    for t in reversed(range(len(mask))):
        if mask[t]:
            rewards[t] += score
            break
    return rewards


def gae(rewards: Numbers, values: Numbers, mask: list[bool], gamma: float, lam: float) -> tuple[Numbers, Numbers]:
    """The sum A_t = sum_l (gamma lam)^l delta_{t+l} over the policy's tokens alone, put back in their places."""
    places = [t for t in range(len(mask)) if mask[t]]
    deltas = []
    for i, t in enumerate(places):
        after = values[places[i + 1]] if i + 1 < len(places) else 0.0
        deltas.append(rewards[t] + gamma * after - values[t])
    advantages, returns = [0.0] * len(mask), [0.0] * len(mask)
    for i, t in enumerate(places):
        advantages[t] = sum((gamma * lam) ** k * deltas[i + k] for k in range(len(places) - i))
        returns[t] = advantages[t] + values[t]
    return advantages, returns


def whiten(values: Numbers, mask: list[bool]) -> Numbers:
    inside = [v for v, m in zip(values, mask, strict=True) if m]
    mean = sum(inside) / len(inside)
    variance = sum((v - mean) ** 2 for v in inside) / len(inside)
    return [(v - mean) / math.sqrt(variance + 1e-8) if m else 0.0 for v, m in zip(values, mask, strict=True)]


def rloo(scores: Numbers, n: int) -> Numbers:
    advantages = []
    for i, score in enumerate(scores):
        first = i - i % n
        others = [scores[j] for j in range(first, first + n) if j != i]
        advantages.append(score - sum(others) / len(others))
    return advantages


def grpo(scores: Numbers, n: int, eps: float) -> Numbers:
    advantages = []
    for i, score in enumerate(scores):
        group = scores[i - i % n : i - i % n + n]
        mean = sum(group) / n
        std = math.sqrt(sum((s - mean) ** 2 for s in group) / (n - 1))
        advantages.append((score - mean) / (std + eps))
    return advantages
