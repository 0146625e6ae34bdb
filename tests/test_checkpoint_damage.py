"""A checkpoint folder is not trusted: damage is found and gone around, and nothing in it is run."""

import io
import os
import pickle
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from test_trainer import run_line
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from pipeline.train.checkpoints import Checkpoints, find_damage, list_checkpoints, read_into
from scripts import export_checkpoint
from utils.config import ConfigError
from utils.distributed import World


class Hostile:
    """Unpickled, it makes a folder."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DATA = "__0_0.distcp"
DAMAGE = {
    "truncated": (DATA, lambda file: file.write_bytes(file.read_bytes()[:-200])),
    "empty": (DATA, lambda file: file.write_bytes(b"")),
    "missing": (DATA, Path.unlink),
    "flipped": (DATA, flip_a_bit),
    "no index": (".metadata", Path.unlink),
    "flipped index": (".metadata", flip_a_bit),
    "no info": ("info.json", Path.unlink),
    "flipped info": ("info.json", flip_a_bit),
    "sums": ("SHA256SUMS", lambda file: file.write_bytes(b"\xff\xfe")),
}


def trained(folder: Path) -> list[Path]:
    run_line(folder, max_steps=4, save=True, checkpoint_every=1)
    return list_checkpoints(folder / "checkpoints")


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, caplog, kind):
    _, whole = run_line(tmp_path / "whole", max_steps=6)
    before, newest = trained(tmp_path / "cut")
    name, damage = DAMAGE[kind]
    damage(newest / name)
    trainer, resumed = run_line(tmp_path / "cut", max_steps=6, save=True, checkpoint_every=1)
    warned = "\n".join(record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert str(newest) in warned and name in warned and f"going back to {before}" in warned
    assert trainer.step == 6 and torch.equal(whole["weight"], resumed["weight"])
    left = sorted(path.name for path in newest.parent.iterdir())
    assert left == ["damaged-step-00000004", "step-00000005", "step-00000006"]


def test_no_whole_checkpoint_is_one_line_that_names_all(tmp_path):
    for checkpoint in trained(tmp_path):
        flip_a_bit(checkpoint / DATA)
    with pytest.raises(ConfigError, match=rf"step-00000004: {DATA} .* step-00000003: {DATA} .*delete") as raised:
        run_line(tmp_path, max_steps=6, save=True)
    assert "\n" not in str(raised.value)
    assert len(list_checkpoints(tmp_path / "checkpoints")) == 2  # left as they were


def test_checksums_are_those_of_sha256sum(tmp_path):
    checkpoint = trained(tmp_path)[-1]
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=checkpoint, check=True, capture_output=True)
    listed = {line.split("  ")[1] for line in (checkpoint / "SHA256SUMS").read_text().splitlines()}
    assert listed == {path.name for path in checkpoint.iterdir()} - {"SHA256SUMS"}


def test_a_checkpoint_without_checksums_is_held_against_its_index(tmp_path):
    checkpoint = trained(tmp_path)[-1]
    (checkpoint / "SHA256SUMS").unlink()
    assert find_damage(checkpoint) is None
    os.truncate(checkpoint / DATA, (checkpoint / DATA).stat().st_size - 5000)
    assert DATA in find_damage(checkpoint)


@pytest.mark.parametrize("sums", ["stale", "absent"])
def test_a_hostile_index_is_refused_and_does_not_run(tmp_path, capsys, sums):
    mark = tmp_path / "mark"
    for checkpoint in trained(tmp_path / "run"):
        (checkpoint / ".metadata").write_bytes(pickle.dumps(Hostile(mark)))
        if sums == "absent":
            (checkpoint / "SHA256SUMS").unlink()
    with pytest.raises(ConfigError, match=r"\.metadata"):
        run_line(tmp_path / "run", max_steps=6)
    for path in (tmp_path / "run", checkpoint):
        assert export_checkpoint.main([str(path), str(tmp_path / "generator.pt")]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and ".metadata" in error
    assert not mark.exists() and not (tmp_path / "generator.pt").exists()
    pickle.loads(pickle.dumps(Hostile(mark)))
    assert mark.exists()  # it would have


def test_an_index_that_leads_to_a_pickle_is_refused(tmp_path):
    """torch loads entries that are no tensors without any restriction."""
    checkpoints, mark, content = Checkpoints(tmp_path, 1, "", World()), tmp_path / "mark", io.BytesIO()
    checkpoints.save(1, {"value": torch.zeros(3)}, {})
    checkpoints.finish()
    checkpoint = tmp_path / "step-00000001"
    torch.save(Hostile(mark), content)
    (checkpoint / DATA).write_bytes(content.getvalue())
    index = Metadata({"value": BytesStorageMetadata()})
    index.storage_data = {MetadataIndex("value"): _StorageInfo(DATA, 0, len(content.getvalue()))}
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))
    (checkpoint / "SHA256SUMS").unlink()
    with pytest.raises(ConfigError, match="BytesStorageMetadata"):
        read_into(checkpoint, {"value": torch.zeros(3)})
    assert "BytesStorageMetadata" in find_damage(checkpoint) and not mark.exists()
    with suppress(Exception):
        dcp.load({"value": torch.zeros(3)}, checkpoint_id=checkpoint)
    assert mark.exists()  # it would have run
