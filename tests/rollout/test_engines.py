"""Engines give the same answers from the same numbers, with the log-probabilities that training gives them."""

import gc
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from lit_align.models import projection
from lit_align.models.load import set_attention
from lit_align.rollout.engines import VLLM, ContinuousBatching, Decode, Generate
from lit_align.rollout.engines.decode import Decoding
from lit_align.rollout.engines.graphs import bucket, captured
from lit_align.rollout.engines.slots import SlotLayer
from lit_align.rollout.experience import as_examples
from lit_align.rollout.sampling import Sampling, answer_noise
from lit_align.rollout.scoring import answer_logps, micro_batches

SIZES = dict(vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
STOPS = list(range(0, 40))
"""So many that answers end at ragged lengths."""


def llama():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2))
    set_attention(model, "packed")
    return model


def mistral():
    """Sliding windows that are shorter than prompt and answer."""
    torch.manual_seed(1)
    return MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=5, head_dim=8))


def gemma():
    """Windows in every other layer, soft-capped attention (eager) and soft-capped logits."""
    torch.manual_seed(2)
    config = Gemma2Config(**SIZES, num_key_value_heads=2, sliding_window=6, head_dim=8, final_logit_softcapping=2.0)
    return Gemma2ForCausalLM(config)


@pytest.fixture(params=[llama, mistral, gemma], ids=lambda make: make.__name__)
def model(request):
    return request.param().train()


def task(num_answers=3, tokens=14):
    prompts = [torch.randint(40, 250, (n,)) for n in (3, 11, 1, 7, 11, 2, 5)]
    keys = [(0, 1, prompt, answer) for prompt in range(len(prompts)) for answer in range(num_answers)]
    return prompts, num_answers, STOPS, answer_noise(keys, tokens)


def ids(groups):
    return [answer.input_ids.tolist() for group in groups for answer in group]


@pytest.mark.parametrize("rows", [1, 4, 8, 64])
@pytest.mark.parametrize("refill_at", [0.01, 0.25, 1.0])
def test_decode_answers_as_generate_does(model, rows, refill_at, monkeypatch):
    """However few rows there are, however they are refilled, and with a cache that soon has to be moved."""
    monkeypatch.setattr("lit_align.rollout.engines.decode.SLACK", 3)
    prompts, n, stops, noise = task()
    sampling = Sampling(max_new_tokens=14, temperature=0.8, batch_size=rows)
    expected = Generate()(model, prompts, n, stops, Sampling(14, 0.8), noise)
    got = Decode(refill_at=refill_at)(model, prompts, n, stops, sampling, noise)
    assert ids(got) == ids(expected)
    assert len({len(row) for row in ids(got)}) > 3
    for a, b in zip((a for g in got for a in g), (b for g in expected for b in g), strict=True):
        assert a.finished == b.finished == (int(a.input_ids[-1]) in stops)
        torch.testing.assert_close(a.logps, b.logps, rtol=0, atol=2e-5)


@pytest.mark.parametrize("engine", [Decode(), Generate(), ContinuousBatching(page_size=16)], ids=repr)
def test_log_probabilities_are_those_that_training_scores(engine):
    model = llama()
    prompts, n, stops, noise = task()
    answers = engine(model, prompts, n, stops, Sampling(max_new_tokens=14, temperature=0.7), noise)
    packed = list(micro_batches(as_examples(prompts, answers), 50, torch.device("cpu")))
    assert len(packed) > 1
    scored = answer_logps(model, packed, 0.7)
    for answer, logps in zip((a for group in answers for a in group), scored, strict=True):
        torch.testing.assert_close(answer.logps, logps, rtol=0, atol=5e-6)
    assert model.config._attn_implementation == "packed" and len(scored) == len(prompts) * n


