"""What the README shows in code runs as it stands."""

import re
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_example_in_code(repository, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (repository / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    quiet = f"Trainer(accelerator='cpu', default_root_dir={str(tmp_path)!r}, enable_progress_bar=False, "
    assert code.count("Trainer(") == 1
    code = code.replace("Trainer(", quiet) + "print(trainer.global_step, trainer.logged_metrics['train/loss'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    steps, loss = done.stdout.split()[-2:]
    assert steps == "20" and 0 < float(loss.removeprefix("tensor(").removesuffix(")")) < 7
