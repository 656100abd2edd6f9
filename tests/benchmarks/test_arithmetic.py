"""The harness' arithmetic: a wrong count or a gate that lets anything through would make every number worthless."""

import copy
import math

import pytest

from benchmarks.flops import Shape, example, head, ppo_iteration, trunk
from benchmarks.meter import digest
from benchmarks.stats import gate, median, percentile, slope, timed
from benchmarks.tokens import forced_answers, iterations, scored_tokens, signature, unique_tokens

SHAPE = Shape(layers=2, hidden=8, heads=4, kv_heads=2, head_dim=2, intermediate=16, vocabulary=50)
# By hand: 8x8 query, 8x4 key, 8x4 value, 8x8 output, 3 of 8x16.
LAYER = 64 + 32 + 32 + 64 + 3 * 128


def test_sizes_come_from_a_model_configuration():
    config = {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
    assert Shape.of({**config, "intermediate_size": 16, "vocab_size": 50}) == SHAPE
    assert SHAPE.layer_weights == LAYER


def test_operations_of_a_document_are_those_of_its_matrices_and_half_of_the_attention_square():
    size = 5
    # Scores and weighted sum: 2 products of 2 * D for each head and each (query, key) pair; half the square is masked.
    attention = 2 * 2 * SHAPE.head_dim * SHAPE.heads * size**2 / 2
    assert trunk(SHAPE, 0, [size]) == SHAPE.layers * (2 * LAYER * size + attention)
    assert head(SHAPE, 3) == 2 * 8 * 50 * 3
    assert example(SHAPE, "sft", 0, [size], 4) == 3 * (trunk(SHAPE, 0, [size]) + head(SHAPE, 4))


def test_a_prompt_counts_once_however_many_answers_hang_from_it():
    both, one = trunk(SHAPE, 7, [3, 4]), trunk(SHAPE, 7, [3])
    assert both < one + trunk(SHAPE, 7, [4])
    dense = 2 * SHAPE.layers * LAYER
    attention = 2 * SHAPE.layers * SHAPE.heads * SHAPE.head_dim
    assert both == dense * 14 + attention * (7**2 + 2 * 7 * 3 + 3**2 + 2 * 7 * 4 + 4**2)
    # A branch alone after a prompt is the whole sequence, attention included.
    assert trunk(SHAPE, 7, [3]) == trunk(SHAPE, 0, [10])


def test_stages_count_their_passes():
    pair = (6, [2, 3])
    assert example(SHAPE, "rm", *pair, 5) == 3 * trunk(SHAPE, *pair)
    assert example(SHAPE, "dpo", *pair, 5) == 4 * (trunk(SHAPE, *pair) + head(SHAPE, 5))
    body, scores = trunk(SHAPE, 6, [4]), head(SHAPE, 4)
    # Sampled and scored: policy and reference with projection, reward model and critic without; then both trained.
    assert ppo_iteration(SHAPE, [6], 4, epochs=2) == 4 * body + 2 * scores + 2 * 3 * (2 * body + scores)


def test_percentiles_and_slopes():
    assert percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert percentile([1.0, 2.0, 3.0], 1.0) == 3.0
    assert median([5.0]) == 5.0
    assert slope([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2.0)
    assert slope([1, 10], [7, 7]) == pytest.approx(0.0)


def run(**changes):
    steps = [{"digest": d, "tokens": t, "examples": 2} for d, t in (("a", 10), ("b", 30), ("c", 20))]
    one = {"examples": "x", "losses": [1.0, 2.0, 3.0], "grad_norm": 5.0, "steps": steps}
    one |= {"seconds": [9.0, 2.0, 3.0], "cpu_seconds": [9.0, 4.0, 6.0], "extra_seconds": 0.0}
    return copy.deepcopy(one) | changes


def test_the_gate_passes_what_is_equal():
    assert gate(run(), run(losses=[1.00009, 2.001, 3.0], grad_norm=5.004)) == []


@pytest.mark.parametrize(
    "peer, fault",
    [
        (run(examples="y"), "different token ids"),
        (run(losses=[1.0002, 2.0, 3.0]), "loss of step 0"),
        (run(losses=[1.0, 2.0, 3.01]), "loss of step 2"),
        (run(losses=[1.0, 2.0]), "2 there"),
        (run(losses=[1.0, math.nan, 3.0]), "not finite"),
        (run(grad_norm=5.01), "gradient norm"),
        (run(steps=run()["steps"][::-1]), "different examples"),
    ],
)
def test_the_gate_stops_every_difference(peer, fault):
    assert any(fault in text for text in gate(run(), peer))


def test_where_the_peer_makes_up_its_own_batches_only_the_examples_of_the_run_are_compared():
    peer = run(steps=run()["steps"][::-1], losses=[9.0, 9.0, 9.0], grad_norm=9.0)
    assert gate(run(), peer, same_order=False) == []
    assert gate(run(), {**peer, "examples": "y"}, same_order=False) != []


def test_timed_steps_leave_the_warm_up_out():
    total = timed(run(), warmup=1)
    assert total["tokens"] == 50 and total["examples"] == 4 and total["seconds"] == 5.0
    assert total["tokens_per_second"] == 10.0 and total["cpu_seconds"] == 10.0


def test_work_done_once_for_all_examples_is_paid_by_each_step_in_its_share():
    total = timed(run(extra_seconds=6.0), warmup=1)
    assert total["seconds"] == 5.0 + 6.0 * 50 / 60
    assert total["seconds_without_extra"] == 5.0


PAIR = {"prompt": [1, 2], "branches": [[3], [4, 5]], "weights": [[1.0], [1.0, 0.0]]}
CONVERSATION = {"prompt": [], "branches": [[1, 2, 3]], "weights": [[1.0, 0.0, 2.0]]}


def test_tokens_are_counted_once_and_scored_where_something_stands_before_them():
    assert unique_tokens(PAIR) == 5 and scored_tokens(PAIR) == 2
    assert unique_tokens(CONVERSATION) == 3 and scored_tokens(CONVERSATION) == 1
    assert iterations([PAIR, PAIR, PAIR], 2, 10) == [{"tokens": 24, "examples": 2}, {"tokens": 12, "examples": 1}]


def test_a_digest_looks_at_ids_and_labels_but_not_at_order():
    assert signature(PAIR) == [[1, 2, 3, 1], [1, 2, 4, 5, 1]]
    both = [signature(PAIR), signature(CONVERSATION)]
    assert digest(both) == digest(both[::-1])
    other = {**PAIR, "weights": [[1.0], [1.0, 1.0]]}
    assert digest([signature(PAIR)]) != digest([signature(other)])


def test_forced_answers_depend_on_the_prompt_alone():
    first, second = forced_answers([[1, 2], [3]], 4, 100), forced_answers([[3], [1, 2]], 4, 100)
    assert first == second[::-1] and first[0] != first[1]
    assert all(17 <= token < 99 for row in first for token in row)
