"""Pooled features as parquet: float32, as means are computed, with the names of their frames; read as other shards."""

import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from qwen_batched.extract import main
from qwen_batched.extraction import FeatureDataset, parquet
from qwen_batched.extraction.manifest import read_manifest
from tests.extraction.test_extraction import LENGTHS
from tests.extraction.written import arguments, contents

FOLDERS = ("image_features/front", "image_features/wrist", "last")
HALF = ("--what", "image_features", "last", "--dtype", "bfloat16", "--batch-size", 4)
POOLED = (*HALF, "--pool", "mean")


@pytest.fixture(scope="module")
def folders(lerobot, checkpoint, tmp_path_factory):
    """The same pooled features as parquet and as safetensors, and maps, of a bfloat16 model. Read only."""
    root = tmp_path_factory.mktemp("formats")
    for name, more in (("parquet", (*POOLED, "--format", "parquet")), ("safetensors", POOLED), ("maps", HALF)):
        assert main(arguments(lerobot, root / name, checkpoint, *more)) == 0
    return root


def vectors(path):
    """(rows, D) of a file, as any reader of parquet finds them."""
    return torch.tensor(pq.read_table(path)["features"].to_pylist())


def test_vectors_are_the_means_before_they_are_rounded_with_the_names_of_their_frames(folders):
    assert not list((folders / "parquet/features").rglob("*.safetensors"))
    assert read_manifest(folders / "parquet")["file_format"] == "parquet"
    places = [(episode, frame) for episode, length in enumerate(LENGTHS) for frame in range(length)]
    for folder in FOLDERS:
        file = folders / f"parquet/features/{folder}/part-00000.parquet"
        kind = pq.read_schema(file).field("features").type
        assert kind.value_type == pa.float32() and not kind.value_field.nullable and kind.list_size > 1
        table, found = pq.read_table(file), vectors(file)
        assert list(zip(table["episode"].to_pylist(), table["frame"].to_pylist(), strict=True)) == places
        assert table["timestamp"].to_pylist()[3] == pytest.approx(0.3)
        rounded = load_file(folders / f"safetensors/features/{folder}/part-00000.safetensors")["rows"]
        assert torch.equal(found.bfloat16(), rounded) and not torch.equal(found, rounded.float())
        maps = load_file(folders / f"maps/features/{folder}/part-00000.safetensors")
        if folder != "last":
            assert torch.equal(found, maps["rows"].float().mean((1, 2)))
        else:
            kept = maps["mask"].unsqueeze(-1)
            torch.testing.assert_close(found, (maps["rows"].float() * kept).sum(1) / kept.sum(1), rtol=1e-5, atol=1e-6)


def test_items_are_those_of_the_files(folders):
    data, other = FeatureDataset(folders / "parquet"), FeatureDataset(folders / "safetensors")
    file = folders / "parquet/features/image_features/wrist/part-00000.parquet"
    assert len(data) == sum(LENGTHS) and pq.read_metadata(file).num_row_groups == 1
    for index in (20, 0, 7, 7):
        item, rounded = data[index], other[index]
        assert torch.equal(item["image_features"][1], vectors(file)[index]) and item["last"].dtype == torch.float32
        assert torch.equal(item["image_features"].bfloat16(), rounded["image_features"])
        assert torch.equal(item["last"].bfloat16(), rounded["last"]) and item["timestamp"] == rounded["timestamp"]
    with pytest.raises(ValueError, match="not pooled"):
        data.features_for({})


def test_small_row_groups_read_the_same(lerobot, checkpoint, folders, tmp_path, monkeypatch):
    width = len(FeatureDataset(folders / "parquet")[0]["image_features"][0])
    monkeypatch.setattr(parquet, "GROUP_BYTES", 4 * width * 5)
    assert main(arguments(lerobot, tmp_path, checkpoint, *POOLED, "--format", "parquet")) == 0
    file = tmp_path / "features/image_features/front/part-00000.parquet"
    assert pq.read_metadata(file).num_row_groups == 5  # of 21 rows
    data, whole = FeatureDataset(tmp_path), FeatureDataset(folders / "parquet")
    for index in range(sum(LENGTHS)):
        assert torch.equal(data[index]["image_features"], whole[index]["image_features"])


def test_it_is_resumed_and_verified_and_what_is_damaged_is_written_again(lerobot, checkpoint, tmp_path, capsys):
    command = arguments(lerobot, tmp_path, checkpoint, *POOLED, "--format", "parquet", "--shard-frames", 9)
    assert main(command) == 0
    before, files = contents(tmp_path), sorted((tmp_path / "features").rglob("*.parquet"))
    assert len(files) == 9 and not [name for name in before if "/." in name]
    assert main([*command, "--verify", "30"]) == 0
    assert "0 differ" in capsys.readouterr().out
    for damage in (
        lambda: files[0].unlink(),
        lambda: os.truncate(files[1], 1000),
        lambda: files[2].write_bytes(b"PAR1"),
        lambda: files[3].write_bytes(files[3].read_bytes() + b"\0"),
    ):
        damage()
        assert main(command) == 0
        assert contents(tmp_path) == before
    value = vectors(files[0])[2, 3].numpy().tobytes()
    data = files[0].read_bytes()
    assert data.count(value) == 1
    files[0].write_bytes(data.replace(value, bytes(byte ^ 1 for byte in value)))
    assert main([*command, "--verify", "60"]) == 1
    assert "image_features/front/part-00000, row 2: differs" in capsys.readouterr().err
    capsys.readouterr()
    assert main(arguments(lerobot, tmp_path, checkpoint, *POOLED, "--shard-frames", 9)) == 2
    assert "its file_format is parquet" in capsys.readouterr().err.replace("'", "")


def test_a_dry_run_counts_float32(lerobot, checkpoint, tmp_path, capsys):
    command = arguments(lerobot, tmp_path, checkpoint, "--dtype", "bfloat16", "--pool", "mean", "--dry-run")
    sizes = []
    for more in ((), ("--format", "parquet")):
        assert main([*command, "--images-per-second", "2", *more]) == 0
        sizes.append(int(capsys.readouterr().out.split(" bytes of")[0].split()[-1]))
    assert sizes[1] == 2 * sizes[0] > 0
