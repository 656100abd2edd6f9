"""Each way of attending over a packed row equals a dense mask over it in float64."""

import pytest
import torch

from lit_align.models import attention
from lit_align.models.segments import Scores, span_attention
from lit_align.models.span_sdpa import span_sdpa
from lit_align.models.varlen import VarlenKernel, installed_kernel, varlen_attention
from tests.models.dense_attention import (
    dense,
    newer_form,
    older_form,
    oldest_form,
    packed_row,
    register_cpu_kernels,
    visible,
)

ROWS = {
    "documents": [(0, 70), (0, 1), (0, 130)],
    "pairs": [(5, 7, 3), (1, 1, 9), (66, 70, 129)],
    "groups": [(9, 2, 2, 70, 1), (3, 4, 5, 6, 7)],
    "some without prefix": [(0, 4, 3), (6, 2, 5)],
    "empty": [],
}
HEADS = [(2, 2), (6, 2)]
DIMENSION, SCALE = 8, 0.4


def inputs(batch, heads, dtype=torch.float64, value_dimension=DIMENSION, device="cpu"):
    """Query, key, value as projections make them, and the gradient of the output."""
    g = torch.Generator().manual_seed(3)
    length = batch.input_ids.shape[1]
    sizes = [(heads[0], DIMENSION), (heads[1], DIMENSION), (heads[1], value_dimension), (heads[0], value_dimension)]
    made = [torch.randn(1, length, *size, generator=g, dtype=torch.float64).to(device, dtype) for size in sizes]
    return [tensor.transpose(1, 2).requires_grad_() for tensor in made[:3]], made[3]


def results(function, tensors, upstream):
    output = function(*tensors)
    return [output, *torch.autograd.grad(output, tensors, upstream.to(output.dtype))]


def wanted(batch, tensors, upstream, window=None, softcap=None):
    mask = visible(batch, window).to(upstream.device)
    return results(lambda q, k, v: dense(q, k, v, mask, SCALE, softcap), tensors, upstream)


def assert_equal(found, expected, tolerance):
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        # With a window of 1 the scores have no gradient at all: noise is measured against the output then.
        size = max(float(other.double().norm()), float(expected[0].double().norm()))
        assert float((one - other).double().norm()) <= tolerance * size


@pytest.fixture(scope="module")
def kernels():
    """Every form of the varlen function, and torch's own over slow kernels for the CPU."""
    register_cpu_kernels()
    own = installed_kernel()
    without = VarlenKernel(own.function)
    forms = {"newer": VarlenKernel(newer_form), "older": VarlenKernel(older_form), "oldest": VarlenKernel(oldest_form)}
    return forms | {"torch": own, "torch, its backward unknown": without}


FORMS = ["newer", "older", "oldest", "torch", "torch, its backward unknown"]


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window, softcap", [(None, None), (None, 0.7), (1, None), (5, 0.7), (67, None)])
def test_blocks_equal_a_dense_mask(row, heads, window, softcap):
    batch = packed_row(*ROWS[row])
    tensors, upstream = inputs(batch, heads, value_dimension=5)
    scores = Scores(SCALE, window, softcap)
    found = results(lambda q, k, v: span_attention(q, k, v, batch.varlen.spans, scores), tensors, upstream)
    assert_equal(found, wanted(batch, tensors, upstream, window, softcap), 1e-14)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [None, 5, 67])
def test_kernels_span_by_span_equal_a_dense_mask(row, heads, window):
    batch = packed_row(*ROWS[row])
    tensors, upstream = inputs(batch, heads)
    found = results(lambda q, k, v: span_sdpa(q, k, v, batch.varlen.spans, SCALE, window), tensors, upstream)
    assert_equal(found, wanted(batch, tensors, upstream, window), 1e-14)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [None, 5, 67])
@pytest.mark.parametrize("form", FORMS)
def test_one_call_with_variable_lengths_equals_a_dense_mask(row, heads, window, form, kernels):
    if form == "oldest" and window is not None:
        assert not kernels[form].has_window
        return
    batch = packed_row(*ROWS[row])
    tensors, upstream = inputs(batch, heads)
    found = results(
        lambda q, k, v: varlen_attention(q, k, v, batch.varlen, SCALE, window, kernels[form]), tensors, upstream
    )
    assert_equal(found, wanted(batch, tensors, upstream, window), 1e-14)


def test_gathered_keys_are_not_kept_for_backward(kernels):
    batch = packed_row((40, 3, 3, 3, 3), (30, 2, 2, 2, 2))
    length, gathered = batch.input_ids.shape[1], len(batch.varlen.gather.keys)
    tensors, _ = inputs(batch, (6, 2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape[0]) or t, lambda t: t):
        varlen_attention(*tensors, batch.varlen, SCALE, kernel=kernels["torch"])
    assert kernels["torch"].backward is not None and gathered > length
    assert length in kept and gathered not in kept


def test_gradients_of_gathered_keys_are_summed_in_float32(kernels):
    """A sum of bfloat16 numbers one by one would stand still: 256 + 1 = 256."""
    branches = 9
    batch = packed_row((1, *[1] * branches))
    gather = batch.varlen.gather
    gradient = torch.ones(len(gather.keys), 1, 1, dtype=torch.bfloat16)
    gradient[gather.own[0]] = 256.0
    from lit_align.models import varlen

    found = varlen._ungathered(gradient, gather, 1, torch.bfloat16)
    assert float(found[0, 0, 0]) == 256.0 + branches - 1


