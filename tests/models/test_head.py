"""The head in blocks and chunks: values and gradients are those of plain logits, at a bounded size and known cost."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from lit_align.batch import Branch, Example, StepTotals, example_parts, pack, token_parts
from lit_align.models import example_loss, projection, token_loss
from lit_align.models.adapters import add_adapters
from lit_align.models.head import TokenStats, head_logps, head_loss, head_stats
from lit_align.models.load import set_attention
from lit_align.models.source import LoraSettings

V, H = 50, 12
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "multiplied": {"logit_scale": 0.3},
    "divided": {"logits_scaling": 4.0},
    "capped": {"final_logit_softcapping": 1.5},
    "all of it": {"bias": True, "logit_scale": 2.0, "logits_scaling": 0.7, "final_logit_softcapping": 2.5},
}


def model_with(bias: bool = False, dtype: torch.dtype = torch.float64, size: int = V, **config):
    """What the head needs to know of a model."""
    torch.manual_seed(3)
    head = nn.Linear(H, size, bias=bias).to(dtype)
    text_config = SimpleNamespace(**config)
    return SimpleNamespace(
        get_output_embeddings=lambda: head, config=SimpleNamespace(get_text_config=lambda: text_config), head=head
    )


def oracle(model, hidden, targets, temperature, **config) -> TokenStats:
    """The same by the definitions, from whole logits."""
    logits = hidden @ model.head.weight.t()
    if model.head.bias is not None:
        logits = logits + model.head.bias
    logits = logits * config.get("logit_scale", 1.0) / config.get("logits_scaling", 1.0)
    if cap := config.get("final_logit_softcapping"):
        logits = cap * torch.tanh(logits / cap)
    logps = torch.log_softmax(logits / temperature, -1)
    entropy = -(logps.exp() * logps).sum(-1)
    return TokenStats(logps[range(len(targets)), targets], entropy, (logps.argmax(-1) == targets).double())


@pytest.fixture
def batch():
    """Four pairs of ragged length, some tokens not scored."""
    g = torch.Generator().manual_seed(1)

    def branch(size: int) -> Branch:
        weights = torch.rand(size, generator=g) * (torch.rand(size, generator=g) < 0.8)
        return Branch(torch.randint(V, (size,), generator=g), weights, {"old": torch.randn(size, generator=g)})

    sizes = [(5, 9), (1, 3), (14, 2), (6, 6)]
    examples = [Example(torch.randint(V, (3,), generator=g), (branch(a), branch(b))) for a, b in sizes]
    examples[1] = Example(examples[1].prefix_ids, (Branch(torch.tensor([4]), torch.zeros(1), {"old": torch.zeros(1)}),
                                                   examples[1].branches[1]))  # fmt: skip
    return pack(examples, range(4), StepTotals(1.0, 1.0))


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Several blocks, the last one short, and several chunks, even here."""
    monkeypatch.setattr(projection, "BLOCK", 16)


def hidden_of(batch, dtype=torch.float64) -> torch.Tensor:
    torch.manual_seed(5)
    return (3 * torch.randn(len(batch.scored), H, dtype=dtype)).requires_grad_()


def nll(stats: TokenStats, part) -> torch.Tensor:
    return -(stats.logps * part.scored.weights).sum()


def clipped(stats: TokenStats, part) -> torch.Tensor:
    """A loss of the PPO kind, with an entropy bonus."""
    ratio = torch.exp(stats.logps - part.tokens["old"] + 3)
    losses = torch.maximum(-ratio * part.tokens["old"], -ratio.clamp(0.8, 1.2) * part.tokens["old"])
    return (losses - 0.7 * stats.entropy.square()).sum()


def margins(stats: TokenStats, part) -> torch.Tensor:
    """A loss of the DPO kind."""
    sums = stats.logps.new_zeros(part.num_sequences).index_add(0, part.scored.sequences, stats.logps)
    return -nn.functional.logsigmoid(0.1 * (sums[part.groups[:, 0]] - sums[part.groups[:, 1]])).sum()


