"""Who writes what: every element once, the bytes spread evenly; and what is not every element once is no checkpoint."""

import json
import math
import random
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from refractor_core.checkpoint import Checkpoint, DamagedCheckpoint, write
from refractor_core.checkpoint import writer as writer_module
from refractor_core.checkpoint.pieces import Holding, assign, flaw
from refractor_core.parallel.extent import Extent
from refractor_core.parallel.mesh import Axis, Layout, Mesh
from refractor_core.parallel.segments import Saved
from refractor_core.parallel.sharding import ShardSpec

SHAPE = (8, 12, 6)
WHOLE = torch.arange(math.prod(SHAPE), dtype=torch.float64).view(SHAPE)


def cut(tensor: int, expert: int, stretches: int) -> list[Extent]:
    """A tensor of experts with fused gate and up, over tensor × expert ranks, each piece in that many stretches."""
    found = []
    for e, t in product(range(expert), range(tensor)):
        spec = ShardSpec(SHAPE, {0: (Axis("expert", expert, e),), 1: (Axis("tensor", tensor, t),)}, {1: (8, 4)})
        size = -(-math.prod(spec.local_shape) // stretches)
        found += [Extent.of(spec, low, min(low + size, math.prod(spec.local_shape))) for low in range(0, math.prod(spec.local_shape), size)]
    return found


CUTS = [cut(*sizes) for sizes in [(1, 1, 1), (2, 1, 1), (4, 2, 3), (1, 4, 2), (2, 8, 5)]]


@pytest.mark.parametrize("extents", CUTS)
def test_a_cut_tiles_and_every_harm_to_it_is_told(extents):
    assert flaw(SHAPE, extents) == ""
    assert "instead of" in flaw(SHAPE, extents[1:])
    assert "instead of" in flaw(SHAPE, [*extents, extents[0]])
    assert "shape" in flaw((8, 6, 12), extents)
    if len(extents) > 1:
        one = extents[-1]
        shifted = (
            replace(one, first=one.first - 1, last=one.last - 1) if one.first else replace(one, ranges=(((0, 8),), ((0, 6),), ((0, 6),)))
        )
        assert flaw(SHAPE, [*extents[:-1], shifted])
        assert "overlap" in flaw(SHAPE, [extents[0], *extents[:-1]]) or "instead of" in flaw(SHAPE, [extents[0], *extents[:-1]])


def test_pieces_of_two_cuts_that_hold_as_many_elements_as_the_tensor_but_not_all_of_them_are_refused():
    halves, quarters = cut(2, 1, 1), cut(1, 4, 1)
    assert "overlap" in flaw(SHAPE, [halves[0], *quarters[:2]])
    mixed = [Extent(SHAPE, (((0, 4),), ((0, 12),), ((0, 6),)), 0, 288), Extent(SHAPE, (((4, 8),), ((0, 6),), ((0, 6),)), 0, 144)]
    assert flaw(SHAPE, [*mixed, Extent(SHAPE, (((4, 8),), ((6, 12),), ((0, 6),)), 0, 144)]) == ""  # no grid, but every element once


def test_a_piece_beyond_its_box_or_its_tensor_is_refused():
    whole = Extent.whole(SHAPE)
    for wrong in [
        replace(whole, first=1, last=577),
        replace(whole, ranges=(((0, 4), (3, 7)), *whole.ranges[1:])),
        replace(whole, ranges=(((1, 9),), *whole.ranges[1:])),
    ]:
        assert "beyond" in flaw(SHAPE, [wrong])


def test_scalars_and_empty_tensors_are_one_piece():
    for shape in ((), (0, 4)):
        extent = Extent.whole(shape)
        held = [[Holding("x", "float32", extent, 4)]] * 3
        assert assign(held) == [[0], [], []] and flaw(shape, [extent]) == ""
        assert flaw(shape, []) if shape == () else not flaw(shape, [])


def test_replicas_are_written_once_and_spread_evenly():
    """Eight ranks, of which each four hold the same 200 tensors of random sizes, and each has one of its own."""
    chance = random.Random(0)
    sizes = [chance.randint(1, 1000) for _ in range(200)]
    held = []
    for rank in range(8):
        shared = [Holding(f"{rank // 4}.{i}", "uint8", Extent.whole((size,)), size) for i, size in enumerate(sizes)]
        held.append([Holding(f"rng.{rank}", "uint8", Extent.whole((500 * rank,)), 500 * rank), *shared])
    chosen = assign(held)
    written = [held[rank][place] for rank, places in enumerate(chosen) for place in places]
    assert len(written) == len({h.name for h in written}) == 8 + 2 * 200
    loads = [sum(held[rank][place].bytes for place in places) for rank, places in enumerate(chosen)]
    for group in (loads[:4], loads[4:]):
        assert max(group) - min(group) <= 1000
    assert assign(held) == chosen


def test_of_two_ways_to_hold_a_tensor_one_is_written():
    """First and last stage both hold a tied embedding, in stretches that begin at other places."""
    first, last = [Extent.whole((10,))], [replace(Extent.whole((10,)), last=4), replace(Extent.whole((10,)), first=4)]
    held = [[Holding("w", "float32", extent, 4 * extent.numel)] for extent in [*last, *first, *last]]
    assert assign(held) == [[0], [0], [], [], []]


def _stretch(extent):
    return WHOLE.reshape(-1)[torch.from_numpy(extent.global_indices(0, extent.numel))]


def _held(rank: int, extents: list[Extent]) -> list[Saved]:
    """A piece of ``w``, a replica of ``both``, and a tensor of one's own."""
    own = [Saved.whole("both", torch.arange(5.0)), Saved.whole(f"rng.{rank}", torch.tensor([rank]))]
    return [Saved("w", _stretch(extents[rank]), extents[rank]), *own]


def _twice(held):
    return [[*places, 1] if 1 not in places else places for places in assign(held)]


def _not_at_all(held):
    return [[place for place in places if place != 1] for places in assign(held)]


def _write_all(rank, folder):
    """Four ranks: a sound checkpoint, and one attempt for each fault."""
    world = Mesh.create(Layout(world_size=4, data_shard=4), rank).axis("world")
    grid, told = cut(2, 2, 1), {}

    def attempt(name, held):
        try:
            told[name] = str(write(folder / name, 1, held, {"by": name}, world))
        except (OSError, RuntimeError) as error:
            told[name] = f"{type(error).__name__}: {error}"

    attempt("sound", _held(rank, grid))
    for name, faulty in {"twice": _twice, "not at all": _not_at_all}.items():
        writer_module.assign = faulty
        attempt(name, _held(rank, grid))
    writer_module.assign = assign
    wrong = [*grid[:3], replace(grid[2], first=1, last=grid[2].last)]
    attempt("shifted", _held(rank, wrong))
    attempt("format", [replace(saved, tensor=saved.tensor.float()) if rank == 2 else saved for saved in _held(rank, grid)])
    fused = [Extent.of(ShardSpec(SHAPE, {1: (Axis("tensor", 4, place),)}, {})) for place in range(4)]
    split = [Extent.of(ShardSpec(SHAPE, {1: (Axis("tensor", 4, place),)}, {1: (8, 4)})) for place in range(4)]
    held = [replace(saved, extent=fused[rank]) if saved.name == "w" else saved for saved in _held(rank, split)]
    attempt("fused blocks cut as one", held)
    return told


@pytest.fixture(scope="module")
def attempts(tmp_path_factory):
    from tests.ranks import run_ranks

    folder = tmp_path_factory.mktemp("attempts")
    results = run_ranks(4, _write_all, folder, directory=tmp_path_factory.mktemp("ranks"))
    assert all(result == results[0] for result in results)  # what fails on one rank fails on all
    return results[0]


def test_ranks_write_pieces_that_any_other_cut_reads(attempts):
    checkpoint = Checkpoint(Path(attempts["sound"]))
    assert checkpoint.verify() == []
    assert [len(checkpoint.pieces(name)) for name in ("w", "both", "rng.3")] == [4, 1, 1]
    assert len({piece.file for piece in checkpoint.pieces("w")}) == 4
    assert torch.equal(checkpoint.tensors()["w"], WHOLE) and checkpoint.tensors("both")[""].tolist() == [0, 1, 2, 3, 4]
    for extents in CUTS:
        for extent in extents:
            target = torch.full((extent.numel,), -1, dtype=torch.float32)
            checkpoint.read_into("w", target, extent)
            assert torch.equal(target, _stretch(extent).float())


FAULTS = {
    "twice": "both: its pieces hold 20 elements instead of 5",
    "not at all": "both: no rank wrote it",
    "shifted": "w: its pieces hold 575 elements instead of 576",
    "format": "w: written in shapes [(8, 12, 6)] and formats ['float32', 'float64']",
}


@pytest.mark.parametrize("fault, told", FAULTS.items())
def test_a_checkpoint_that_is_not_every_element_once_is_not_sealed(attempts, fault, told):
    assert attempts[fault].startswith("RuntimeError") and told in attempts[fault] and "Older checkpoints are untouched" in attempts[fault]
    assert not any((Path(attempts["sound"]).parents[1] / fault).iterdir())


def test_fused_blocks_cut_as_one_give_another_tensor(attempts):
    """No rank can know: only loading in another layout shows it, which is what the tests of layouts compare."""
    checkpoint = Checkpoint(Path(attempts["fused blocks cut as one"]))
    assert checkpoint.verify() == [] and not torch.equal(checkpoint.tensors("w")[""], WHOLE)


def test_only_pieces_that_have_something_are_read_and_damage_is_named(attempts, tmp_path):
    shutil.copytree(attempts["sound"], tmp_path / "step-00000001")
    checkpoint = Checkpoint(tmp_path / "step-00000001")
    hit = checkpoint.pieces("w")[3]
    path = checkpoint.path / hit.file
    data = bytearray(path.read_bytes())
    data[data.index(_stretch(hit.extent).numpy().tobytes()) + 100] ^= 8
    path.write_bytes(data)
    (damage,) = checkpoint.verify()
    assert (damage.tensor, damage.path) == ("w", path)
    sound = checkpoint.pieces("w")[0].extent
    target = torch.zeros(sound.numel, dtype=torch.float64)
    checkpoint.read_into("w", target, sound)
    assert torch.equal(target, _stretch(sound))
    with pytest.raises(DamagedCheckpoint, match=f"{hit.file}: tensor w: its bytes are not the ones written"):
        checkpoint.read_into("w", torch.zeros(SHAPE))
    path.unlink()
    again = Checkpoint(checkpoint.path)
    assert str(again.verify()[0]).endswith(f"{hit.file}: is missing")
    with pytest.raises(DamagedCheckpoint, match=f"{hit.file}: cannot be read"):
        again.tensors()


def test_a_bit_that_flips_in_any_of_the_files_is_found(attempts, tmp_path):
    shutil.copytree(attempts["sound"], tmp_path / "step-00000001")
    chance, files, named = random.Random(1), sorted((tmp_path / "step-00000001").iterdir()), 0
    assert len(files) == 5
    for path in files * 12:
        original = path.read_bytes()
        broken, bit = bytearray(original), chance.randrange(len(original) * 8)
        broken[bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        found = Checkpoint(path.parent).verify()
        assert found and {damage.path for damage in found} == {path}
        named += any(damage.tensor == "w" for damage in found)
        path.write_bytes(original)
    assert named > 20


@pytest.mark.parametrize("change, told", [
    (lambda pieces: pieces.pop(), "hold 432 elements"),
    (lambda pieces: pieces.append(pieces[0]), "hold 720 elements"),
    (lambda pieces: pieces[1].update(ranges=pieces[0]["ranges"]), "overlap"),
])  # fmt: skip
def test_a_manifest_whose_pieces_leave_a_hole_is_damaged(attempts, tmp_path, change, told):
    shutil.copytree(attempts["sound"], tmp_path / "step-00000001")
    path = tmp_path / "step-00000001" / "manifest.json"
    body = json.loads(path.read_text())["body"]
    change(body["tensors"]["w"]["pieces"])
    path.write_text(json.dumps({"body": body, "sha256": writer_module.seal(body)}))
    checkpoint = Checkpoint(path.parent)
    assert told in str(checkpoint.verify()[0]) and checkpoint.verify()[0].tensor == "w"
    if "overlap" not in told:
        with pytest.raises(DamagedCheckpoint, match="elements of a stretch of 576"):
            checkpoint.read_into("w", torch.zeros(SHAPE))


def test_every_reason_that_a_checkpoint_does_not_fit_is_told(attempts):
    checkpoint = Checkpoint(Path(attempts["sound"]))
    wanted = [("w", (8, 12, 7), None), ("v", (3,), None), ("both", (5,), torch.float64), ("rng.0", (1,), torch.int64)]
    assert checkpoint.misfits(wanted, families=("rng.",)) == [
        "w has shape [8, 12, 6] instead of [8, 12, 7]", "lacks v", "both is torch.float32 instead of torch.float64",
        "has rng.1 besides", "has rng.2 besides", "has rng.3 besides",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="lacks nothing_of_that_name"):
        checkpoint.read_into("nothing_of_that_name", torch.zeros(1))


def test_a_checkpoint_of_the_first_format_is_read(tmp_path):
    """Whole tensors, each in one file, told without pieces."""
    checkpoint = Checkpoint(write(tmp_path, 1, [Saved.whole("w", WHOLE)], {}, Axis("world")))
    path = checkpoint.path / "manifest.json"
    body = json.loads(path.read_text())["body"]
    (piece,) = body["tensors"]["w"].pop("pieces")
    body["tensors"]["w"] |= {"file": piece["file"], "xxh3": piece["xxh3"]}
    body["format"] = 1
    path.write_text(json.dumps({"body": body, "sha256": writer_module.seal(body)}))
    old = Checkpoint(checkpoint.path)
    assert old.verify() == [] and torch.equal(old.tensors()["w"], WHOLE)
