"""JPEG (ITU T.81) to pixels: through libjpeg-turbo, at a reduced scale, and only where it finds no damage."""

import dataclasses
import io
import re
import struct
import threading

import numpy as np
import simplejpeg
from PIL import Image

from diptych.models.errors import one_line
from diptych.transforms.images.raster import BadImage, Limits, Pixels, Raster
from diptych.transforms.images.tiff import exif_orientation

# ITU T.81 marker codes (table B.1): scans, the end, frames that libjpeg-turbo decodes, those without a length
_SOS, _EOI = 0xDA, 0xD9
_FRAMES = frozenset({0xC0, 0xC1, 0xC2, 0xC9, 0xCA})
_PROGRESSIVE = frozenset({0xC2, 0xCA})
# An arithmetic coder leaves zeros at the end out, so that nobody can tell whether blocks are missing
_ARITHMETIC = frozenset({0xC9, 0xCA})
_OTHER_FRAMES = frozenset({0xC3, 0xC5, 0xC6, 0xC7, 0xCB, 0xCD, 0xCE, 0xCF})
# A marker that has a length, or the end; what stands before it, fill bytes among that, is passed over
_SEGMENT = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
_SCAN_OR_END = re.compile(rb"\xff[\xd9\xda]")
_COLOUR_SPACES = {1: "GRAY", 3: "RGB", 4: "CMYK"}
# More passes over the picture than any encoder makes are an attack: each costs time and hardly a byte
_MAX_SCANS = 100
# More segments before the first scan than 256 MB of metadata fill
_MAX_SEGMENTS = 10_000
# Some encoders align the end marker with zeros: fewer than this are no damage
_MAX_PADDING_BYTES = 64

_scratch = threading.local()


def _buffer(num_bytes: int) -> Pixels:
    """Returns this thread's buffer for decoded pixels: fresh memory for each photo costs a fifth of its decoding."""
    buffer: Pixels | None = getattr(_scratch, "pixels", None)
    if buffer is None or buffer.nbytes < num_bytes:
        buffer = np.empty(num_bytes, np.uint8)
        if num_bytes <= 48 << 20:  # a rare giant is not held on to
            _scratch.pixels = buffer
    return buffer


