"""Tokens are drawn by inverting the distribution function; the oracle is a plain float64 one."""

import pytest
import torch

from lit_align.rollout.draw import BLOCK, draw


def slow(logits, temperature, uniform):
    """Bounds of each token's place on [0, 1), float64 [R, V + 1], and log-probabilities, float64 [R, V]."""
    logps = (logits.double() / temperature).log_softmax(-1)
    upper = logps.exp().cumsum(-1)
    return torch.cat([torch.zeros(len(logits), 1, dtype=torch.float64), upper / upper[:, -1:]], 1), logps


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
@pytest.mark.parametrize("size", [3, BLOCK - 1, BLOCK, 4 * BLOCK + 7])
def test_a_token_is_drawn_where_its_place_holds_the_number(size, temperature):
    logits, uniform = torch.randn(300, size) * 4, torch.rand(300, dtype=torch.float64)
    token, logps = draw(logits, temperature, uniform)
    bounds, expected = slow(logits, temperature, uniform)
    low, high = bounds.gather(1, token[:, None])[:, 0], bounds.gather(1, token[:, None] + 1)[:, 0]
    # The weights are float32; at the very bound of two tokens either may come out.
    assert (low - 1e-6 <= uniform).all() and (uniform < high + 1e-6).all()
    inside = (low + 1e-6 < uniform) & (uniform < high - 1e-6)
    assert inside.float().mean() > 0.95
    torch.testing.assert_close(logps.double(), expected.gather(1, token[:, None])[:, 0], rtol=0, atol=3e-6)


def test_all_numbers_find_a_token_of_positive_probability():
    logits = torch.full((1, 2 * BLOCK + 40), -torch.inf)
    logits[0, [5, BLOCK + 3]] = torch.tensor([0.0, 1.0])
    uniform = torch.tensor([0.0, 2**-53, 0.2689, 0.2690, 1 - 2**-52, 1 - 2**-53], dtype=torch.float64)
    token, logps = draw(logits.expand(6, -1), 1.0, uniform)
    assert token.tolist() == [5, 5, 5, BLOCK + 3, BLOCK + 3, BLOCK + 3]
    assert torch.isfinite(logps).all()


def test_a_row_is_drawn_alike_in_every_batch():
    logits, uniform = torch.randn(40, 5 * BLOCK), torch.rand(40, dtype=torch.float64)
    token, logps = draw(logits, 0.9, uniform)
    for rows in (slice(0, 1), slice(7, 12), slice(39, 40)):
        alone = draw(logits[rows], 0.9, uniform[rows])
        assert torch.equal(alone[0], token[rows]) and torch.equal(alone[1], logps[rows])


def test_what_is_worked_on_in_parts_is_the_same(monkeypatch):
    logits, uniform = torch.randn(9, 300), torch.rand(9, dtype=torch.float64)
    whole = draw(logits, 1.0, uniform)
    monkeypatch.setattr("lit_align.rollout.draw.CACHED", 600)
    assert all(torch.equal(a, b) for a, b in zip(draw(logits, 1.0, uniform), whole, strict=True))


def test_greedy_takes_the_most_probable_and_leaves_logits_alone():
    logits = torch.randn(4, 50)
    before = logits.clone()
    token, logps = draw(logits, 0.0, torch.rand(4, dtype=torch.float64))
    assert torch.equal(token, logits.argmax(-1)) and not logps.any()
    draw(logits, 0.5, torch.rand(4, dtype=torch.float64))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("warns", [False, True])
def test_a_trainer_that_wants_determinism_draws_too(warns, monkeypatch):
    """As torch on a GPU: it refuses running sums of floats there, or warns."""
    real, logits = torch.Tensor.cumsum, torch.randn(3, 700)

    def cumsum(self, *args, **kwargs):
        if self.is_floating_point() and torch.are_deterministic_algorithms_enabled():
            raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation")
        return real(self, *args, **kwargs)

    uniform = torch.rand(3, dtype=torch.float64)
    expected = draw(logits, 0.7, uniform)
    monkeypatch.setattr(torch.Tensor, "cumsum", cumsum)
    torch.use_deterministic_algorithms(True, warn_only=warns)
    try:
        got = draw(logits, 0.7, uniform)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled() == warns
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, got, expected))
