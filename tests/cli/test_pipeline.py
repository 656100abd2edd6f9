import json
import sys
from pathlib import Path

import pytest

import lit_align.pipeline as module
from lit_align.pipeline import Achieved, Step, last_value, markdown, pipeline

REPOSITORY = Path(__file__).resolve().parents[2]

# What stands in for `python -m lit_align fit` in these tests: writes what a run writes, and says how it was called.
FAKE = """
import json, pathlib, sys
options = dict(arg[2:].split("=", 1) for arg in sys.argv[1:] if "=" in arg)
folder = pathlib.Path(options["run_dir"])
folder.mkdir(parents=True, exist_ok=True)
if options.get("fail") == "true":
    print("line one"); print("the reason"); sys.exit(3)
(folder / "called.json").write_text(json.dumps(sys.argv[1:]))
metrics = {"val/loss": 1.5, "val/judged_right": float(options.get("right", 0.25))}
(folder / "results.json").write_text(json.dumps({"metrics": metrics}))
"""


@pytest.fixture
def fake(monkeypatch, tmp_path):
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    for name in ("a.yaml", "b.yaml", "c.yaml"):
        (tmp_path / name).write_text("{}")
    command = Step.command

    def faked(self, run_dir, seed):
        given = command(self, run_dir, seed)
        assert given[1:4] == ["-m", "lit_align", "fit"]
        return [sys.executable, str(script), *given[4:]]

    monkeypatch.setattr(Step, "command", faked)


TABLE = {"right": "val/judged_right", "loss": ["train/nothing", "val/loss"], "kl": "val/kl_to_reference"}


def test_each_stage_starts_from_the_export_of_the_one_it_names(fake):
    steps = [
        Step("one", "a.yaml"),
        Step("two", ["b.yaml", "c.yaml"], {"model.policy.path": "one"}, {"trainer.max_epochs": 2, "x": [1, None]}),
    ]
    pipeline(steps, TABLE, seed=7, run_dir=Path("run"))
    called = json.loads(Path("run/two/called.json").read_text())
    assert called[:4] == ["--config", "b.yaml", "--config", "c.yaml"]
    assert called[4:6] == list(module.QUIET)
    assert set(called[6:]) == {
        "--trainer.max_epochs=2",
        "--x=[1, null]",
        "--model.policy.path=run/one/hf",
        "--seed_everything=7",
        "--run_dir=run/two",
    }


def test_it_ends_with_one_table_and_the_same_numbers_as_json(fake, capsys):
    pipeline([Step("one", "a.yaml"), Step("two", "b.yaml", overrides={"right": 0.75})], TABLE, run_dir=Path("run"))
    text = Path("run/pipeline.md").read_text()
    assert text in capsys.readouterr().out
    assert [row.split("|")[2].strip() for row in text.splitlines()] == ["right", "-" * 7, "0.250", "0.750"]
    record = json.loads(Path("run/pipeline.json").read_text())
    assert [stage["values"] for stage in record["stages"]] == [
        {"right": 0.25, "loss": 1.5, "kl": None},
        {"right": 0.75, "loss": 1.5, "kl": None},
    ]


def test_a_stage_that_fails_stops_the_pipeline_with_the_end_of_its_log(fake):
    steps = [Step("one", "a.yaml", overrides={"fail": True}), Step("two", "b.yaml")]
    with pytest.raises(ValueError, match=r"stage one failed with exit status 3.*\nline one\nthe reason"):
        pipeline(steps, TABLE, run_dir=Path("run"))
    assert not Path("run/two").exists() and not Path("run/pipeline.json").exists()


@pytest.mark.parametrize(
    "steps, message",
    [
        ([], "at least one stage"),
        ([Step("one", "a.yaml"), Step("one", "a.yaml")], "two are named 'one'"),
        ([Step("one", "a.yaml", {"model.policy.path": "two"})], "names 'two'; stages before it: none"),
        ([Step("one", "missing.yaml")], "there is no file missing.yaml"),
    ],
)
def test_a_pipeline_that_cannot_be_is_refused_before_anything_runs(fake, steps, message):
    with pytest.raises(ValueError, match=message):
        pipeline(steps, TABLE, run_dir=Path("run"))
    assert not Path("run").exists()


def test_results_are_never_mixed_with_those_of_an_earlier_pipeline(fake):
    pipeline([Step("one", "a.yaml")], TABLE, run_dir=Path("run"))
    with pytest.raises(ValueError, match="run is not empty"):
        pipeline([Step("one", "a.yaml")], TABLE, run_dir=Path("run"))


def test_the_command_reads_the_pipeline_from_yaml(fake, cli):
    Path("p.yaml").write_text(
        "stages:\n  - {name: one, config: a.yaml}\n"
        "  - name: two\n    config: b.yaml\n    start: {model.policy.path: one}\n"
        "    overrides: {trainer.max_steps: 3, right: 0.5}\n"
        "table: {right: val/judged_right}\n"
    )
    status, out, err = cli("pipeline", "--config", "p.yaml", "--seed", "3", "--run_dir", "run")
    assert (status, err) == (0, "")
    assert "0.500" in out
    assert "--trainer.max_steps=3" in json.loads(Path("run/two/called.json").read_text())


@pytest.mark.parametrize(
    "text, expected",
    [
        (
            "stages:\n  - {name: one, confg: a.yaml}\ntable: {}\n",
            ["bad.yaml:2, stages.confg", "did you mean 'config'?"],
        ),
        ("stagess: []\ntable: {}\n", ["bad.yaml:1, stagess", "did you mean 'stages'?"]),
        ("stages: []\ntable: {}\nseed: x\n", ["bad.yaml:3, seed", "expected int, got x"]),
    ],
)
def test_a_wrong_key_of_a_pipeline_is_named_with_file_and_line(cli, text, expected):
    Path("bad.yaml").write_text(text)
    status, _, err = cli("pipeline", "--config", "bad.yaml")
    assert status == 2
    assert [part for part in expected if part not in err] == []
    assert len(err.splitlines()) <= 4


def test_the_newest_value_of_a_metric_is_read_from_the_log(tmp_path):
    path = tmp_path / "metrics.csv"
    assert last_value(path, "train/loss") == ""
    path.write_text("step,train/loss,val/loss\n9,2.5,\n19,1.25,\n19,,3.0\n")
    assert last_value(path, "train/loss") == "step 20, train/loss 1.25"
    assert last_value(path, "reward") == ""


def test_the_table_is_aligned():
    rows = [Achieved("pt", 61.4, {"loss": 1.0}), Achieved("sft", 5.0, {"loss": None})]
    assert markdown(rows, ["loss"]).splitlines() == [
        "| stage | loss  | seconds |",
        "|-------|-------|---------|",
        "| pt    | 1.000 | 61      |",
        "| sft   |       | 5       |",
    ]


def test_the_shipped_pipeline_is_one_that_can_be(monkeypatch, cli, tmp_path):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(module, "_run", lambda step, *rest: Achieved(step.name, 0.0, {}))
    monkeypatch.setattr(module.runs, "choose_run_dir", lambda root, name: tmp_path)
    status, out, err = cli("pipeline", "--config", "configs/pipeline.yaml")
    assert (status, err) == (0, "")
    assert "pt -> sft -> rm -> dpo -> ppo" in out
