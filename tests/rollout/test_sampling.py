"""Whatever the engine, answers come from exactly softmax(logits / temperature), and it is known how each ended."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_align.rollout.engines import Decode, Generate
from lit_align.rollout.sampling import Sampling, answer_noise

ENGINES = [Decode(), Decode(refill_at=0.01), Generate()]


@pytest.fixture
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model).train()


@pytest.fixture(params=ENGINES, ids=repr)
def sample(request):
    """Samples one answer to each prompt."""

    def one_each(model, asked, stop_ids, sampling, noise=None):
        return [answer for (answer,) in request.param(model, asked, 1, stop_ids, sampling, noise)]

    return one_each


def prompts(*sizes: int) -> list[torch.Tensor]:
    return [torch.randint(0, 200, (n,)) for n in sizes]


def test_greedy_answers_equal_those_of_generate(sample, model):
    asked = prompts(3, 9, 1)
    got = sample(model, asked, [model.config.eos_token_id], Sampling(max_new_tokens=8, temperature=0))
    for prompt, answer in zip(asked, got, strict=True):
        want = model.eval().generate(prompt[None], max_new_tokens=8, do_sample=False)[0, len(prompt) :]
        assert answer.input_ids.tolist() == want.tolist()


def test_a_stop_token_ends_the_answer_and_is_its_last_token(sample, model):
    asked = prompts(4) * 200
    answers = sample(model, asked, list(range(0, 260, 2)), Sampling(max_new_tokens=3))
    assert {len(a.input_ids) for a in answers} == {1, 2, 3}
    for answer in answers:
        even = [int(t) % 2 == 0 for t in answer.input_ids]
        assert answer.finished == even[-1] and not any(even[:-1])
        assert answer.finished or len(answer.input_ids) == 3


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_first_token_follows_the_tempered_softmax(sample, model, temperature):
    """Chi-square over the 20 most probable tokens and the rest: 20 degrees of freedom, p = 1e-4 at 52.4."""
    (prompt,) = prompts(5)
    model.lm_head.weight.data.mul_(20)  # a random model is nearly uniform: make it peaked
    with torch.no_grad():
        probabilities = (model.eval()(prompt[None]).logits[0, -1].double() / temperature).softmax(-1)
    draws = 4000
    answers = sample(model, [prompt] * draws, [], Sampling(max_new_tokens=1, temperature=temperature, batch_size=1000))
    counts = torch.bincount(torch.stack([a.input_ids[0] for a in answers]), minlength=len(probabilities)).double()
    top = probabilities.topk(20).indices
    observed = torch.cat([counts[top], (draws - counts[top].sum())[None]])
    expected = torch.cat([probabilities[top], (1 - probabilities[top].sum())[None]]) * draws
    assert float(((observed - expected).square() / expected.clamp(min=1e-9)).sum()) < 52.4


def test_neighbours_and_batch_size_do_not_change_greedy_answers(sample, model):
    asked = prompts(2, 11, 6, 1, 3)
    options = {"max_new_tokens": 5, "temperature": 0}
    together = sample(model, asked, [], Sampling(**options))
    apart = sample(model, asked, [], Sampling(**options, batch_size=1))
    assert [a.input_ids.tolist() for a in together] == [a.input_ids.tolist() for a in apart]


def test_an_answer_depends_on_its_own_key_alone(sample, model):
    """Not on its neighbours, their order, or the number of answers that are generated side by side."""
    asked, keys = prompts(2, 11, 6, 1, 3), [(0, 1, index, 0) for index in range(5)]
    noise = answer_noise(keys, 9)
    together = sample(model, asked, [], Sampling(max_new_tokens=9), noise)
    assert len({tuple(a.input_ids.tolist()) for a in together}) == 5
    backwards = sample(model, asked[::-1], [], Sampling(max_new_tokens=9, batch_size=2), answer_noise(keys[::-1], 9))
    assert [a.input_ids.tolist() for a in backwards[::-1]] == [a.input_ids.tolist() for a in together]
    longer = sample(model, asked, [], Sampling(max_new_tokens=12), answer_noise(keys, 12))
    assert [a.input_ids[:9].tolist() for a in longer] == [a.input_ids.tolist() for a in together]


@pytest.mark.parametrize("key", [(1, 1, 0, 0), (0, 2, 0, 0), (0, 1, 1, 0), (0, 1, 0, 1)])
def test_every_part_of_a_key_counts(key):
    assert not torch.equal(answer_noise([key], 4), answer_noise([(0, 1, 0, 0)], 4))


def test_a_token_of_probability_zero_is_never_drawn(sample, model):
    (prompt,) = prompts(4)
    head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size)
    head.bias.data[::2] = -torch.inf
    model.lm_head = head
    edges = torch.tensor([0.0, 1 - 2**-53, 0.5], dtype=torch.float64)[:, None]
    answers = sample(model, [prompt] * 3, [], Sampling(max_new_tokens=1), edges)
    assert all(int(a.input_ids[0]) % 2 == 1 for a in answers)


def test_sampling_leaves_the_mode_and_gradients_alone(sample, model):
    sample(model, prompts(3), [], Sampling(max_new_tokens=2))
    assert model.training and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("wrong", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"batch_size": 0}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        Sampling(**wrong)
