"""`data check` and `data preview` take what `fit` takes, build nothing but the data, and end with a telling status."""

from __future__ import annotations

import html
import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from lit_align.cli.data import USAGE, device_count

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "configs"
STAGES = ("pt", "sft", "rm", "dpo", "ppo")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def lines(tmp_path):
    """Writes records as JSON lines."""

    def write(name, *records):
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return path

    return write


def talk(question, answer="yes"):
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


@pytest.fixture
def sft(tmp_path):
    """A configuration of SFT whose model is not there: only its tokenizer is."""
    content = {
        "model": {
            "class_path": "LitSFT",
            "init_args": {
                "policy": {"path": "no/such/model", "tokenizer": str(REPOSITORY / "datamodules/demo/tokenizer")},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0e-3}},
            },
        },
        "data": {"class_path": "SFTDataModule", "init_args": {"batch_size": 4, "max_length": 64}},
        "trainer": {"max_steps": 3, "accelerator": "cpu", "devices": 2, "accumulate_grad_batches": 2},
    }
    path = tmp_path / "sft.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


@pytest.mark.parametrize("stage", STAGES)
def test_the_shipped_configurations_have_no_fault_and_a_preview(cli, monkeypatch, tmp_path, stage):
    monkeypatch.chdir(REPOSITORY)
    args = ("--config", CONFIGS / f"{stage}.yaml", f"--trainer.default_root_dir={tmp_path / 'runs'}")
    status, out, _ = cli("data", "check", *args)
    assert status == 0 and out.rstrip().endswith("no faults")
    status, out, _ = cli("data", "preview", *args, "-n", 2)
    assert status == 0 and "example 2:" in out and "example 3:" not in out
    assert not (tmp_path / "runs").exists()


def test_faults_give_1_and_are_printed_and_neither_model_nor_run_folder_is_made(cli, sft, lines, tmp_path):
    path = lines("a.jsonl", talk("a"), talk(""), {"x": 1}, talk("q" * 300))
    status, out, err = cli("data", "check", "--config", sft, f"--data.train={path}")
    assert status == 1 and "Traceback" not in err
    assert f"  {path}:2: conversations[0].value  (train)" in out and f"  {path}:3  (train)" in out
    assert "faults: 3 (1 empty field, 1 missing field, 1 overlong)" in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "cache", "sft.yaml"]


def test_the_limit_is_that_of_the_command_line(cli, sft, lines):
    path = lines("a.jsonl", *[talk("")] * 30)
    for options, shown in (((), 20), (("--limit", "3"), 3), (("--limit=0",), 0)):
        _, out, _ = cli("data", "check", "--config", sft, f"--data.train={path}", *options)
        assert out.count("    found:") == shown and "faults: 30 (30 empty field)" in out


def test_overlays_and_options_override_as_in_fit(cli, sft, lines, tmp_path):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("data: {init_args: {max_length: 512}}\ntrainer: {accumulate_grad_batches: 3}\n")
    path = lines("a.jsonl", *[talk(f"{i}" * 70) for i in range(9)])
    assert cli("data", "check", "--config", sft, f"--data.train={path}")[0] == 1
    status, out, _ = cli("data", "check", "--config", sft, "--config", overlay, f"--data.train={path}")
    assert status == 0 and "3 steps of up to 4 examples, in 6 micro-batches, over all ranks" in out
    status, out, _ = cli("data", "check", "--config", sft, f"--data.train={path}", "--data.overlong=drop")
    assert status == 1 and "problem: the train data holds no record that can be used" in out


@pytest.mark.parametrize(
    "args, told",
    [
        (("--data.trian=x",), "did you mean 'train'?"),
        (("--data.train=no.jsonl",), "there is no such file"),
        ((), "no data; give data.train"),
        (("--data.train=x", "--limit", "many"), "--limit: invalid int value: 'many'"),
        (("--config", "no.yaml"), "no file no.yaml"),
        (("--data.batch_size=0",), "batch_size: expected at least 1, got 0"),
    ],
)
def test_a_wrong_configuration_gives_2(cli, sft, args, told):
    status, out, err = cli("data", "check", "--config", sft, *args)
    assert status == 2 and told in err and "Traceback" not in err and not out


def test_the_action_has_to_be_one_of_two(cli):
    for args, code in ((("data",), 2), (("data", "chek"), 2), (("data", "--help"), 0), (("data", "check", "-h"), 0)):
        status, out, err = cli(*args)
        assert status == code and USAGE in (out if code == 0 else err)


def test_without_a_model_the_tokenizer_may_be_given(cli, lines):
    args = ("--data", "SFTDataModule", f"--data.train={lines('a.jsonl', talk('a'))}")
    status, _, err = cli("data", "check", *args)
    assert status == 2 and "no tokenizer; give data.tokenizer" in err
    assert cli("data", "check", *args, f"--data.tokenizer={REPOSITORY / 'datamodules/demo/tokenizer'}")[0] == 0


