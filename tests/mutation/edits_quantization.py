"""Wrong edits of quantised bases."""

from __future__ import annotations

from tests.mutation.edit import Edit

QUANTIZATION, T_QUANTIZATION = "models/quantization.py", "models/test_quantization.py::"
ADAPTERS, EXPORT = "models/adapters.py", "stages/test_quantized_base.py::"
NF4, INT8 = (
    T_QUANTIZATION + f"test_a_layer_stands_for_the_values_that_the_papers_give[float32-{kind}]"
    for kind in ("nf4", "int8")
)
GRADIENTS = T_QUANTIZATION + "test_losses_and_gradients_are_those_of_the_plain_model[False-float32-int8]"

EDITS = [
    Edit("integers go to 128", QUANTIZATION, "[:, None] / 127", "[:, None] / 128", INT8),
    Edit(
        "the scales' mean is forgotten",
        QUANTIZATION,
        "dtype, scales[-1], of_scales",
        "dtype, 0 * scales[-1], of_scales",
        NF4,
    ),
    Edit(
        "blocks begin anew in each row",
        QUANTIZATION,
        "torch.Size((1, self.out_features * self.in_features))",
        "torch.Size((self.out_features, self.in_features))",
        NF4,
    ),
    Edit(
        "the gradient is that of other weights",
        QUANTIZATION,
        "return gradient @ ctx.layer.dequantized(gradient.dtype), None",
        "return gradient @ ctx.layer.weight.to(gradient.dtype), None",
        GRADIENTS,
    ),
    Edit(
        "autocast is not followed",
        QUANTIZATION,
        "x = x.to(torch.get_autocast_dtype(device))",
        "x = x.to(torch.float32)",
        T_QUANTIZATION + "test_autocast_computes_in_16_bits_as_a_plain_layer_does[nf4]",
    ),
    Edit(
        "a Conv1D's matrix is exported the wrong way round",
        ADAPTERS,
        'if getattr(packed, "transposed", False):',
        "if False:",
        EXPORT + "test_the_merged_export_of_gpt_2_has_its_matrices_the_right_way_round",
    ),
]
