"""A sharded checkpoint, which is a folder with pickles in three kinds of files, is read without executing anything."""

import os
import pickle
import pickletools
import random
import shutil

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata, MetadataIndex
from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

from lit_align.checkpoint_io import WholeCheckpointIO, WholeFolder
from lit_align.models.checkpoint import read_checkpoint
from lit_align.sharded_checkpoint import read_optimizer, read_weights, read_whole, write_shards
from lit_align.sharded_metadata import read_list

NAMED = r"\.metadata: it holds a pickled posix\.mkdir, which describes no tensor"
DAMAGED = r"\.metadata: it is no list of a sharded checkpoint's tensors, or it is damaged"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A sharded checkpoint as one process writes it: weights and an optimizer's moments."""
    whole = WholeFolder(tmp_path_factory.mktemp("written") / "step000001.ckpt")
    whole.begin()
    moments = {"step": torch.tensor(1.0), "exp_avg": torch.ones(2, 3)}
    state = {"state": {0: moments}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    weights = {"policy.a": torch.rand(2, 3), "policy.b": torch.rand(4).bfloat16(), "policy.c": torch.ones(0)}
    content = {"state_dict": weights, "optimizer_states": [state], "lit_align": {"roles": {}}}
    whole.finish(write_shards(whole.part, content, [["policy.a"]]))
    return whole.path


@pytest.fixture
def folder(written, tmp_path):
    """A copy of it."""
    return shutil.copytree(written, tmp_path / written.name)


def planted(folder, change):
    """Writes the list of contents anew after a change, with torch's own classes."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(change(metadata) or metadata))


def before(trap):
    """Executes, and leaves everything as it is for an honest pickle to follow."""
    return pickletools.optimize(pickle.dumps(trap, protocol=2))[:-1] + pickle.POP


def readers(folder):
    """All ways in which this library reads a folder."""
    return {
        "read_list": lambda: read_list(folder),
        "read_whole": lambda: read_whole(folder),
        "read_checkpoint": lambda: read_checkpoint(folder),
        "plugin": lambda: WholeCheckpointIO().load_checkpoint(folder),
        "plugin, careless": lambda: WholeCheckpointIO().load_checkpoint(folder, weights_only=False),
        "read_weights": lambda: read_weights(folder, {"policy.a": torch.zeros(2, 3)}),
        "read_optimizer": lambda: read_optimizer(
            folder,
            {"rest": {}, "param_groups": [{"params": ["policy.a"]}]},
            0,
            {"policy.a": torch.nn.Parameter(torch.zeros(2, 3))},
        ),
    }


NAMES = list(readers(None))


@pytest.mark.parametrize("name", NAMES)
def test_an_honest_folder_is_read(name, folder):
    assert readers(folder)[name]() is not None


def test_the_list_is_what_torch_reads(folder):
    ours, torchs = read_list(folder), dcp.FileSystemReader(folder).read_metadata()
    assert ours.state_dict_metadata == torchs.state_dict_metadata and len(ours.state_dict_metadata) == 5
    assert ours.storage_data == torchs.storage_data and ours.version == torchs.version


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", ["instead", "in front", "field", "key", "size", "protocol 0"])
def test_the_list_of_contents_is_not_executed(place, name, folder, trap):
    def field(metadata):
        metadata.planner_data = trap

    def key(metadata):
        metadata.storage_data[trap] = 1

    def size(metadata):
        metadata.state_dict_metadata["state_dict.policy.a"].size = trap

    path = folder / ".metadata"
    if place == "instead":
        path.write_bytes(pickle.dumps(trap))
    elif place == "protocol 0":
        path.write_bytes(pickle.dumps(trap, protocol=0))
    elif place == "in front":  # executed, dropped from the stack, and then an honest list
        path.write_bytes(before(trap) + path.read_bytes())
    else:
        planted(folder, {"field": field, "key": key, "size": size}[place])
    with pytest.raises(ValueError, match=NAMED):
        readers(folder)[name]()


def test_the_traps_close(folder, trap, mark):
    path = folder / ".metadata"
    honest = path.read_bytes()
    path.write_bytes(before(trap) + honest)
    assert dcp.FileSystemReader(folder).read_metadata() is not None, "and torch sees nothing wrong"
    assert mark.is_dir()
    mark.rmdir()
    path.write_bytes(honest)
    as_bytes(folder, trap)
    dcp.load({"state_dict.policy.a": torch.zeros(2, 3)}, checkpoint_id=folder, no_dist=True)
    assert mark.is_dir()
    mark.rmdir()


def as_bytes(folder, trap):
    """Says that a weight is no tensor but an object, which torch then unpickles without a guard."""
    shard = folder / "evil.distcp"
    torch.save(trap, shard)

    def change(metadata):
        metadata.state_dict_metadata["state_dict.policy.a"] = BytesStorageMetadata()
        place = next(iter(metadata.storage_data.values()))
        place.relative_path, place.offset, place.length = shard.name, 0, shard.stat().st_size
        metadata.storage_data[MetadataIndex("state_dict.policy.a")] = place

    planted(folder, change)


@pytest.mark.parametrize("name", NAMES)
def test_a_shard_is_not_taken_for_an_object(name, folder, trap):
    as_bytes(folder, trap)
    with pytest.raises(ValueError, match=r"pickled torch\.distributed\.checkpoint\.metadata\.BytesStorageMetadata"):
        readers(folder)[name]()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "read_list"])
def test_shards_are_not_executed(name, folder, trap):
    shard = folder / "evil.distcp"
    torch.save(trap, shard)

    def change(metadata):
        for place in metadata.storage_data.values():
            place.relative_path, place.offset, place.length = shard.name, 0, shard.stat().st_size

    planted(folder, change)
    with pytest.raises(ValueError, match=r"(?s)step000001\.ckpt: rank 0 cannot read its shards, nothing was executed"):
        readers(folder)[name]()


@pytest.mark.parametrize("name", ["read_whole", "read_checkpoint", "plugin"])
def test_what_is_no_tensor_is_not_executed(name, folder, trap):
    torch.save({"extra": trap}, folder / "meta.pt")
    with pytest.raises((ValueError, pickle.UnpicklingError), match=r"posix\.mkdir"):
        readers(folder)[name]()


@pytest.mark.parametrize("other", ["../other.distcp", "/etc/passwd", ".."])
def test_a_shard_lies_in_its_folder(other, folder):
    def change(metadata):
        next(iter(metadata.storage_data.values())).relative_path = other

    planted(folder, change)
    with pytest.raises(ValueError, match=DAMAGED):
        read_whole(folder)


CHUNKS = {
    "all are absent": [],
    "a part is absent": [((0, 0), (1, 3))],
    "outside": [((1, 0), (2, 3))],
    "before the beginning": [((-1, 0), (2, 3))],
    "one twice": [((0, 0), (1, 3)), ((0, 0), (1, 3))],
}
"""Offsets and sizes that do not make up 2 rows of 3."""


@pytest.mark.parametrize("damage", CHUNKS)
def test_a_tensor_is_read_whole_or_not_at_all(damage, folder):
    def change(metadata):
        chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in CHUNKS[damage]]
        metadata.state_dict_metadata["state_dict.policy.a"].chunks = chunks

    planted(folder, change)
    with pytest.raises(ValueError, match=DAMAGED + r" \(chunks that do not make up a tensor of shape \(2, 3\)"):
        read_whole(folder)


def test_a_pickle_changes_no_class(folder):
    """The instruction that sets an object's state can set the attributes of a class; here they are not torch's."""
    evil = pickle.dumps(ChunkStorageMetadata)[:-1] + b"N}\x8c\x07pwned__K\x01s\x86b."
    pickle.loads(evil)
    assert ChunkStorageMetadata.pwned__ == 1, "this is what the pickle does"
    del ChunkStorageMetadata.pwned__
    (folder / ".metadata").write_bytes(evil)
    with pytest.raises(ValueError, match=DAMAGED):
        read_list(folder)
    assert not hasattr(ChunkStorageMetadata, "pwned__")


def test_damage_is_an_error_and_no_crash(folder):
    path = folder / ".metadata"
    content = path.read_bytes()
    draw = random.Random(0)
    for number in range(300):
        changed = bytearray(content)
        for _ in range(3):
            changed[draw.randrange(len(content))] = draw.randrange(256)
        path.write_bytes(changed[: draw.randrange(len(content))] if number % 2 else changed)
        try:
            read_list(folder)
        except ValueError as error:
            assert ".metadata" in str(error)


@pytest.mark.parametrize("name", ["read_weights", "read_optimizer"])
def test_ranks_read_their_shards_the_same_way(name, group, folder, trap):
    mesh = init_device_mesh("cpu", (1,))
    like = DTensor.from_local(torch.zeros(2, 3), mesh, [Replicate()])
    assert torch.equal(
        read_weights(folder, {"policy.a": like})["policy.a"].full_tensor(), read_whole(folder)["state_dict"]["policy.a"]
    )
    (folder / ".metadata").write_bytes(pickle.dumps(trap))
    with pytest.raises(ValueError, match=NAMED):
        readers(folder)[name]()


def test_no_command_executes_a_sharded_checkpoint(folder, trap, cli, sft_config, talks, tmp_path):
    config = sft_config(max_steps=2)
    (folder / ".metadata").write_bytes(pickle.dumps(trap))
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    resumed = folder.rename(run / "checkpoints" / folder.name)
    options = [f"--data.{split}={talks}" for split in ("validation", "test", "predict")]
    for args in (
        ("fit", "--config", config, "--ckpt_path", resumed),
        ("fit", "--config", config, "--ckpt_path", resumed, "--weights_only=false"),
        ("fit", "--config", config, "--ckpt_path", resumed, "--trainer.strategy=fsdp2", "--trainer.devices=1"),
        ("fit", "--config", config, "--run_dir", run, "--resume", "true"),
        ("validate", "--config", config, "--ckpt_path", resumed, *options),
        ("test", "--config", config, "--ckpt_path", resumed, *options),
        ("predict", "--config", config, "--ckpt_path", resumed, *options),
        ("export", "--checkpoint", resumed, "--out", tmp_path / "out"),
        ("export", "--checkpoint", run, "--out", tmp_path / "out"),
    ):
        status, told = cli(*args)
        assert status != 0 and "posix.mkdir" in told and str(resumed) in told and "Traceback" not in told, (args, told)
    assert not (tmp_path / "out").exists()


def test_the_option_that_executes_is_lightning_s_own(tmp_path, sft_config, cli, mark):
    """`weights_only=false`, said by the user, executes a checkpoint that is a file; under fsdp2 it does not."""

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(mark),)

    config = sft_config(max_steps=1)
    assert cli("fit", "--config", config, "--run_dir", tmp_path / "run")[0] == 0
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step*.ckpt")
    torch.save({**torch.load(checkpoint, weights_only=True), "extra": Trap()}, checkpoint)
    careless = ("fit", "--config", config, "--ckpt_path", checkpoint, "--weights_only=false", "--trainer.max_steps=2")
    status, told = cli(*careless, "--trainer.strategy=fsdp2", "--trainer.devices=1")
    assert status != 0 and "posix.mkdir" in told and not mark.exists()
    cli(*careless)
    assert mark.exists(), "docs/safety.md says that this option executes"
