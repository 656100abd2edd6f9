"""PPO on one trunk, and the same four networks held apart: built with transformers and peft alone."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lit_align.models.attention import PACKED
from lit_align.models.export import export_module
from lit_align.models.load import load_scalar_model, load_tokenizer
from lit_align.models.scalar import ScalarHead
from lit_align.models.source import LoraSettings, ModelSource
from lit_align.rollout.rewards import RewardFunction
from lit_align.rollout.sampling import Sampling
from lit_align.stages import LitPPO, PPOSettings

POLICY_LORA = LoraSettings(r=4, alpha=8)
CRITIC_LORA = LoraSettings(r=2, alpha=8)
REWARD_LORA = LoraSettings(r=3, alpha=6)


def even_characters(prompts, answers, records):
    """Reward: share of even characters."""
    return [sum(ord(c) % 2 == 0 for c in answer) / max(len(answer), 1) for answer in answers]


def spread(model: nn.Module, seed: int, scale: float = 0.1) -> None:
    """Makes adapters and heads say something: fresh ones change nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def write_reward_adapter(base, folder, lora=REWARD_LORA) -> ModelSource:
    """A folder as the `rm` stage exports it: adapters and score head, without their base."""
    source = ModelSource(path=str(base), lora=lora)
    torch.manual_seed(11)
    model = load_scalar_model(source)
    spread(model, 12)
    export_module(model, load_tokenizer(source), folder, merge_lora=False)
    return ModelSource(path=str(folder))


def sgd(parameters):
    return torch.optim.AdamW(parameters, lr=3e-3, eps=1e-4, weight_decay=0.0)


def constant(optimizer, total_steps):
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def build(kind, base, reward_model=None, critic=None, **options) -> LitPPO:
    """The stage; `kind` is LitPPO or what derives of it."""
    policy = options.pop("policy", ModelSource(path=str(base), lora=POLICY_LORA))
    settings = {"ppo_epochs": 2, "num_minibatches": 2, "num_answers": 2, "kl_coef": 0.1}
    settings |= options.pop("ppo", {})
    return kind(
        policy,
        reward_model=reward_model,
        critic=critic,
        reward_functions=[RewardFunction(even_characters)],
        ppo=PPOSettings(**settings),
        sampling=Sampling(max_new_tokens=6),
        optimizer=sgd,
        critic_lr=1e-2,
        lr_scheduler=constant,
        **options,
    )


class FourNetworks(LitPPO):
    """The same roles, each a network with all of its weights to itself; the reward model's adapters are folded in."""

    def configure_model(self) -> None:
        """Builds them without the code under test."""
        if self.policy is not None:
            return
        base, reward = self.policy_source.path, self.reward_model_source
        self.tokenizer = load_tokenizer(self.policy_source)
        self.policy = get_peft_model(AutoModelForCausalLM.from_pretrained(base), adapters(POLICY_LORA, "CAUSAL_LM"))
        if self.critic_source is reward:
            self.critic = PeftModel.from_pretrained(scalar(base), reward.path, is_trainable=True)
        else:
            self.critic = get_peft_model(scalar(base), adapters(CRITIC_LORA, "SEQ_CLS", ["score"]))
        if reward is not None:
            self.reward_model = PeftModel.from_pretrained(scalar(base), reward.path).merge_and_unload()
            self.reward_model.eval().requires_grad_(False)
        for network in (self.policy, self.critic, self.reward_model):
            if network is not None:
                inner = network.get_base_model() if hasattr(network, "get_base_model") else network
                inner.set_attn_implementation(PACKED)


def adapters(settings: LoraSettings, task: str, saved: list[str] | None = None) -> LoraConfig:
    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules="all-linear",
        task_type=task,
        modules_to_save=saved,
    )


def scalar(base):
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    head = ScalarHead(model.score.in_features, 1, bias=False)
    nn.init.zeros_(head.weight)
    model.score = head
    return model
