"""PPO whose rewards come from a server is PPO with the function that the server runs."""

import pytest
import torch

from lit_align.models.source import ModelSource
from lit_align.rollout.estimators import RLOO
from lit_align.rollout.remote import RemoteReward
from lit_align.rollout.rewards import RewardFunction
from lit_align.rollout.sampling import Sampling
from lit_align.stages import LitPPO, PPOSettings
from tests.rollout.reward_server import Judge, serving


def length(prompts, answers, records):
    return [len(answer) / 10 for answer in answers]


@pytest.fixture
def trained(tiny_model, prompts, make_data, make_trainer):
    def run(function):
        torch.manual_seed(0)
        stage = LitPPO(
            ModelSource(path=str(tiny_model)),
            reward_functions=[RewardFunction(function, weight=0.5)],
            estimator=RLOO(),
            ppo=PPOSettings(num_answers=2),
            sampling=Sampling(max_new_tokens=4),
            optimizer=lambda p: torch.optim.SGD(p, lr=0.5),
        )
        make_trainer(max_epochs=1).fit(stage, datamodule=make_data(prompts))
        return stage.policy.state_dict()

    return run


def test_ppo_trains_on_them_as_on_the_function_that_the_server_runs(trained, prompts):
    judge = Judge(lambda asked: length(**asked))
    with serving(judge) as url:
        remote = trained(RemoteReward(url, batch_size=5))
    assert [len(request["answers"]) for request in judge.requests] == [5, 5, 5, 1]  # 8 prompts, 2 answers each
    asked = [record["prompt"] for request in judge.requests for record in request["records"]]
    assert asked[0] == asked[1] and all(ids in [prompt.tolist() for prompt in prompts] for ids in asked)
    local, other = trained(length), trained(lambda p, a, r: [-score for score in length(p, a, r)])
    assert all(torch.equal(value, remote[name]) for name, value in local.items())
    assert any(not torch.equal(value, remote[name]) for name, value in other.items())
