import csv
import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lit_align.batch import PromptBatch
from lit_align.callbacks import JudgeAnswers
from lit_align.rollout.sampling import Answer

RIGHT, KL = "val/judged_right", "val/kl_to_reference"


class Prompts(LightningDataModule):
    """Questions 0 to 6 in batches of 3."""

    def predict_dataloader(self):
        for start in range(0, 7, 3):
            numbers = range(start, min(start + 3, 7))
            ids = tuple(torch.tensor([n, n]) for n in numbers)
            yield PromptBatch(ids, tuple({"number": n} for n in numbers), torch.tensor(list(numbers)))


class Tokenizer:
    def decode(self, ids, skip_special_tokens=False):
        return f"{'answer' if skip_special_tokens else 'question'} {int(ids[0])}"


class Policy(LightningModule):
    tokenizer = Tokenizer()
    cut_off = None

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.samplings, self.drawn = [], []

    def answer(self, prompt_ids, sampling):
        torch.rand(5)
        self.samplings.append(sampling)
        return [Answer(ids, int(ids[0]) != self.cut_off, torch.zeros(len(ids))) for ids in prompt_ids]

    def training_step(self, batch, batch_idx):
        self.drawn.append(float(torch.rand(())))
        return self.weight.square()

    def validation_step(self, batch, batch_idx):
        return None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ReferencedPolicy(Policy):
    def kl_to_reference(self, batch, sampling):
        assert sampling.temperature == 1.0
        return [0.5] * len(batch)


def is_even(record, answer):
    assert answer == f"answer {record['number']}"
    return record["number"] % 2 == 0


def loader():
    return DataLoader([0.0, 1.0], batch_size=1, generator=torch.Generator())


def fit(folder, callback=None, policy=None, **settings):
    torch.manual_seed(0)
    policy = policy or Policy()
    trainer = Trainer(
        default_root_dir=str(folder),
        accelerator="cpu",
        callbacks=[callback] if callback else [],
        logger=CSVLogger(folder, name="", version=""),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 2, "log_every_n_steps": 1, **settings},
    )
    trainer.fit(policy, loader(), loader())
    return policy, trainer


def samples(folder):
    return [json.loads(line) for line in Path(folder, "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def test_at_the_end_every_prompt_is_answered_judged_and_written_down(tmp_path):
    callback = JudgeAnswers(Prompts(), is_even)
    fit(tmp_path, callback)
    assert callback.results == {RIGHT: pytest.approx(4 / 7)}
    rows = samples(tmp_path)
    assert [row["right"] for row in rows] == [True, False] * 3 + [True]
    told = {"step": 4, "index": 4, "prompt": "question 4", "answer": "answer 4", "finished": True, "right": True}
    assert rows[4] == {**told, "kl": None}
    logged = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert float(logged[-1][RIGHT]) == pytest.approx(4 / 7)


def test_an_answer_that_was_cut_off_is_wrong(tmp_path):
    callback, policy = JudgeAnswers(Prompts(), is_even), Policy()
    policy.cut_off = 2
    fit(tmp_path, callback, policy)
    assert callback.results == {RIGHT: pytest.approx(3 / 7)}
    assert [row["index"] for row in samples(tmp_path) if not row["finished"]] == [2]


def test_only_the_first_prompts_are_answered_when_a_limit_is_set(tmp_path):
    callback = JudgeAnswers(Prompts(), is_even, max_prompts=5)
    fit(tmp_path, callback)
    assert [row["index"] for row in samples(tmp_path)] == [0, 1, 2, 3, 4]
    assert callback.results == {RIGHT: 0.6}


def test_after_every_so_many_validations_it_is_a_metric_that_can_be_monitored(tmp_path):
    callback = JudgeAnswers(Prompts(), is_even, every=2)
    policy, trainer = fit(tmp_path, callback, max_epochs=4)
    assert sorted({row["step"] for row in samples(tmp_path)}) == [4, 8]
    assert float(trainer.callback_metrics[RIGHT]) == pytest.approx(4 / 7)
    assert len(policy.samplings) == 6, "the end of training does not repeat what the last validation did"


def test_training_draws_the_same_random_numbers_with_and_without_it(tmp_path):
    without, _ = fit(tmp_path / "a")
    with_it, _ = fit(tmp_path / "b", JudgeAnswers(Prompts(), is_even, every=1))
    assert with_it.drawn == without.drawn


def test_without_a_judge_answers_are_only_written_down(tmp_path):
    callback = JudgeAnswers(Prompts(), max_new_tokens=9, temperature=0.7)
    policy, _ = fit(tmp_path, callback)
    assert callback.results == {}
    assert {row["right"] for row in samples(tmp_path)} == {None}
    assert {(s.max_new_tokens, s.temperature) for s in policy.samplings} == {(9, 0.7)}


def test_a_stage_that_offers_it_has_its_kl_to_the_reference_logged(tmp_path):
    callback = JudgeAnswers(Prompts(), is_even)
    fit(tmp_path, callback, ReferencedPolicy())
    assert callback.results[KL] == 0.5


def test_the_validate_command_answers_too(tmp_path):
    callback = JudgeAnswers(Prompts(), is_even)
    policy = Policy()
    trainer = Trainer(
        default_root_dir=str(tmp_path), accelerator="cpu", callbacks=[callback], logger=False, enable_progress_bar=False
    )
    trainer.validate(policy, loader(), verbose=False)
    assert float(trainer.callback_metrics[RIGHT]) == pytest.approx(4 / 7)


def test_fast_dev_run_writes_nothing(tmp_path):
    fit(tmp_path, JudgeAnswers(Prompts(), is_even, every=1), fast_dev_run=True)
    assert not (tmp_path / "samples.jsonl").exists()