LOSSES = {
    "tokens": (nll, token_parts, False),
    "entropy": (clipped, token_parts, True),
    "pairs": (margins, example_parts, False),
}


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs, allow_unused=True)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_are_those_of_whole_logits(name, temperature, batch):
    config = {k: v for k, v in HEADS[name].items() if k != "bias"}
    model, hidden = model_with(**HEADS[name]), hidden_of(batch)
    targets = (hidden @ model.head.weight.t()).argmax(-1)
    targets[::2] = batch.scored.targets[::2]
    want = oracle(model, hidden, targets, temperature, **config)
    assert 0 < want.correct.sum() < len(targets)
    got = head_stats(model, hidden, targets, temperature, rows=7)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    torch.testing.assert_close(head_logps(model, hidden, targets, temperature), want.logps.detach(), rtol=0, atol=1e-12)
    assert (got.logps <= 0).all()


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("rows", [6, 1000], ids=["many parts", "one part"])
def test_the_loss_in_parts_has_the_gradient_of_the_whole(name, loss, rows, batch):
    config = {k: v for k, v in HEADS[name].items() if k != "bias"}
    loss_of, parts, entropy = LOSSES[loss]
    model, hidden = model_with(**HEADS[name]), hidden_of(batch)
    inputs = [hidden, model.head.weight] + ([model.head.bias] if model.head.bias is not None else [])
    whole = loss_of(oracle(model, hidden, batch.scored.targets, 0.8, **config), batch)
    got = head_loss(model, hidden, parts(batch, rows), loss_of, 0.8, entropy)
    torch.testing.assert_close(got, whole, rtol=1e-12, atol=0)
    for have, want in zip(gradients(2.5 * got, *inputs), gradients(2.5 * whole, *inputs), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(head_loss(model, hidden, parts(batch, rows), loss_of, 0.8), whole.detach())


@pytest.mark.parametrize("name", HEADS)
def test_stats_have_gradients_for_losses_that_need_the_whole(name, batch):
    config = {k: v for k, v in HEADS[name].items() if k != "bias"}
    model, hidden, targets = model_with(**HEADS[name]), hidden_of(batch), batch.scored.targets

    def coupled(stats):
        return stats.logps.square().sum() * stats.entropy.mean() + stats.logps.sort().values[::2].sum()

    inputs = [hidden, model.head.weight] + ([model.head.bias] if model.head.bias is not None else [])
    want = gradients(coupled(oracle(model, hidden, targets, 0.8, **config)), *inputs)
    have = gradients(coupled(head_stats(model, hidden, targets, 0.8, entropy_gradient=True, rows=7)), *inputs)
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert not head_stats(model, hidden, targets).entropy.requires_grad


def test_extreme_logits_stay_finite(batch):
    model = model_with(dtype=torch.float32)
    hidden = (300 * torch.randn(len(batch.scored), H)).requires_grad_()
    loss = head_loss(model, hidden, token_parts(batch, 6), clipped, entropy_gradient=True)
    want = torch.log_softmax(hidden.double() @ model.head.weight.double().t(), -1)
    got = head_logps(model, hidden, batch.scored.targets)
    chosen = want[range(len(got)), batch.scored.targets]
    torch.testing.assert_close(got.double(), chosen.detach(), rtol=1e-5, atol=1e-4)
    assert all(g.isfinite().all() for g in gradients(loss, hidden, model.head.weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_still_give_float32_log_probabilities(dtype, batch):
    model, hidden = model_with(dtype=dtype), hidden_of(batch, dtype)
    exact = torch.log_softmax(hidden.double() @ model.head.weight.double().t(), -1)
    want = exact[range(len(hidden)), batch.scored.targets]
    loss = head_loss(model, hidden, token_parts(batch, 6), nll)
    torch.testing.assert_close(head_logps(model, hidden, batch.scored.targets).double(), want, rtol=0, atol=2e-6)
    of_hidden, of_weight = gradients(loss, hidden, model.head.weight)
    assert loss.dtype == torch.float32 and of_hidden.dtype == of_weight.dtype == dtype


def test_a_frozen_head_gets_no_gradient_and_gives_the_same_one(batch):
    model, hidden = model_with(bias=True), hidden_of(batch)
    (want,) = gradients(head_loss(model, hidden, token_parts(batch, 6), nll), hidden)
    model.head.requires_grad_(False)
    (have,) = gradients(head_loss(model, hidden, token_parts(batch, 6), nll), hidden)
    assert torch.equal(have, want)


def test_nothing_scored_reaches_every_weight_with_zeros():
    model, empty = model_with(bias=True), pack([], [], StepTotals(1.0, 1.0))
    hidden = torch.zeros(0, H, dtype=torch.float64, requires_grad=True)
    for loss_of, parts, entropy in LOSSES.values():
        loss = head_loss(model, hidden, parts(empty, 6), loss_of, 1.0, entropy)
        found = gradients(loss, hidden, model.head.weight, model.head.bias)
        assert float(loss.detach()) == 0 and all(torch.equal(g, torch.zeros_like(g)) for g in found)


def products(model, hidden, run) -> float:
    """Multiplications of `run`, in units of one product of hidden states and vocabulary."""

    def in_place(out, a, b, **_):  # the counter knows addmm alone
        return 2 * a[0] * a[1] * b[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        run()
    return counter.get_total_flops() / (2 * hidden.numel() * len(model.head.weight))


@pytest.mark.parametrize(
    "frozen, separable, cost", [(False, True, 3), (True, True, 2), (False, False, 4), (True, False, 3)]
)
def test_what_the_head_costs_in_matrix_products(frozen, separable, cost, batch):
    model, hidden = model_with(), hidden_of(batch)
    model.head.requires_grad_(not frozen)

    def run():
        if separable:
            head_loss(model, hidden, token_parts(batch, 6), nll).backward()
        else:
            head_stats(model, hidden, batch.scored.targets, rows=6).logps.sum().backward()

    assert products(model, hidden, run) == pytest.approx(cost)


class Largest(TorchDispatchMode):
    """Size of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_no_tensor_grows_with_tokens_times_vocabulary(monkeypatch):
    monkeypatch.setattr(projection, "BLOCK", 512)
    model = model_with(dtype=torch.float32, size=4096)
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(4096, (5000,), generator=g)
    batch = pack([Example(ids[:0], (Branch(ids, torch.ones(5000)),))], [0], StepTotals(1.0, 1.0))
    hidden = torch.randn(len(batch.scored), H, requires_grad=True)
    with Largest() as largest:
        head_loss(model, hidden, token_parts(batch, 256), nll).backward()
        head_stats(model, hidden, batch.scored.targets, rows=256).logps.sum().backward()
    assert largest.numel <= 256 * 512  # [5000, 4096] would be 160 times as much
    assert len(batch.scored) * 4096 > 100 * largest.numel


class Conversions(TorchDispatchMode):
    """How often a tensor of this shape changes its dtype."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dtype, self.count = shape, dtype, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default:
            self.count += out.shape == self.shape and args[0].dtype == self.dtype
        return out


def test_weights_of_another_dtype_are_converted_once_for_all_chunks(monkeypatch, batch):
    monkeypatch.setattr(projection, "BLOCK", V)
    model, hidden = model_with(dtype=torch.bfloat16), hidden_of(batch, torch.bfloat16)
    with Conversions((V, H), torch.bfloat16) as forward:
        loss = head_loss(model, hidden, token_parts(batch, 6), nll)
    with Conversions((V, H), torch.bfloat16) as alone:
        with torch.no_grad():
            head_loss(model, hidden, token_parts(batch, 6), nll)
        stats = head_stats(model, hidden, batch.scored.targets, rows=6)
    with Conversions((V, H), torch.bfloat16) as backward:
        stats.logps.sum().backward()
    loss.backward()
    assert len(token_parts(batch, 6)) > 2 and (forward.count, alone.count, backward.count) == (1, 2, 1)


def test_a_head_that_is_more_than_a_matrix_goes_the_plain_way_and_says_so(batch, caplog):
    model, hidden = model_with(), hidden_of(batch)
    want = gradients(head_loss(model, hidden, token_parts(batch, 6), nll), hidden, model.head.weight)
    plain = model.head

    class Adapted(nn.Module):
        weight = plain.weight

        def forward(self, x):
            return plain(x)

    model.get_output_embeddings = lambda: Adapted()
    for _ in range(2):
        loss = head_loss(model, hidden, token_parts(batch, 6), nll)
        have = gradients(loss, hidden, plain.weight)
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # float32 logits
    assert sum("plain way" in message for message in caplog.messages) == 1


@pytest.mark.parametrize("loss", [token_loss, example_loss], ids=lambda loss: loss.__name__)
def test_an_empty_micro_batch_reaches_an_adapter_on_the_head(loss):
    sizes = dict(hidden_size=H, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V, **sizes))
    set_attention(model, "packed")
    model = add_adapters(model, LoraSettings(r=2, target_modules=["q_proj", "lm_head"]), "causal")
    total = loss(model, pack([], [], StepTotals(1.0, 1.0)), nll)
    total.backward()
    trained = [p.grad for p in model.parameters() if p.requires_grad]
    assert float(total.detach()) == 0 and len(trained) == 4 and all(g is not None and not g.any() for g in trained)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("loss", LOSSES)
def test_bfloat16_operands_on_a_gpu_are_summed_in_float32(loss, batch):
    loss_of, parts, entropy = LOSSES[loss]
    batch = batch.to("cuda")
    model = model_with(dtype=torch.float64)
    hidden = hidden_of(batch).detach().bfloat16().cuda().requires_grad_()
    model.head.to("cuda", torch.bfloat16)
    exact = SimpleNamespace(head=nn.Linear(H, V, bias=False, device="cuda", dtype=torch.float64))
    exact.head.weight.data.copy_(model.head.weight)
    wide = hidden.detach().double().requires_grad_()
    whole = loss_of(oracle(exact, wide, batch.scored.targets, 1.0), batch)
    got = head_loss(model, hidden, parts(batch, 6), loss_of, 1.0, entropy)
    torch.testing.assert_close(got.double(), whole, rtol=1e-5, atol=1e-5)
    have = gradients(got, hidden, model.head.weight)
    for a, b in zip(have, gradients(whole, wide, exact.head.weight), strict=True):
        assert float((a.double() - b).norm() / b.norm()) < 1e-2
