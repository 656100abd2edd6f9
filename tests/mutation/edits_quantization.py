"""Wrong edits of quantised bases."""

from __future__ import annotations

from tests.mutation.edit import Edit

QUANTIZATION, T_QUANTIZATION = "models/quantization.py", "models/test_quantization.py::"
MATRIX = T_QUANTIZATION + "test_a_matrix_of_any_shape_stands_for_what_the_papers_give"
PRODUCT = T_QUANTIZATION + "test_a_layer_has_the_product_and_the_gradient_of_its_matrix"

EDITS = [
    Edit("integers go to 128", QUANTIZATION, "[:, None] / 127", "[:, None] / 128", MATRIX),
    Edit(
        "the scales' mean is forgotten",
        QUANTIZATION,
        "dtype, scales[-1], of_scales",
        "dtype, 0 * scales[-1], of_scales",
        MATRIX,
    ),
    Edit(
        "blocks begin anew in each row",
        QUANTIZATION,
        "torch.Size((1, self.out_features * self.in_features))",
        "torch.Size((self.out_features, self.in_features))",
        MATRIX,
    ),
    Edit(
        "the gradient is that of other weights",
        QUANTIZATION,
        "return gradient @ ctx.layer.dequantized(gradient.dtype), None",
        "return gradient @ ctx.layer.weight.to(gradient.dtype), None",
        PRODUCT,
    ),
    Edit(
        "autocast is not followed",
        QUANTIZATION,
        "x = x.to(torch.get_autocast_dtype(device))",
        "x = x.to(torch.float32)",
        PRODUCT,
    ),
    Edit(
        "a Conv1D's matrix is given back the wrong way round",
        QUANTIZATION,
        "weight.T.contiguous() if layer.transposed else weight",
        "weight",
        T_QUANTIZATION + "test_a_plain_state_has_the_matrix_as_the_architecture_keeps_it",
    ),
]
