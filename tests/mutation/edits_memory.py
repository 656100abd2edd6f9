"""Wrong edits of what a plan adds up."""

from __future__ import annotations

from tests.mutation.edit import Edit

MEMORY, T_MEMORY = "models/memory.py", "models/test_memory.py::"
EXACT = T_MEMORY + "test_activations_are_what_autograd_keeps[llama-float32-False-False-0.0]"

EDITS = [
    Edit(
        "attention's keys are forgotten",
        MEMORY,
        "compute * 2 * (shape.queries + shape.keys)",
        "compute * 2 * shape.queries",
        EXACT,
    ),
    Edit("the gate is kept once", MEMORY, "(2 if shape.gated else 0)", "(1 if shape.gated else 0)", EXACT),
    Edit(
        "the last norm is forgotten",
        MEMORY,
        "return tokens * (shape.layers * layer + last)",
        "return tokens * shape.layers * layer",
        EXACT,
    ),
    Edit(
        "keys alone are cached",
        MEMORY,
        "shape.layers * 2 * shape.keys * shape.element",
        "shape.layers * shape.keys * shape.element",
        T_MEMORY + "test_a_cache_of_keys_and_values[False]",
    ),
    Edit(
        "a ring sends once",
        MEMORY,
        "return 2 * size * (devices - 1) // devices",
        "return size * (devices - 1) // devices",
        T_MEMORY + "test_what_rings_send",
    ),
]