def test_a_data_module_without_the_methods_is_told(cli, config):
    for action in ("check", "preview"):
        status, _, err = cli("data", action, "--config", config())
        assert status == 2 and f"ToyData has no method {action}, which `data {action}` calls" in err


def test_a_preview_marks_trained_text_by_signs_or_by_colour(cli, sft, lines, monkeypatch):
    path = lines("a.jsonl", talk("Why so?", "Because."))
    args = ("data", "preview", "--config", sft, f"--data.train={path}")
    status, out, _ = cli(*args)
    assert status == 0 and "\x1b" not in out and re.findall("⟦(.*?)⟧", out)[1] == "Because.<|im_end|>"
    assert "in one packed row" in out and "micro-batch 1 of 4" in out
    monkeypatch.setattr("lit_align.cli.data._is_terminal", lambda: True)
    assert "\x1b[1;32mBecause.<|im_end|>\x1b[0m" in cli(*args)[1]


def test_a_preview_goes_to_a_page(cli, sft, lines, tmp_path):
    path = lines("a.jsonl", talk("<script>alert(1)</script>", "no"))
    page = tmp_path / "pages" / "p.html"
    status, out, _ = cli("data", "preview", "--config", sft, f"--data.train={path}", "--out", page, "-n1")
    assert status == 0 and out == f"wrote {page}\n"
    content = page.read_text(encoding="utf-8")
    assert content.startswith("<!DOCTYPE html>") and "<script" not in content
    assert "<script>alert(1)</script>" in html.unescape(re.sub("<[^>]+>", "", content))


def test_a_preview_of_faulty_data_stops_as_a_run_would(cli, sft, lines):
    path = lines("a.jsonl", talk("a"), talk(""))
    status, out, err = cli("data", "preview", "--config", sft, f"--data.train={path}")
    assert status == 1 and f"{path}:2: conversations[0].value" in err and not out
    for options, told in ((("--split", "test"), "no test data"), (("--split", "x"), "--split"), (("-n", "0"), "n: ")):
        status, _, err = cli(
            "data", "preview", "--config", sft, f"--data.train={lines('b.jsonl', talk('a'))}", *options
        )
        assert status == 2 and told in err


@pytest.mark.parametrize(
    "devices, accelerator, count",
    [(3, "cpu", 3), ("2", "gpu", 2), ([0, 3], "gpu", 2), ("0,1,2", "gpu", 3), ("auto", "cpu", 1), (-1, "cpu", 1)],
)
def test_ranks_are_counted_as_the_trainer_would(devices, accelerator, count):
    assert device_count(devices, accelerator) == count


@pytest.mark.parametrize("devices", [0, "0", [], -2, "two"])
def test_no_devices_are_refused_as_the_trainer_would(devices):
    with pytest.raises(ValueError, match=r"trainer\.devices: expected at least 1, -1 or auto, got"):
        device_count(devices, "cpu")


def test_all_devices_of_the_machine_are_at_least_one(monkeypatch):
    for here, count in ((0, 1), (4, 4)):
        monkeypatch.setattr("torch.cuda.device_count", lambda here=here: here)
        assert device_count("auto", "auto") == count and device_count("auto", "cpu") == 1


def test_fit_keeps_what_became_of_the_records_in_the_run_folder(cli, sft, lines, tiny_model):
    train = lines("a.jsonl", *[talk(f"q{i}") for i in range(5)], talk(""), talk("q" * 300))
    args = ("--config", sft, f"--data.train={train}", "--data.on_error=skip", "--data.overlong=drop")
    model = (f"--model.policy.path={tiny_model}", f"--model.policy.tokenizer={tiny_model}", "--trainer.devices=1")
    quick = ("--trainer.max_steps=1", "--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false")
    status, _, err = cli("fit", *args, *model, *quick, "--run_dir=r")
    assert status == 0, err
    report = json.loads(Path("r/data.json").read_text(encoding="utf-8"))["splits"]["train"]
    assert (report["records"], report["examples"]) == (7, 5)
    assert report["skipped"] == {"empty field": 1} and report["dropped"] == {"overlong": 1}
    assert report["faults"][0].startswith(f"{train}:6: conversations[0].value")


def test_a_data_module_without_a_report_leaves_none(cli, config):
    assert cli("fit", "--config", config(), "--run_dir=r")[0] == 0
    assert not Path("r/data.json").exists()


def test_output_that_a_terminal_cannot_write_is_escaped(cli, sft, lines, monkeypatch):
    path = lines("a.jsonl", talk("发烧?", "水"))
    written = []

    class Ascii:
        encoding = "ascii"

        def write(self, text):
            written.append(text.encode("ascii"))

        def isatty(self):
            return False

        def flush(self):
            pass

    monkeypatch.setattr(sys, "stdout", Ascii())
    from lit_align.__main__ import main

    assert main(["data", "preview", "--config", str(sft), f"--data.train={path}"]) == 0
    assert b"\\u6c34" in b"".join(written)
