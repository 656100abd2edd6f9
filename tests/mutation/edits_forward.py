"""Wrong edits of the head, of the parts that it works on, of attention over packed rows, and of full steps."""

from __future__ import annotations

from tests.mutation.edit import Edit

PROJECTION, HEAD, SEGMENTS = "models/projection.py", "models/head.py", "models/segments.py"
PARTS, PLAN, VARLEN = "batch/parts.py", "batch/plan.py", "batch/varlen.py"
T_HEAD = "models/test_head.py::"
VALUES = T_HEAD + "test_values_are_those_of_whole_logits"
GRADIENTS = T_HEAD + "test_the_loss_in_parts_has_the_gradient_of_the_whole"
BLOCKS = "models/test_attention_engines.py::test_blocks_equal_a_dense_mask"

EDITS = [
    Edit("entropy is not moved to the new maximum", PROJECTION, "(moment + (before - top) * total)", "moment", VALUES),
    Edit("the sum is not moved to the new maximum", PROJECTION, "total = shrunk * total +", "total = total +", VALUES),
    Edit("probabilities pull up", PROJECTION, "factor = -of_logps * to", "factor = of_logps * to", GRADIENTS),
    Edit("hidden states lose the scale", PROJECTION, "return of_rows.mul_(head.inner)", "return of_rows", GRADIENTS),
    Edit("the cap's slope forgets temperature", PROJECTION, "(head.temperature / head.cap)", "head.cap", GRADIENTS),
    Edit(
        "the entropy's gradient without the entropy",
        PROJECTION,
        "(chunk.normaliser - chunk.entropy)",
        "chunk.normaliser",
        GRADIENTS,
    ),
    Edit("what comes from above is left out", HEAD, "g.mul_(of_total[0]) for g in", "g for g in", GRADIENTS),
    Edit(
        "sequences of a part keep their numbers",
        PARTS,
        "part.scored.sequences - sequences.start",
        "part.scored.sequences",
        "batch/test_parts.py::test_example_parts_hold_whole_examples_numbered_from_0",
    ),
    Edit(
        "the gradient of scores without the softmax's own term",
        SEGMENTS,
        ".sub_(_queries(inner, block)).mul_(weights)",
        ".mul_(weights)",
        BLOCKS,
    ),
    Edit("a query may not see itself", SEGMENTS, "hidden = back < 0 if", "hidden = back <= 0 if", BLOCKS),
    Edit(
        "a branch is joined to any prefix before it",
        VARLEN,
        " and (segment.prefix_start, segment.prefix_stop) == (last.start, last.stop)",
        "",
        "batch/test_varlen.py::test_a_prefix_is_joined_with_its_first_branch",
    ),
    Edit(
        "a step is filled beyond its tokens",
        PLAN,
        "insort(rooms, (max(left - length, 0), step))",
        "insort(rooms, (left, step))",
        "batch/test_plan.py::test_shuffled_steps_in_tokens_are_packed_best_fit",
    ),
]