@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 4e-3), (torch.float16, 5e-4), (torch.float32, 1e-6)])
@pytest.mark.parametrize("row", ["pairs", "groups"])
def test_low_precision_costs_one_rounding(dtype, limit, row):
    """Half a unit in the last place is 2^-9 = 2e-3 of a number in bfloat16; twice that is allowed."""
    batch = packed_row(*ROWS[row])
    tensors, upstream = inputs(batch, (6, 2), dtype)
    scores = Scores(SCALE)
    found = results(lambda q, k, v: span_attention(q, k, v, batch.varlen.spans, scores), tensors, upstream)
    assert all(tensor.dtype == dtype for tensor in found)
    assert_equal([t.double() for t in found], [t.double() for t in wanted(batch, tensors, upstream)], limit)


def test_autocast_gives_its_own_type_and_computes_in_float32():
    batch = packed_row(*ROWS["pairs"])
    tensors, _ = inputs(batch, (6, 2), torch.float32)
    rounded = [tensor.detach().bfloat16() for tensor in tensors]
    expected = span_attention(*rounded, batch.varlen.spans, Scores(SCALE))
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = attention.packed_attention(torch.nn.Module(), *tensors, None, varlen=batch.varlen, scaling=SCALE)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)


def test_dropout_drops_weights_and_keeps_their_mean():
    batch = packed_row((30, 40, 20))
    tensors, _ = inputs(batch, (4, 2), torch.float32)
    mask = visible(batch, None)
    module = torch.nn.Module()

    def drawn():
        return attention.packed_attention(module, *tensors, None, varlen=batch.varlen, scaling=SCALE, dropout=0.3)[0]

    samples = torch.stack([drawn().detach() for _ in range(400)])
    assert not torch.equal(samples[0], samples[1])
    error = (samples.mean(0) - dense(*tensors, mask, SCALE)).detach() / (samples.std(0) / 20 + 1e-6)
    assert float(error.square().mean()) < 1.3


class NoReading(torch.utils._python_dispatch.TorchDispatchMode):
    """Fails where a number would be read back from the device, or a shape would depend on one."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item", "equal")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert not name.startswith(self.FORBIDDEN), name
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            assert all(index is None or index.dtype != torch.bool for index in args[1])
        return function(*args, **(kwargs or {}))


class Outer(torch.autograd.Function):
    """A kernel that reads nothing."""

    @staticmethod
    def forward(ctx, query, key, value):
        ctx.shapes = (query.shape, key.shape, value.shape)
        return query.clone()

    @staticmethod
    def backward(ctx, gradient):
        return tuple(torch.ones(shape, dtype=gradient.dtype) for shape in ctx.shapes)


@pytest.mark.parametrize("engine", ["blocks", "span by span", "varlen", "varlen, no groups"])
@pytest.mark.parametrize("window", [None, 5])
def test_no_layer_reads_from_the_device(engine, window):
    batch = packed_row(*ROWS["pairs"])
    tensors, upstream = inputs(batch, (6, 2))

    def newer(query, key, value, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        return Outer.apply(query, key, value)

    def older(query, key, value, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        return Outer.apply(query, key, value)

    engines = {
        "blocks": lambda q, k, v: span_attention(q, k, v, batch.varlen.spans, Scores(SCALE, window, 0.7)),
        "span by span": lambda q, k, v: span_sdpa(q, k, v, batch.varlen.spans, SCALE, window),
        "varlen": lambda q, k, v: varlen_attention(q, k, v, batch.varlen, SCALE, window, VarlenKernel(newer)),
        "varlen, no groups": lambda q, k, v: varlen_attention(
            q, k, v, batch.varlen, SCALE, window, VarlenKernel(older)
        ),
    }
    with NoReading():
        results(engines[engine], tensors, upstream)


def test_reading_from_the_device_would_be_found():
    with NoReading(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        torch.ones(1).item()
    with NoReading(), pytest.raises(AssertionError):
        torch.ones(3)[torch.tensor([True, False, True])]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("row", ["documents", "pairs", "groups"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(
    "dtype, limit", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 1e-5)], ids=str
)
def test_a_gpu_gives_the_same(row, heads, window, dtype, limit):
    batch = packed_row(*ROWS[row])
    tensors, upstream = inputs(batch, heads, dtype, device="cuda")
    expected = wanted(batch, tensors, upstream, window)
    moved = batch.to("cuda")
    options = {"varlen": moved.varlen, "scaling": SCALE, "sliding_window": window}
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = results(
            lambda q, k, v: attention.packed_attention(torch.nn.Module(), q, k, v, None, **options)[0],
            tensors,
            upstream,
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_equal([t.double() for t in found], [t.double() for t in expected], limit)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_uses_the_kernel_for_variable_lengths():
    batch = packed_row(*ROWS["pairs"])
    tensors, _ = inputs(batch, (6, 2), torch.bfloat16, device="cuda")
    with torch.profiler.profile() as profile:
        attention.packed_attention(torch.nn.Module(), *tensors, None, varlen=batch.to("cuda").varlen)
    names = {event.key for event in profile.key_averages()}
    assert "aten::_flash_attention_forward" in names and "aten::scaled_dot_product_attention" not in names
