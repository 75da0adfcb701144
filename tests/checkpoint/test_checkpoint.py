"""A checkpoint is all there or not there, and what is damaged is found and named."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from refractor_core.checkpoint import Checkpoint, DamagedCheckpoint, write
from refractor_core.checkpoint import writer as writer_module
from refractor_core.parallel.mesh import Axis, Layout, Mesh
from refractor_core.parallel.segments import Saved

ALONE = Axis("world")


def content() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "model.weight": torch.randn(17, 5, generator=generator).bfloat16(),
        "master.weight": torch.randn(17, 5, generator=generator),
        "optimizer.step": torch.tensor(7.0),
        "router.bias": torch.randn(3, generator=generator, dtype=torch.float64),
        "rng": torch.randint(0, 256, (50,), dtype=torch.uint8, generator=generator),
        "empty": torch.empty(0, 4),
    }


def whole(tensors):
    return [Saved.whole(name, tensor) for name, tensor in tensors.items()]


def saved(folder, step=5):
    return Checkpoint(write(folder, step, whole(content()), {"tokens": 123}, ALONE))


def test_what_is_written_comes_back_bit_for_bit(tmp_path):
    checkpoint = saved(tmp_path)
    assert checkpoint.path.name == "step-00000005" and checkpoint.step == 5 and checkpoint.state == {"tokens": 123}
    back = checkpoint.tensors()
    assert back.keys() == content().keys()
    for name, tensor in content().items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor)
    assert checkpoint.tensors("model.").keys() == {"weight"}
    assert checkpoint.verify() == []


def test_every_flipped_bit_is_found(tmp_path):
    """300 random single-bit flips over every file, the manifest included: none passes, and a hit tensor is named."""
    checkpoint = saved(tmp_path)
    files = [p for p in checkpoint.path.iterdir()]
    chance = random.Random(0)
    named = 0
    for _ in range(300):
        path = chance.choice(files)
        original = path.read_bytes()
        bit = chance.randrange(len(original) * 8)
        broken = bytearray(original)
        broken[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(broken)
        found = Checkpoint(checkpoint.path).verify()
        assert found, f"bit {bit} of {path.name} went unnoticed"
        named += any(damage.tensor for damage in found)
        path.write_bytes(original)
    assert named > 30
    assert Checkpoint(checkpoint.path).verify() == []


def test_a_damaged_tensor_is_named_and_not_loaded(tmp_path):
    checkpoint = saved(tmp_path)
    path = checkpoint.path / "rank-00000.safetensors"
    data = path.read_bytes()
    at = data.index(content()["master.weight"].numpy().tobytes()) + 40
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    (damage,) = Checkpoint(checkpoint.path).verify()
    assert damage.tensor == "master.weight" and damage.path == path
    with pytest.raises(DamagedCheckpoint, match="master.weight"):
        Checkpoint(checkpoint.path).tensors()
    assert Checkpoint(checkpoint.path).tensors("model.").keys() == {"weight"}


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "manifest.json"])
@pytest.mark.parametrize("harm", ["truncate", "zero", "empty", "remove"])
def test_harmed_files_are_found(tmp_path, name, harm):
    checkpoint = saved(tmp_path)
    path = checkpoint.path / name
    data = path.read_bytes()
    if harm == "remove":
        path.unlink()
    else:
        path.write_bytes({"truncate": data[:-3], "zero": data[:100] + bytes(len(data) - 100), "empty": b""}[harm])
    found = Checkpoint(checkpoint.path).verify()
    assert found and any(name in str(damage.path) for damage in found)


def test_a_file_of_another_checkpoint_is_found(tmp_path):
    one = saved(tmp_path / "a")
    changed = {k: v + 1 if v.is_floating_point() else v for k, v in content().items()}
    other = Checkpoint(write(tmp_path / "b", 5, whole(changed), {}, ALONE))
    shutil.copy(other.path / "rank-00000.safetensors", one.path / "rank-00000.safetensors")
    assert {d.tensor for d in Checkpoint(one.path).verify()} >= {"model.weight", "master.weight"}
    extra = saved(tmp_path / "c")
    (extra.path / "rank-00001.safetensors").write_bytes(b"x")
    assert "does not belong" in str(extra.verify()[0])


def test_the_newest_sound_one_is_found_behind_damaged_ones(tmp_path):
    for step in (1, 2, 3):
        saved(tmp_path, step)
    (tmp_path / "step-00000003" / "manifest.json").write_text("{}")
    (tmp_path / "step-00000002" / "rank-00000.safetensors").unlink()
    (tmp_path / ".partial-step-00000004").mkdir()
    checkpoint, damages = Checkpoint.newest_sound(tmp_path)
    assert checkpoint.step == 1 and len(damages) == 2
    assert Checkpoint.newest_sound(tmp_path / "nowhere") == (None, [])


def test_prune_keeps_the_newest_and_sweeps_leftovers(tmp_path):
    for step in (1, 2, 99999999, 100000000):  # by name the last would come before the one before it
        saved(tmp_path, step)
    (tmp_path / ".partial-step-00000009").mkdir()
    Checkpoint.prune(tmp_path, keep=2)
    assert [c.step for c in Checkpoint.listed(tmp_path)] == [99999999, 100000000] and not list(tmp_path.glob(".partial-*"))


def test_a_failing_write_leaves_the_older_checkpoint_alone(tmp_path, monkeypatch):
    saved(tmp_path, 1)

    def full(path, tensors):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(writer_module, "_write_file", full)
    with pytest.raises(OSError, match="step-00000002.*No space left.*Older checkpoints are untouched"):
        saved(tmp_path, 2)
    assert [c.step for c in Checkpoint.listed(tmp_path)] == [1] and not list(tmp_path.glob(".partial-*"))
    assert Checkpoint.listed(tmp_path)[0].verify() == []


def _on_rank(rank, folder, fail_on):
    from pathlib import Path

    world = Mesh.create(Layout(world_size=2, data_shard=2), rank).axis("world")
    if rank == fail_on:
        writer_module._write_file = lambda path, tensors: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    try:
        return str(write(Path(folder), 3, whole({f"rank.{rank}": torch.full((2,), float(rank))}), {"by": rank}, world))
    except OSError as error:
        return f"failed: {error}"


def test_ranks_write_together(ranks, tmp_path):
    first, second = ranks(2, _on_rank, str(tmp_path), None)
    assert first == second
    checkpoint = Checkpoint.listed(tmp_path)[0]
    assert checkpoint.verify() == [] and checkpoint.state == {"by": 0}
    assert {name: t.tolist() for name, t in checkpoint.tensors().items()} == {"rank.0": [0.0, 0.0], "rank.1": [1.0, 1.0]}


@pytest.mark.parametrize("fail_on", [0, 1])
def test_one_rank_that_cannot_write_fails_all_and_leaves_nothing(ranks, tmp_path, fail_on):
    results = ranks(2, _on_rank, str(tmp_path), fail_on)
    assert all(r.startswith("failed") and f"rank {fail_on}" in r and "No space left" in r for r in results)
    assert list(tmp_path.iterdir()) == []


def test_a_newer_format_is_refused_by_name(tmp_path):
    checkpoint = saved(tmp_path)
    path = checkpoint.path / "manifest.json"
    body = json.loads(path.read_text())["body"] | {"format": 99}
    path.write_text(json.dumps({"body": body, "sha256": writer_module.seal(body)}))
    assert "format 99" in str(Checkpoint(checkpoint.path).verify()[0])


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(ValueError, match="checkpoints: is a file where a folder"):
        Checkpoint.listed(tmp_path / "checkpoints")
    assert Checkpoint.listed(tmp_path / "none") == []


def test_all_is_on_disk_before_the_name_says_so(tmp_path, monkeypatch):
    """Files, then the folder that names them, then the rename, then the folder above: a power cut leaves a whole checkpoint or none."""
    done = []
    fsync, rename = os.fsync, Path.rename

    def note_fsync(descriptor):
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def note_rename(path, target):
        done.append(f"-> {Path(target).name}")
        return rename(path, target)

    monkeypatch.setattr(writer_module.os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "rename", note_rename)
    saved(tmp_path / "checkpoints")
    partial = ".partial-step-00000005"
    assert done == ["rank-00000.safetensors", "manifest.json", partial, "-> step-00000005", "checkpoints"]


def test_what_reads_back_other_than_it_was_written_is_no_checkpoint(tmp_path, monkeypatch):
    import safetensors.torch

    save = safetensors.torch.save_file

    def save_badly(tensors, path):
        save({name: t.clone().zero_() if name == "rng" else t for name, t in tensors.items()}, path)

    monkeypatch.setattr(safetensors.torch, "save_file", save_badly)
    with pytest.raises(OSError, match="tensor rng reads back other"):
        saved(tmp_path)
    assert Checkpoint.listed(tmp_path) == []


@pytest.mark.parametrize("file", ["../elsewhere.safetensors", "/elsewhere.safetensors", "unlisted.safetensors"])
def test_a_manifest_cannot_name_files_of_others(tmp_path, file):
    checkpoint = saved(tmp_path)
    path = checkpoint.path / "manifest.json"
    body = json.loads(path.read_text())["body"]
    body["tensors"]["model.weight"]["pieces"][0]["file"] = file
    if not file.startswith("unlisted"):
        body["files"][file] = {"bytes": 0, "sha256": ""}
    path.write_text(json.dumps({"body": body, "sha256": writer_module.seal(body)}))
    with pytest.raises(DamagedCheckpoint, match="not the checkpoint's own.*elsewhere|not the checkpoint's own.*unlisted"):
        Checkpoint(checkpoint.path).tensors("model.")


def _newest_on_rank(rank, folder):
    world = Mesh.create(Layout(world_size=2, data_shard=2), rank).axis("world")
    for step in (1, 2, 3):
        write(folder, step, whole({f"rank.{rank}": torch.full((64,), float(rank))}), {}, world)
    if rank == 0:
        for step, file in ((3, "rank-00001.safetensors"), (2, "manifest.json")):
            path = folder / f"step-{step:08d}" / file
            path.write_bytes(path.read_bytes()[:-1] + b"!")
    checkpoint, damages = Checkpoint.newest_sound(folder, world)
    return checkpoint.step, [str(damage) for damage in damages]


def test_ranks_share_the_reading_and_find_the_same(ranks, tmp_path):
    first, second = ranks(2, _newest_on_rank, tmp_path)
    assert first == second and first[0] == 1
    newest, before = first[1]
    assert "step-00000003/rank-00001.safetensors: tensor rank.1" in newest and "step-00000002/manifest.json" in before
