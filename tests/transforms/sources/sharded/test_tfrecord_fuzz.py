"""The TFRecord reader against an independent one, on files with damage."""

import random
import struct

import google_crc32c
import pytest
import tfrecord
from google.protobuf.message import DecodeError
from tfrecord import example_pb2

from diptych.transforms.chunk import Reject
from diptych.transforms.sources.sharded.tfrecord import TfrecordSource

NUM_RECORDS = 8


def whole_file(path):
    writer = tfrecord.TFRecordWriter(str(path))
    for number in range(NUM_RECORDS):
        image = (b"\xff\xd8\xff" + bytes([number]) * (7 * number), "byte")
        writer.write({"key": (b"k%d" % number, "byte"), "jpg": image, "caption": (b"c%d" % number, "byte")})
    writer.close()
    return path.read_bytes()


def mutated(data, draws):
    """Returns a file with one to three faults: bits flipped, bytes set, taken out or put in, an end cut off."""
    data = bytearray(data)
    for _ in range(draws.choice((1, 1, 2, 3))):
        at = draws.randrange(len(data))
        fault = draws.random()
        if fault < 0.6:
            data[at] ^= 1 << draws.randrange(8)
        elif fault < 0.75:
            data[at] = draws.choice((0, 1, 127, 128, 255))
        elif fault < 0.85:
            del data[at : at + draws.randrange(1, 20)]
        elif fault < 0.95:
            data[at:at] = draws.randbytes(draws.randrange(1, 20))
        else:
            del data[at:]
        if not data:
            break
    return bytes(data)


def crc_of(data):
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def expected(data):
    """Returns key and image of each record that is whole, and the reasons of the others, by the format's rules."""
    records, at = [], 0
    while at < len(data):
        if len(data) - at < 12:
            return [*records, "shard_truncated"]
        size, crc = struct.unpack_from("<QI", data, at)
        if crc_of(data[at : at + 8]) != crc:
            return [*records, "shard_corrupt"]
        if at + 12 + size + 4 > len(data):
            return [*records, "shard_truncated"]
        content = data[at + 12 : at + 12 + size]
        (crc,) = struct.unpack_from("<I", data, at + 12 + size)
        records.append(_expected_record(content) if crc_of(content) == crc else "record_corrupt")
        at += 16 + size
    return records


def _expected_record(content):
    try:
        feature = example_pb2.Example.FromString(content).features.feature
    except DecodeError:
        return "record_corrupt"
    return feature["key"].bytes_list.value[0].decode(), feature["jpg"].bytes_list.value[0]


def check(tmp_path, seed, count):
    path = tmp_path / "a.tfrecord"
    whole = whole_file(path)
    (shard,) = TfrecordSource((str(path),), str(tmp_path)).shards("", 0)
    draws = random.Random(seed)
    for number in range(count):
        data = mutated(whole, draws)
        path.write_bytes(data)
        records = [
            record.reason if isinstance(record, Reject) else (record.key, record.image)
            for record in shard.records(0)
        ]
        wanted = expected(data)
        if data[:3] == b"\x1f\x8b\x08" or (
            data[:1] == b"\x78" and crc_of(data[:8]) != int.from_bytes(data[8:12], "little")
        ):
            continue  # what seems to be compressed is unpacked first
        assert records == wanted, (seed, number)
        for row, record in enumerate(shard.records(0)):
            assert record.row == row


def test_damage_costs_what_an_independent_reader_loses(tmp_path):
    check(tmp_path, 1, 1500)


@pytest.mark.long
def test_damage_at_length(tmp_path):
    for seed in range(2, 12):
        check(tmp_path, seed, 10_000)
