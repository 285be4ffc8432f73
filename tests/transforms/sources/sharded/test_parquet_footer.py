import base64
import os
import random
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
import pytest

from diptych.transforms.chunk import Reject
from diptych.transforms.errors import DiptychError
from diptych.transforms.sources.base import Row
from diptych.transforms.sources.sharded.parquet import ParquetSource
from diptych.transforms.sources.sharded.parquet_footer import read_pages, read_row_groups

JPEG = b"\xff\xd8\xff\xe0"


def shard_of(path):
    (shard,) = ParquetSource((str(path),), os.path.dirname(path)).shards("", 0)
    return shard


class Wrapped(pe.KmsClient):
    """A key service that wraps keys in base64."""

    def __init__(self, config):
        pe.KmsClient.__init__(self)

    def wrap_key(self, key_bytes, master_key_identifier):
        return base64.b64encode(key_bytes)

    def unwrap_key(self, wrapped_key, master_key_identifier):
        return base64.b64decode(wrapped_key)


def write_encrypted(path, table, **options):
    config = pe.EncryptionConfiguration(footer_key="footer", **options)
    properties = pe.CryptoFactory(Wrapped).file_encryption_properties(pe.KmsConnectionConfig(), config)
    with pq.ParquetWriter(path, table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)


@pytest.mark.parametrize(
    "options",
    [
        {"plaintext_footer": True, "column_keys": {"c": ["caption"]}},
        {"plaintext_footer": True, "column_keys": {"c": ["image", "caption", "id"]}},
        {"plaintext_footer": False, "uniform_encryption": True},
        {"plaintext_footer": False, "column_keys": {"c": ["image"]}},
    ],
)
def test_an_encrypted_file_is_lost_and_its_neighbours_are_read(tmp_path, options):
    table = pa.table({"image": [JPEG] * 3, "caption": list("abc"), "id": [1, 2, 3]})
    write_encrypted(tmp_path / "a.parquet", table, **options)
    pq.write_table(table, tmp_path / "b.parquet")
    urls = tuple(f"{tmp_path}/{name}.parquet" for name in "ab")
    first, second = ParquetSource(urls, str(tmp_path)).shards("", 0)
    (lost,) = first.rows()
    assert lost.reason == "shard_corrupt"
    assert lost.message.startswith("a.parquet: it is encrypted. Decrypt it, or leave it out")
    assert lost.message.endswith(". 3 rows are lost") == options["plaintext_footer"]
    assert [row.key for row in second.rows()] == ["1", "2", "3"]