def test_sampling_rounds_what_training_rounds(monkeypatch):
    """On a GPU the head's operands have 16 bits; that is stood in for here."""

    def rounded(a, b):
        return torch.mm(a.bfloat16().float(), b.bfloat16().float())

    model, (prompts, n, stops, noise) = llama(), task()
    with torch.no_grad():
        model.lm_head.weight *= 20
    monkeypatch.setattr(projection, "_product", rounded)
    answers = Decode()(model, prompts, n, stops, Sampling(14), noise)
    scored = answer_logps(model, list(micro_batches(as_examples(prompts, answers), 50, torch.device("cpu"))), 1.0)
    monkeypatch.undo()
    exact = answer_logps(model, list(micro_batches(as_examples(prompts, answers), 50, torch.device("cpu"))), 1.0)
    assert max(float((a - b).abs().max()) for a, b in zip(scored, exact, strict=True)) > 1e-2
    for answer, logps in zip((a for group in answers for a in group), scored, strict=True):
        assert float((answer.logps - logps).abs().median()) < 1e-4  # but where rounding falls to the other side


def test_work_follows_the_live_rows():
    """Each prompt is seen once, and each row of each step is a token of an answer that is still being written."""
    model = llama()
    prompts, n, stops, noise = task()
    for rows in (1, 5, 64):
        decoding = Decoding(Decode(refill_at=0.01), model, prompts, n, stops, Sampling(14, 1.0, rows), noise)
        with torch.no_grad():
            answers = decoding.run()
        assert decoding.row_steps == sum(len(a.input_ids) - 1 for a in answers)
        assert decoding.prefilled_tokens == sum(len(ids) for ids in prompts)
    assert decoding.steps == max(len(a.input_ids) for a in answers) - 1


class Replays:
    """Stands in for CUDA graphs: what is captured may only be asked for with the same tensors, and is run again."""

    def __init__(self):
        self.captured, self.replayed = 0, 0

    def __call__(self, step):
        self.captured += 1

        def replay():
            self.replayed += 1
            return step()

        return replay


@pytest.mark.parametrize("read_every", [1, 4, 50])
def test_fixed_shapes_and_late_reading_change_no_answer(model, read_every, monkeypatch):
    monkeypatch.setattr("lit_align.rollout.engines.decode.SLACK", 3)
    prompts, n, stops, noise = task()
    sampling, replays = Sampling(14, 1.0, 5), Replays()
    decoding = Decoding(Decode(), model.eval(), prompts, n, stops, sampling, noise, capture=replays)
    decoding.read_every = read_every
    with torch.no_grad():
        got = decoding.run()
    assert [a.input_ids.tolist() for a in got] == ids(Generate()(model, prompts, n, stops, sampling, noise))
    assert replays.captured <= len({bucket(i, 5) for i in range(1, 6)}) and replays.replayed > 5


@pytest.mark.parametrize("capture", [None, Replays()], ids=["plain", "captured"])
@pytest.mark.parametrize("read_every", [1, 4, 50])
def test_rows_that_go_on_in_vain_stay_within_the_learned_positions(capture, read_every):
    """The table of positions ends with the longest prompt and answer; beyond it a GPU would end the process."""
    torch.manual_seed(3)
    prompts, n, stops, noise = task()
    longest = max(len(prompt) for prompt in prompts) + 14
    sizes = dict(vocab_size=260, n_positions=longest, n_embd=32, n_layer=2, n_head=4)
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)).eval()
    sampling = Sampling(14, 1.0, 4)
    decoding = Decoding(Decode(), model, prompts, n, stops, sampling, noise, capture=capture)
    decoding.read_every = read_every
    with torch.no_grad():
        got = decoding.run()
    assert max(len(answer.input_ids) for answer in got) == 14
    assert [a.input_ids.tolist() for a in got] == ids(Generate()(model, prompts, n, stops, sampling, noise))


@pytest.mark.parametrize("capture", [None, Replays()], ids=["plain", "captured"])
def test_the_cache_is_gone_when_the_answers_are_there(capture, monkeypatch):
    """Not only when Python next looks for cycles: training needs the memory at once."""
    made, build = [], SlotLayer.__init__

    def noting(layer, *args):
        build(layer, *args)
        made.extend((weakref.ref(layer.keys), weakref.ref(layer.values)))

    monkeypatch.setattr(SlotLayer, "__init__", noting)
    model, (prompts, n, stops, noise) = llama().eval(), task()
    decoding = Decoding(Decode(), model, prompts, n, stops, Sampling(14), noise, capture=capture)
    gc.disable()
    try:
        with torch.no_grad():
            decoding.run()
        assert len(made) == 4 and not any(tensor() is not None for tensor in made)
    finally:
        gc.enable()


