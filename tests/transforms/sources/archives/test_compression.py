import bz2
import gzip
import lzma
import os

import pyarrow as pa
import pytest
import zstandard

from diptych.transforms.sources.archives.compression import (
    DECOMPRESSION_ERRORS,
    DECOMPRESSORS,
    compression_of,
)

PACKERS = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstandard.ZstdCompressor(write_checksum=True).compress,
}


def pack_lz4(data):
    return pa.Codec("lz4").compress(data, asbytes=True)


@pytest.mark.parametrize("kind", [*PACKERS, "lz4"])
@pytest.mark.parametrize("data", [b"", b"text", os.urandom(1000)])
def test_packed_files_are_told_by_their_first_bytes(kind, data):
    pack = {**PACKERS, "lz4": pack_lz4}[kind]
    assert compression_of(pack(data)[:10]) == kind
    assert compression_of(data[:10]) is None


@pytest.mark.parametrize("magic", [b"", b"\x1f", b"BZh is how this text begins", b"0" * 10, b"PK\x03\x04"])
def test_other_files_are_not(magic):
    assert compression_of(magic[:10]) is None


@pytest.mark.parametrize("kind", PACKERS)
def test_output_comes_in_pieces_of_the_size_asked_for(kind):
    data = os.urandom(50_000) + bytes(3_000_000) + os.urandom(5)
    stream, packed = DECOMPRESSORS[kind](), PACKERS[kind](data) + b"behind"
    pieces = []
    while not stream.eof:
        assert packed or not stream.needs_input
        piece, packed = (packed[:700], packed[700:]) if stream.needs_input else (b"", packed)
        pieces.append(stream.decompress(piece, 1000))
        assert len(pieces[-1]) <= 1000
    assert b"".join(pieces) == data
    assert stream.unused_data + packed == b"behind"


@pytest.mark.parametrize("kind", PACKERS)
def test_damage_is_one_of_the_errors(kind):
    packed = bytearray(PACKERS[kind](os.urandom(5000)))
    packed[len(packed) // 2 :] = bytes(len(packed))
    stream = DECOMPRESSORS[kind]()
    with pytest.raises(DECOMPRESSION_ERRORS):  # noqa: PT012
        stream.decompress(bytes(packed), 1 << 20)
        while not stream.eof:
            stream.decompress(b"", 1 << 20)


def test_a_window_larger_than_memory_is_refused():
    parameters = zstandard.ZstdCompressionParameters(window_log=30)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    packed = packer.compress(b"text") + packer.flush()
    with pytest.raises(zstandard.ZstdError, match="memory"):
        DECOMPRESSORS["zstd"]().decompress(packed, 100)