def decode_jpeg(data: bytes | memoryview, limits: Limits, shorter_px: int, longer_px: int) -> Raster:
    """Decodes a JPEG; `diptych.transforms.images.decode.decode` has the arguments.

    Raises:
        BadImage: It is damaged, of a kind that libjpeg-turbo does not know, or out of bounds.
    """
    header = _jpeg_header(data)
    width, height = header.width, header.height
    limits.check(width, height)
    _check_scans(data, header)
    scale = _reduced_scale(min(width, height), max(width, height), shorter_px, longer_px)
    size = -(-height * scale // 8), -(-width * scale // 8)
    try:
        pixels = _decode_scans(data, header, size)
    except ValueError:
        pixels = _decode_odd_scans(bytes(data), header, size)
    orientation = exif_orientation(header.exif)
    if orientation >= 5:
        width, height = height, width
    channels = pixels.shape[2]
    if (
        channels == 4
    ):  # Adobe stores the inks inverted, and all others do as Adobe, with its marker or without
        np.invert(pixels, out=pixels)
    return Raster(pixels[..., 0] if channels == 1 else pixels, width, height, orientation, header.profile)


def _reduced_scale(shorter: int, longer: int, shorter_px: int, longer_px: int) -> int:
    """Returns the smallest scale, in eighths, at which both sides stay long enough.

    Only powers of two: libjpeg-turbo has no SIMD code for the scales between, and those are slower than none.
    """
    if not (shorter_px or longer_px):
        return 8
    return next((s for s in (1, 2, 4) if shorter * s >= 8 * shorter_px and longer * s >= 8 * longer_px), 8)


@dataclasses.dataclass(frozen=True)
class _JpegHeader:
    """What a JPEG says before its first scan (ITU T.81, B.2).

    Attributes:
        frame: Code of the frame's marker.
        width: Width in pixels, before orientation.
        height: Height in pixels, before orientation.
        components: Identifiers of the components.
        sampling: Of each component, 16 times the horizontal plus the vertical factor.
        segments: (marker, start, end) of each segment; the last is the header of the first scan.
        exif: EXIF payload (EXIF 3.0, 4.7.2), or None.
        profile: ICC profile (ICC.1:2022, B.4), or None.
    """

    frame: int
    width: int
    height: int
    components: bytes
    sampling: bytes
    segments: list[tuple[int, int, int]]
    exif: bytes | None
    profile: bytes | None


def _jpeg_header(data: bytes | memoryview) -> _JpegHeader:
    """Reads a JPEG's header as libjpeg does, which passes over what stands between segments."""
    frame, exif = None, None
    segments: list[tuple[int, int, int]] = []
    profile: list[bytes] = []
    position, end, marker = 2, len(data) - 4, 0
    while marker != _SOS and (match := _SEGMENT.search(data, position)) and match.start() <= end:
        position = match.start()
        marker = data[position + 1]
        if marker == _EOI:
            break
        if len(segments) == _MAX_SEGMENTS:
            raise BadImage("corrupt", f"a JPEG of more than {_MAX_SEGMENTS} segments before its first scan")
        start, position = position, position + 2 + (data[position + 2] << 8 | data[position + 3])
        segments.append((marker, start, position))
        if marker == 0xE1 and exif is None and data[start + 4 : start + 10] == b"Exif\0\0":
            exif = bytes(data[start + 4 : position])
        elif marker == 0xE2 and data[start + 4 : start + 16] == b"ICC_PROFILE\0":
            profile.append(bytes(data[start + 16 : position]))
        elif marker in _FRAMES and frame is None and start + 10 <= position <= len(data):
            frame = _jpeg_frame(marker, bytes(data[start + 4 : position]))
        elif marker in _OTHER_FRAMES:
            raise BadImage("unsupported", f"a lossless or hierarchical JPEG (frame marker {marker:#x})")
    if frame is None or marker != _SOS or position > len(data):
        reason = "truncated" if b"\xff\xd9" not in bytes(data[-64:]) else "corrupt"
        raise BadImage(reason, f"a JPEG of {len(data)} bytes with an unreadable header")
    return _JpegHeader(*frame, segments, exif, _joined_profile(profile))


def _joined_profile(parts: list[bytes]) -> bytes | None:
    """Returns an ICC profile from its parts, or None where there is none, or not all of it.

    Args:
        parts: In any order; each begins with its number, from 1, and their count.
    """
    parts = sorted(parts, key=lambda part: part[:1])
    is_whole = [part[:2] for part in parts] == [
        bytes([i, len(parts)]) for i in range(1, min(len(parts), 255) + 1)
    ]
    return b"".join(part[2:] for part in parts) or None if is_whole else None


def _jpeg_frame(marker: int, parameters: bytes) -> tuple[int, int, int, bytes, bytes]:
    """Returns the first fields of `_JpegHeader` from a frame header (ITU T.81, B.2.2)."""
    precision, height, width, count = struct.unpack_from(">BHHB", parameters)
    if precision != 8 or count not in _COLOUR_SPACES:
        raise BadImage("unsupported", f"a JPEG of {count} components of {precision} bits")
    end = 6 + 3 * count
    if len(parameters) < end:
        raise BadImage(
            "corrupt", f"a JPEG of {count} components with a frame header of {len(parameters)} bytes"
        )
    return marker, width, height, parameters[6:end:3], parameters[7:end:3]


def _check_scans(data: bytes | memoryview, header: _JpegHeader) -> None:
    """Raises `BadImage` where a JPEG of several scans lacks some: libjpeg would take zeros for what they say."""
    _, start, end = header.segments[-1]
    is_progressive = header.frame in _PROGRESSIVE
    if not is_progressive and end - start >= 8 + 2 * len(header.components):
        return
    data, num_scans = bytes(data), 0
    missing_bits = {component: np.ones(64, int) for component in header.components}
    for match in _SCAN_OR_END.finditer(data, start):
        start = match.start()
        parameters = data[start + 4 : start + 4 + 12]
        spectrum = 1 + 2 * parameters[0] if parameters else 0
        if data[start + 1] == _EOI or len(parameters) < spectrum + 3:
            break
        first, last, approximation = parameters[spectrum : spectrum + 3] if is_progressive else (0, 63, 0)
        for component in parameters[1:spectrum:2]:
            if component in missing_bits:
                missing_bits[component][first : last + 1] = approximation & 15
        num_scans += 1
        if num_scans > _MAX_SCANS:
            raise BadImage("corrupt", f"{header.width}x{header.height} JPEG of more than {_MAX_SCANS} scans")
    if any(bits.any() for bits in missing_bits.values()):
        raise BadImage("truncated", f"{header.width}x{header.height} JPEG that ends after {num_scans} scans")


def _decode_scans(
    data: bytes | memoryview, header: _JpegHeader, size: tuple[int, int], strict: bool = True
) -> Pixels:
    """Returns (H, W, C), of a size that is a reduced scale of the picture.

    Raises:
        ValueError: libjpeg cannot decode it or, where `strict`, warns of anything.
    """
    (rows, columns), channels = size, len(header.components)
    pixels = simplejpeg.decode_jpeg(
        data,
        _COLOUR_SPACES[channels],
        min_height=rows,
        min_width=columns,
        min_factor=1,
        buffer=_buffer(rows * columns * channels),
        strict=strict,
    )
    return np.asarray(pixels, np.uint8)


def _decode_odd_scans(data: bytes, header: _JpegHeader, size: tuple[int, int]) -> Pixels:
    """Decodes a JPEG that libjpeg warns of, unless it is damaged.

    libjpeg tells its first warning only. So what it would warn of without harm is set right first, a missing end
    marker among that, and what it warns of then is damage, but for a few zeros after the last scan.
    """
    is_cut = b"\xff\xd9" not in data[header.segments[-1][1] :]
    data = _without_oddities(data, header)
    if is_cut and header.frame not in _ARITHMETIC:
        # libjpeg warns of its absence, and then no more of missing blocks; two zeros are padding, one is a byte's
        data = data.rstrip(b"\0\xff" if data.endswith(b"\0\0") else b"\xff") + b"\xff\xd9"
    try:
        return _decode_scans(data, header, size)
    except ValueError as error:
        message = str(error)
    surplus = re.search(r"(\d+) extraneous bytes before marker 0xd9", message)
    if surplus and int(surplus[1]) < _MAX_PADDING_BYTES and bytes(int(surplus[1])) + b"\xff\xd9" in data:
        return _decode_scans(data, header, size, strict=False)
    if "subsampling level" in message and not is_cut:
        return _decode_odd_sampling(data, header, size)
    reason = "truncated" if is_cut or "end of JPEG file" in message else "corrupt"
    raise BadImage(reason, f"{header.width}x{header.height} JPEG: {message}")


def _decode_odd_sampling(data: bytes, header: _JpegHeader, size: tuple[int, int]) -> Pixels:
    """Decodes a JPEG whose components are sampled as TurboJPEG does not know, though libjpeg does: with Pillow.

    Cameras and other writers make few of them, such as CMYK with all inks but the first at half the resolution.
    """
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            image.draft(image.mode, size[::-1])
            pixels = np.array(image)
    except Exception as error:  # of damaged files, nearly anything
        sampling = ", ".join(f"{factors >> 4}x{factors & 15}" for factors in header.sampling)
        raise BadImage(
            "corrupt", f"a JPEG whose components are sampled {sampling}: {one_line(error)}"
        ) from error
    # libjpeg gives the inks as they are stored, Pillow inverts them
    return np.invert(pixels) if len(header.components) == 4 else pixels.reshape(*pixels.shape[:2], -1)


def _without_oddities(data: bytes, header: _JpegHeader) -> bytes:
    """Returns a JPEG without that in its header which libjpeg warns of although no pixel is wrong.

    That is bytes between segments, profiles that lack a part, versions of JFIF and colour transforms of Adobe that do
    not exist, and the parameters of a sequential scan, which mean nothing (ITU T.81, B.2.3) and are anything from
    some cameras.
    """
    parts = [b"\xff\xd8"]
    for marker, start, end in header.segments:
        segment = bytearray(data[start:end])
        if marker == 0xE2 and segment[4:16] == b"ICC_PROFILE\0":
            continue
        if marker == 0xE0 and segment[4:9] == b"JFIF\0" and len(segment) > 10:
            segment[9:11] = b"\1\1"
        elif marker == 0xEE and segment[4:9] == b"Adobe" and len(segment) > 15:
            known = (0, 2) if len(header.components) == 4 else (0, 1)
            segment[15] = segment[15] if segment[15] in known else known[1]
        elif marker == _SOS and header.frame not in _PROGRESSIVE:
            segment[-3:] = b"\0\x3f\0"
        parts.append(bytes(segment))
    return b"".join([*parts, data[header.segments[-1][2] :]])