def test_column_chunks(tmp_path):
    table = pa.table({"a": ["x" * 100, "y"] * 50, "b": [{"c": n, "d": [b"1"] * 3} for n in range(100)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=50, use_dictionary=["a"])
    with pa.OSFile(str(tmp_path / "a.parquet")) as file:
        groups = read_row_groups(file)
        metadata = pq.read_metadata(tmp_path / "a.parquet")
        for number, group in enumerate(groups):
            known = [metadata.row_group(number).column(index) for index in range(metadata.num_columns)]
            assert [
                (c.path, c.num_values, c.size_bytes, c.packed_bytes, c.dictionary_offset, c.data_offset)
                for c in group
            ] == [
                (
                    c.path_in_schema,
                    c.num_values,
                    c.total_uncompressed_size,
                    c.total_compressed_size,
                    c.dictionary_page_offset,
                    c.data_page_offset,
                )
                for c in known
            ]
        pages = read_pages(file, groups[0][0])
        assert (pages.dictionary_bytes, pages.num_dictionary_values) == (109, 2)
        assert read_pages(file, groups[0][1])[:3] == (0, 0, 0)


def test_headers_with_long_statistics_are_read(tmp_path):
    options = {"use_dictionary": False, "data_page_version": "1.0", "compression": "none"}
    pq.write_table(
        pa.table({"image": [JPEG + bytes(3000), JPEG + bytes(3500)]}), tmp_path / "a.parquet", **options
    )
    assert len(list(shard_of(tmp_path / "a.parquet").rows())) == 2


class TestBombs:
    """Small files that would fill the memory."""

    def test_a_value_that_a_dictionary_repeats_is_read_in_bounded_memory(self, tmp_path):
        image = pa.array([JPEG + bytes(3_700_000)])
        images = pa.DictionaryArray.from_arrays(pa.array([0] * 300, pa.int32()), image)
        table = pa.table({"image": images, "id": range(300)})
        pq.write_table(table, tmp_path / "a.parquet", compression="zstd", store_schema=False)
        assert (tmp_path / "a.parquet").stat().st_size < 20_000
        code = (
            "from tests.transforms.sources.sharded.test_parquet_footer import shard_of\n"
            f"print(sum(len(row.image) for row in shard_of({str(tmp_path / 'a.parquet')!r}).rows()))\n"
            "status = open('/proc/self/status').read()\n"
            "print(status[status.index('VmHWM:') + 6 :].split()[0])\n"
        )
        output = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        ).stdout
        num_bytes, peak_kib = map(int, output.split())
        assert num_bytes == 300 * 3_700_004
        assert peak_kib < 600 << 10

    def test_lists_of_a_long_value(self, tmp_path):
        values = pa.DictionaryArray.from_arrays(
            pa.array([0] * 100_001, pa.int32()), pa.array(["a" * 100_000])
        )
        table = pa.table(
            {"image": [JPEG] * 2, "captions": pa.ListArray.from_arrays([0, 100_000, 100_001], values)}
        )
        pq.write_table(table, tmp_path / "a.parquet", compression="zstd", store_schema=False)
        (lost,) = shard_of(tmp_path / "a.parquet").rows()
        assert lost.reason == "shard_corrupt"
        assert "have about 10000500004 bytes; at most 4294967296 are read. 2 rows are lost" in lost.message

    def test_captions_without_end(self, tmp_path):
        values = pa.DictionaryArray.from_arrays(pa.array([0] * 2_000_001, pa.int32()), pa.array(["a"]))
        table = pa.table(
            {"image": [JPEG] * 2, "captions": pa.ListArray.from_arrays([0, 2_000_000, 2_000_001], values)}
        )
        pq.write_table(table, tmp_path / "a.parquet", store_schema=False)
        lost, row = shard_of(tmp_path / "a.parquet").rows()
        assert (lost.reason, lost.row, row.captions) == ("bad_annotation", 0, ["a"])
        assert "row 0: its captions have 10,000,0" in lost.message

    def test_a_page_that_is_too_large(self, tmp_path, monkeypatch):
        monkeypatch.setattr("diptych.transforms.sources.sharded.parquet_rows.MAX_RECORD_BYTES", 100)
        pq.write_table(pa.table({"image": [JPEG + bytes(200)]}), tmp_path / "a.parquet", use_dictionary=False)
        (lost,) = shard_of(tmp_path / "a.parquet").rows()
        assert "a page of column image has 214 bytes; at most 100 are read. 1 rows are lost" in lost.message


FORMS = [
    {"compression": "none"},
    {"compression": "snappy", "write_page_checksum": True},
    {"compression": "zstd", "use_dictionary": False, "data_page_version": "2.0"},
    {"compression": "gzip", "row_group_size": 7, "write_page_index": True},
]
VIEWS = pa.schema([("key", pa.string_view()), ("captions", pa.list_view(pa.string()))])


def whole_files(folder):
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {
            "key": [f"{n:03d}" for n in range(24)],
            "image": pa.array(
                [{"bytes": JPEG + bytes([n]) * 40, "path": f"{n}.jpg"} for n in range(24)], image
            ),
            "captions": [[f"c {n}.{i}" for i in range(n % 3)] for n in range(24)],
        }
    )
    for number, options in enumerate(FORMS):
        pq.write_table(table, folder / f"{number}.parquet", **options)
    views = pa.table({name: table[name].to_pylist() for name in VIEWS.names}, VIEWS)
    pq.write_table(views.append_column("image", table["image"]), folder / "views.parquet")
    return [path.read_bytes() for path in sorted(folder.glob("*.parquet"))]


def mutated(data, draws):
    """Returns a file with one to three faults, most of them in its footer."""
    data = bytearray(data)
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    for _ in range(draws.choice((1, 1, 2, 3))):
        at = draws.randrange(footer, len(data) - 8) if draws.random() < 0.7 else draws.randrange(4, len(data))
        fault = draws.random()
        if at >= len(data):
            continue
        if fault < 0.6:
            data[at] ^= 1 << draws.randrange(8)
        elif fault < 0.85:
            data[at] = draws.choice((0, 1, 127, 128, 255))
        elif fault < 0.95:
            del data[at : at + draws.randrange(1, 4)]
        else:
            data[at:at] = draws.randbytes(draws.randrange(1, 4))
    return bytes(data)


def read_mutated(folder, seed, count):
    files = whole_files(folder)
    path = folder / "a.parquet"
    for number in range(count):
        draws = random.Random(f"{seed}.{number}")
        path.write_bytes(mutated(draws.choice(files), draws))
        try:
            records = list(shard_of(path).rows())
        except DiptychError:
            continue  # a name of a column is another, as any file may have it
        assert all(isinstance(record, Row | Reject) for record in records)


def test_damage_never_ends_the_process(tmp_path):
    read_mutated(tmp_path, 1, 600)


@pytest.mark.long
def test_damage_at_length(tmp_path):
    read_mutated(tmp_path, 2, 30_000)