def test_a_model_that_cannot_be_captured_is_run_as_it_is(caplog):
    def refuse(step):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    model, (prompts, n, stops, noise) = llama().eval(), task()
    with torch.no_grad():
        got = Decoding(Decode(), model, prompts, n, stops, Sampling(14), noise, capture=refuse).run()
    assert [a.input_ids.tolist() for a in got] == ids(Decode()(model, prompts, n, stops, Sampling(14), noise))
    assert [r.message for r in caplog.records].count(caplog.records[0].message) == 1 and "not permitted" in caplog.text


def test_buckets_waste_at_most_a_third():
    for rows in range(1, 300):
        assert rows <= bucket(rows, 1000) <= max(rows * 1.5, 1)
    assert bucket(200, 201) == 201


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("graphs", [True, False])
def test_decode_on_a_gpu_answers_as_generate_does(graphs):
    model = llama().cuda()
    prompts, n, stops, noise = task()
    prompts = [prompt.cuda() for prompt in prompts]
    sampling = Sampling(14, 1.0, 5)
    got = Decode(cuda_graphs=graphs, read_every=4)(model, prompts, n, stops, sampling, noise)
    assert ids(got) == ids(Generate()(model, prompts, n, stops, sampling, noise))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_decode_step_can_be_captured(caplog):
    model, (prompts, n, stops, noise) = llama().cuda().eval(), task()
    prompts = [prompt.cuda() for prompt in prompts]
    with torch.no_grad():
        Decoding(Decode(), model, prompts, n, stops, Sampling(14), noise, capture=captured).run()
    assert "no CUDA graph" not in caplog.text


def test_a_model_with_a_state_is_refused():
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(ValueError, match="Generate"):
        Decode()(model, [torch.tensor([1, 2])], 1, [], Sampling(2))


def test_a_model_with_convolutions_between_its_attention_layers_is_refused():
    """It does not say of itself that it has a state."""
    kinds = ["conv", "full_attention"]
    model = Lfm2ForCausalLM(Lfm2Config(**SIZES, num_key_value_heads=2, layer_types=kinds, conv_L_cache=3))
    assert not model._is_stateful
    with pytest.raises(ValueError, match=r"Lfm2ForCausalLM carries a state along in layers of type conv; .* Generate"):
        Decode()(model, [torch.tensor([1, 2])], 1, [], Sampling(2))
    (answers,) = Generate()(model, [torch.tensor([1, 2])], 1, [], Sampling(2))
    assert len(answers[0].input_ids) == 2


