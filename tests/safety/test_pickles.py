"""Nothing pickled is executed, wherever it was planted, and each time the error says what is wrong."""

import functools
import http.server
import pickle
import shutil
import threading

import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from datamodules import SFTDataModule
from lit_align.checkpoint_io import WholeCheckpointIO
from lit_align.models.load import load_causal_lm, load_scalar_model
from lit_align.models.reference_cache import DamagedError, read_logps
from lit_align.models.source import ModelSource

REFUSED = "neither a tensor nor a plain value"


def test_the_trap_closes(trap, mark, tmp_path):
    torch.save({"extra": trap}, tmp_path / "a.ckpt")
    torch.load(tmp_path / "a.ckpt")
    assert mark.is_dir()
    mark.rmdir()
    pickle.loads(pickle.dumps(trap))
    assert mark.is_dir()
    mark.rmdir()


# -- checkpoints


@pytest.fixture
def trained(sft_config, tmp_path, cli):
    """Arguments of a run of one step, whose newest checkpoint is then poisoned, and that checkpoint."""
    config = sft_config(max_steps=1)
    assert cli("fit", "--config", config, "--run_dir", tmp_path / "run")[0] == 0
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step*.ckpt")
    return config, checkpoint


def poisoned(checkpoint, trap):
    torch.save({**torch.load(checkpoint, weights_only=True), "extra": trap}, checkpoint)


def test_no_command_executes_a_checkpoint(trained, trap, cli, talks, tmp_path):
    config, checkpoint = trained
    poisoned(checkpoint, trap)
    (tmp_path / "run" / "results.json").unlink()
    options = [f"--data.{split}={talks}" for split in ("validation", "test", "predict")]
    for args in (
        ("fit", "--config", config, "--ckpt_path", checkpoint, "--trainer.max_steps=2"),
        ("fit", "--config", config, "--run_dir", tmp_path / "run", "--resume", "true", "--trainer.max_steps=2"),
        ("fit", "--config", config, "--run_dir", tmp_path / "run", "--ckpt_path", "last", "--trainer.max_steps=2"),
        ("validate", "--config", config, "--ckpt_path", checkpoint, *options),
        ("test", "--config", config, "--ckpt_path", checkpoint, *options),
        ("predict", "--config", config, "--ckpt_path", checkpoint, *options),
        ("export", "--checkpoint", checkpoint, "--out", tmp_path / "out"),
        ("export", "--checkpoint", tmp_path / "run", "--out", tmp_path / "out"),
    ):
        status, told = cli(*args)
        assert status != 0 and REFUSED in told and "posix.mkdir" in told and "Traceback" not in told, (args, told)
    assert not (tmp_path / "out").exists()


def test_a_bare_pickle_is_no_checkpoint(trained, trap, cli, tmp_path):
    config, checkpoint = trained
    checkpoint.write_bytes(pickle.dumps(trap))
    for args in (
        ("fit", "--config", config, "--ckpt_path", checkpoint),
        ("export", "--checkpoint", checkpoint, "--out", tmp_path / "out"),
    ):
        status, told = cli(*args)
        assert status != 0 and "is no checkpoint, or was cut" in told


@pytest.fixture
def address(tmp_path):
    """Where tmp_path is served."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_checkpoint_that_is_fetched_is_not_executed(trap, mark, address, tmp_path):
    torch.save({"extra": trap}, tmp_path / "a.ckpt")
    TorchCheckpointIO().load_checkpoint(f"{address}/a.ckpt")
    assert mark.is_dir(), "Lightning no longer executes what it fetches: WholeCheckpointIO need not see to it"
    mark.rmdir()
    with pytest.raises(ValueError, match=REFUSED):
        WholeCheckpointIO().load_checkpoint(f"{address}/a.ckpt")
    assert not mark.exists()


# -- models


@pytest.mark.parametrize("bare", [False, True], ids=["torch", "pickle"])
@pytest.mark.parametrize("load", [load_causal_lm, load_scalar_model])
def test_pickled_weights_are_not_executed(load, bare, trap, tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    state = {**load_causal_lm(ModelSource(path=str(tiny_model))).state_dict(), "extra": trap}
    (folder / "model.safetensors").unlink()
    if bare:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(trap))
    else:
        torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"model: .*{REFUSED}"):
        load(ModelSource(path=str(folder)))


@pytest.mark.parametrize("bare", [False, True], ids=["torch", "pickle"])
def test_a_pickled_adapter_is_not_executed(bare, trap, tiny_model, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    settings = f'{{"peft_type": "LORA", "base_model_name_or_path": "{tiny_model}", "target_modules": ["q_proj"]}}'
    (folder / "adapter_config.json").write_text(settings)
    if bare:
        (folder / "adapter_model.bin").write_bytes(pickle.dumps(trap))
    else:
        torch.save({"extra": trap}, folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=f"adapter: .*{REFUSED}"):
        load_causal_lm(ModelSource(path=str(folder), tokenizer=str(tiny_model)))


# -- data


def read(tiny_model, source):
    data = SFTDataModule(train=source, tokenizer=str(tiny_model), batch_size=2)
    data.prepare_data()
    data.setup("fit")
    return data


@pytest.mark.parametrize("name", ["a.pkl", "a.pt", "a.jsonl", "a.json", "a.parquet", "a.txt"])
def test_pickled_data_is_not_executed(name, trap, tiny_model, tmp_path):
    for content in (pickle.dumps(trap), pickle.dumps(trap, protocol=0)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            read(tiny_model, str(tmp_path / name))


def test_pickled_tables_are_not_executed(trap, tiny_model, tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(trap))
    with pytest.raises(ValueError, match="it reads pickles, which execute what they say"):
        read(tiny_model, {"path": "pandas", "data_files": str(tmp_path / "a.pkl")})
    with pytest.raises(ValueError):
        read(tiny_model, {"path": str(tmp_path), "data_files": "a.pkl"})


def test_no_file_of_the_tokenised_cache_is_executed(trap, tiny_model, talks, tmp_path):
    read(tiny_model, str(talks))
    files = [path for path in (tmp_path / "cache" / "data").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".arrow"}
    for path in files:
        content = path.read_bytes()
        path.write_bytes(pickle.dumps(trap))
        with pytest.raises(ValueError, match=r"(?s)this cache entry is damaged .*; delete it"):
            read(tiny_model, str(talks))
        path.write_bytes(content)
    read(tiny_model, str(talks))


def test_no_reference_cache_is_executed(trap, tmp_path):
    path = tmp_path / "abc.safetensors"
    for write in (lambda: path.write_bytes(pickle.dumps(trap)), lambda: torch.save({"logps": trap}, path)):
        write()
        with pytest.raises(DamagedError, match="it cannot be read"):
            read_logps(path, 1)
