"""The overlay `configs/trainer/fsdp_cpu2.yaml` on a stage: two processes, resumed by the same command, exported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from lit_align.__main__ import main
from lit_align.models.fingerprint import fingerprint

REPOSITORY = Path(__file__).resolve().parents[2]
OPTIONS = (
    "--checkpoint_every=1",
    "--resume=true",
    "--data.batch_size=4",
    "--data.validation=null",
    "--trainer.limit_val_batches=0",
    "--trainer.callbacks.max_prompts=3",
    "--trainer.callbacks.max_new_tokens=3",
    "--trainer.enable_progress_bar=false",
)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_overlay_trains_resumes_and_exports(tmp_path):
    run = tmp_path / "run"

    def fit(steps):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "LIT_ALIGN_CACHE": str(tmp_path / "cache")}
        configs = [f"--config=configs/{name}.yaml" for name in ("dpo", "trainer/fsdp_cpu2")]
        command = [sys.executable, "-m", "lit_align", "fit", *configs, f"--run_dir={run}", *OPTIONS]
        done = subprocess.run(
            [*command, f"--trainer.max_steps={steps}"],
            cwd=REPOSITORY,
            env=environment | {"PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads((run / "results.json").read_text())["steps"] == steps

    fit(1)
    fit(2)  # goes on
    checkpoints = sorted(path.name for path in (run / "checkpoints").iterdir() if not path.is_symlink())
    assert checkpoints == ["step000001.ckpt", "step000002.ckpt"]
    assert len((run / "samples.jsonl").read_text().splitlines()) == 2 * 3
    assert main(["export", "--checkpoint", str(run), "--out", str(tmp_path / "out")]) == 0
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (run / "hf", tmp_path / "out")]
    assert fingerprint(models[0]) == fingerprint(models[1])


@pytest.mark.parametrize("name", ["fsdp", "fsdp_cpu_offload", "lightning.pytorch.strategies.FSDPStrategy"])
def test_fsdp_of_the_first_generation_is_refused_with_what_to_use(name, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    assert main(["fit", "--config", "configs/dpo.yaml", f"--trainer.strategy={name}"]) == 2
    assert "configs/trainer/fsdp.yaml" in capsys.readouterr().err