@pytest.mark.parametrize("wrong", [{"refill_at": 0.0}, {"refill_at": 2.0}, {"read_every": 0}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        Decode(**wrong)


# -- engines that draw by themselves


def test_continuous_batching_repeats_a_rollout_and_leaves_random_numbers_alone():
    model, (prompts, n, stops, noise) = llama(), task()
    engine, before = ContinuousBatching(page_size=16), torch.get_rng_state()
    first = engine(model, prompts, n, stops, Sampling(14), noise)
    assert torch.equal(torch.get_rng_state(), before)
    assert ids(first) == ids(engine(model, prompts, n, stops, Sampling(14), noise))
    assert ids(first) != ids(engine(model, prompts, n, stops, Sampling(14), 1 - noise))
    assert len({tuple(a.input_ids.tolist()) for a in first[0]}) == n
    assert not engine.uses_noise and Decode().uses_noise and Generate().uses_noise


def test_continuous_batching_says_when_answers_are_lost(monkeypatch):
    model, (prompts, n, stops, noise) = llama(), task()
    lost = SimpleNamespace(error="out of pages", generated_tokens=[], logprobs=[])
    monkeypatch.setattr(model, "generate_batch", lambda *args, **options: {"a": lost})
    with pytest.raises(RuntimeError, match="0 of 21 answers; the first error: out of pages"):
        ContinuousBatching()(model, prompts, n, stops, Sampling(14), noise)


def test_continuous_batching_names_another_engine_where_attention_cannot_be_paged():
    model, (prompts, n, stops, noise) = gemma(), task()
    set_attention(model, "packed")
    with pytest.raises(ValueError, match=r"Gemma2ForCausalLM does not have. Set `engine: Decode`"):
        ContinuousBatching()(model, prompts, n, stops, Sampling(14), noise)
    assert model.config._attn_implementation == "packed"


@pytest.mark.parametrize("engine", [Decode(), ContinuousBatching(page_size=16)], ids=repr)
def test_greedy_answers_are_those_of_generate(engine):
    model, (prompts, n, stops, noise) = llama(), task()
    got = engine(model, prompts, n, stops, Sampling(14, 0.0), noise)
    assert ids(got) == ids(Generate()(model, prompts, n, stops, Sampling(14, 0.0), noise))
    assert not any(answer.logps.any() for group in got for answer in group)


class FakeVLLM:
    """A stand-in: says what it was asked, and answers with the seed's digits."""

    def __init__(self):
        self.built, self.loaded, self.forgotten, self.asked = [], [], 0, []
        self.SamplingParams = lambda **settings: SimpleNamespace(**settings)
        outer = self

        class LLM:
            def __init__(self, **settings):
                outer.built.append(settings)

            def apply_model(self, function):
                network = SimpleNamespace(load_weights=lambda weights: outer.loaded.append(dict(weights)))
                return [function(network)]

            def reset_prefix_cache(self):
                outer.forgotten += 1

            def generate(self, prompts, settings, use_tqdm):
                outer.asked += zip(prompts, settings, strict=True)
                tokens = [[40 + s.seed % 7, 3, 9][: s.max_tokens] for s in settings]
                logprobs = [[{t: SimpleNamespace(logprob=-0.5)} for t in row] for row in tokens]
                pairs = zip(tokens, logprobs, strict=True)
                rows = [SimpleNamespace(token_ids=t, logprobs=p) for t, p in pairs]
                return [SimpleNamespace(outputs=[row]) for row in rows]

        self.LLM = LLM


def test_vllm_gets_the_live_weights_before_each_rollout(monkeypatch):
    fake = FakeVLLM()
    monkeypatch.setitem(sys.modules, "vllm", fake)
    model, (prompts, n, stops, noise) = llama(), task()
    engine = VLLM(options={"enforce_eager": True})
    answers = engine(model, prompts, n, stops, Sampling(14, 0.7), noise)
    with torch.no_grad():
        model.lm_head.weight += 1
    engine(model, prompts, n, stops, Sampling(14, 0.7), noise)
    assert len(fake.built) == 1 and fake.built[0]["logprobs_mode"] == "processed_logprobs"
    assert fake.built[0]["enforce_eager"] and fake.forgotten == 2
    assert fake.loaded[1].keys() == model.state_dict().keys()
    assert torch.equal(fake.loaded[1]["lm_head.weight"], model.lm_head.weight)
    asked, settings = fake.asked[n]
    assert asked == {"prompt_token_ids": prompts[1].tolist()}
    assert (settings.temperature, settings.top_p, settings.top_k) == (0.7, 1.0, 0)
    assert len({settings.seed for _, settings in fake.asked}) == len(prompts) * n
    first = answers[0][0]
    assert first.finished and first.input_ids.tolist()[1:] == [3] and first.logps.tolist() == [-0.5, -0.5]


def test_vllm_that_is_not_installed_is_said_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    model, (prompts, n, stops, noise) = llama(), task()
    with pytest.raises(ImportError, match="pip install vllm"):
        VLLM()(model, prompts, n, stops, Sampling(14), noise)


def test_scoring_by_tokens_gives_the_same_numbers():
    model, (prompts, n, stops, noise) = llama(), task()
    answers = Decode()(model, prompts, n, stops, Sampling(14), noise)
    examples, cpu = as_examples(prompts, answers), torch.device("cpu")
    whole = answer_logps(model, list(micro_batches(examples, 10**6, cpu)), 1.0)
    for budget in (1, 60, 120):
        parts = list(micro_batches(examples, budget, cpu))
        assert all(part.num_tokens <= budget or part.num_examples == 1 for part in parts)
        for a, b in zip(answer_logps(model, parts, 1.0), whole, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=5e-6)
    assert list(micro_batches([], 5, cpu)) == []
