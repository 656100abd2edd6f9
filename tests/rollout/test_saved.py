"""A rollout that goes through a checkpoint is the same rollout, bit for bit."""

import torch

from lit_align.batch import Branch, Example
from lit_align.rollout.saved import pack_examples, unpack_examples


def example(prefix: int, *sizes: int) -> Example:
    def branch(size: int) -> Branch:
        tokens = {"advantages": torch.randn(size), "old_logps": torch.randn(size)}
        return Branch(torch.randint(0, 99, (size,)), torch.rand(size), tokens)

    return Example(torch.randint(0, 99, (prefix,)), tuple(branch(size) for size in sizes))


def test_examples_come_back_as_they_were(tmp_path):
    examples = [example(3, 2, 5), example(1, 1, 1), example(7, 4, 2)]
    torch.save(pack_examples(examples), tmp_path / "rollout.pt")
    back = unpack_examples(torch.load(tmp_path / "rollout.pt", weights_only=True))
    for before, after in zip(examples, back, strict=True):
        assert torch.equal(before.prefix_ids, after.prefix_ids)
        for one, other in zip(before.branches, after.branches, strict=True):
            assert torch.equal(one.input_ids, other.input_ids) and torch.equal(one.weights, other.weights)
            assert one.tokens.keys() == other.tokens.keys()
            assert all(torch.equal(values, other.tokens[name]) for name, values in one.tokens.items())
