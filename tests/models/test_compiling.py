"""Compiled layers compute the same, for rows of any length, without being compiled anew."""

import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from lit_align.batch import Branch, Example, StepTotals, pack
from lit_align.models import token_loss
from lit_align.models.load import load_causal_lm
from lit_align.models.source import ModelSource
from lit_align.rollout.sampling import Sampling
from lit_align.stages import LitSFT


def row(seed: int, pairs: int):
    g = torch.Generator().manual_seed(seed)

    def ids() -> torch.Tensor:
        return torch.randint(200, (int(torch.randint(2, 30, (1,), generator=g)),), generator=g)

    def branch() -> Branch:
        tokens = ids()
        return Branch(tokens, torch.ones(len(tokens)))

    examples = [Example(ids(), (branch(), branch())) for _ in range(pairs)]
    return pack(examples, range(pairs), StepTotals(1.0, 1.0))


def nll(stats, part):
    return -stats.logps.sum()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler (g++)")
def test_compiled_layers_compute_the_same_and_stay_compiled(tiny_model):
    plain, compiled = (load_causal_lm(ModelSource(path=str(tiny_model), compile=c)) for c in (False, True))
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    torch._dynamo.reset()  # whatever else this process has compiled is no part of the count
    before, frames = counters["frames"]["ok"], []
    for seed in range(5):
        batch = row(seed, pairs=1 + seed)
        losses = [token_loss(model, batch, nll) for model in (plain, compiled)]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
        for model, loss in zip((plain, compiled), losses, strict=True):
            model.zero_grad()
            loss.backward()
        for (name, a), b in zip(plain.named_parameters(), compiled.parameters(), strict=True):
            assert float((a.grad - b.grad).norm() / a.grad.norm()) < 2e-6, name
        frames.append(counters["frames"]["ok"] - before)
    # The second row's other length makes the graphs those of any length.
    assert 0 < frames[0] < 10 and frames[1:] == [frames[1]] * 4

    stage = LitSFT(ModelSource(path=str(tiny_model), compile=True))
    stage.configure_model()
    noise = torch.rand(2, 5, dtype=torch.float64)
    prompts = [torch.tensor([5, 6, 7]), torch.tensor([8, 9])]
    answers = stage.answers(prompts, 1, Sampling(max_new_tokens=5), noise)
    assert len(answers) == 2 and counters["frames"]["ok"] - before == frames[-1], "sampling compiles nothing"
