import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diptych.transforms.schemas import (
    IMAGE,
    RAW_COLUMNS,
    REASONS,
    REJECTS,
    huggingface_info,
    images_schema,
    raw_schema,
)


def test_reasons_are_codes_of_one_stage() -> None:
    shared = {"model_error": {"embed", "caption", "generate"}, "no_caption": {"text", "embed", "generate"}}
    codes = [reason for reasons in REASONS.values() for reason in reasons if reason not in shared]
    assert len(codes) == len(set(codes))
    for code, stages in shared.items():
        assert {stage for stage, reasons in REASONS.items() if code in reasons} == stages
    assert all(code.isidentifier() and code == code.lower() for code in codes)
    assert all(text for reasons in REASONS.values() for text in reasons.values())


def test_rejects_name_what_was_lost() -> None:
    assert REJECTS.names == ["key", "shard", "row", "stage", "reason", "message", "bytes"]
    assert [field.name for field in REJECTS if field.nullable] == ["bytes"]


def test_raw_rows() -> None:
    assert raw_schema().names == list(RAW_COLUMNS) == ["key", "image", "path", "captions", "source", "row"]
    assert not any(field.nullable for field in raw_schema())
    with_metadata = raw_schema(["licence", "url"])
    assert with_metadata.names == [*RAW_COLUMNS, "licence", "url"]
    assert with_metadata.field("url") == pa.field("url", pa.string())


def test_images() -> None:
    known = ["key", "image", "captions", "width", "height", "sha256", "phash", "source", "row"]
    assert images_schema().names == known
    assert (
        images_schema().field("image").type
        == IMAGE
        == pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    assert images_schema().field("phash").type == pa.uint64()
    assert images_schema(["url"], 8, "uint8").names == [*known, "url", "pixels"]


@pytest.mark.parametrize(("pixels", "dtype"), [("uint8", pa.uint8()), ("float32", pa.float32())])
def test_tensors_have_a_fixed_shape(pixels: str, dtype: pa.DataType) -> None:
    field = images_schema((), 56, pixels).field("pixels")
    assert field.type.shape == [3, 56, 56]
    assert field.type.value_type == dtype


def test_a_tensor_of_another_type_is_refused() -> None:
    with pytest.raises(KeyError):
        images_schema((), 56, "float64")


def test_huggingface_info_names_every_column_but_tensors() -> None:
    features = json.loads(huggingface_info(images_schema(["url"], 8, "float32")))["info"]["features"]
    assert list(features) == images_schema(["url"]).names
    assert features["image"] == {"_type": "Image"}
    assert features["captions"] == {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"}
    assert features["phash"] == {"dtype": "uint64", "_type": "Value"}
    scores = pa.schema([pa.field("scores", pa.list_(pa.float32()))])
    features = json.loads(huggingface_info(scores))["info"]["features"]
    assert features["scores"] == {"feature": {"dtype": "float32", "_type": "Value"}, "_type": "List"}


def picture(seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)


def png(pixels: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("pixels", [None, "uint8", "float32"])
def test_datasets_opens_a_file_and_shows_the_pictures(tmp_path: Path, pixels: str | None) -> None:
    schema = images_schema(["url"], 8, pixels)
    made: dict[str, list[Any]] = {
        "key": ["a", "b"],
        "image": [{"bytes": png(picture(seed)), "path": f"{seed}.png"} for seed in (0, 1)],
        "captions": [["A cat", "Ein Käfer"], []],
        "width": [640, 1],
        "height": [480, 2],
        "sha256": ["0" * 64, "f" * 64],
        "phash": [2**64 - 1, 0],
        "source": ["a.tar", "a.tar"],
        "row": [2**40, 0],
        "url": ["x", None],
    }
    arrays = [pa.array(made[field.name], field.type) for field in schema if field.name != "pixels"]
    if pixels:
        tensors = np.stack([picture(seed).transpose(2, 0, 1) for seed in (0, 1)]).astype(pixels)
        storage = pa.FixedSizeListArray.from_arrays(pa.array(tensors.ravel()), 3 * 8 * 8)
        arrays.append(pa.ExtensionArray.from_storage(schema.field("pixels").type, storage))
    table = pa.Table.from_arrays(
        arrays, schema=schema.with_metadata({"huggingface": huggingface_info(schema)})
    )
    pq.write_table(table, tmp_path / "shard-00000.parquet")
    files, cache = str(tmp_path / "*.parquet"), str(tmp_path / "cache")
    features = None
    if pixels:  # datasets knows no tensors of Arrow: it must be told to take them for lists
        plain = schema.remove(schema.get_field_index("pixels"))
        plain = plain.with_metadata({"huggingface": huggingface_info(schema)})
        features = datasets.Features.from_arrow_schema(plain)
        features["pixels"] = datasets.List(datasets.Value(pixels), length=3 * 8 * 8)
    found = datasets.load_dataset(
        "parquet", data_files=files, split="train", cache_dir=cache, features=features
    )
    assert isinstance(found.features["image"], datasets.Image)
    assert found.features["captions"] == datasets.List(datasets.Value("string"))
    assert found.features["phash"] == datasets.Value("uint64")
    for seed, row in enumerate(found):
        assert isinstance(row["image"], Image.Image)
        assert np.array_equal(np.asarray(row["image"]), picture(seed))
        for name in made.keys() - {"image"}:
            assert row[name] == made[name][seed]
        if pixels:
            assert np.array_equal(np.reshape(row["pixels"], (3, 8, 8)), picture(seed).transpose(2, 0, 1))
