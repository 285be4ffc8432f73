"""PNG (ISO/IEC 15948): of its chunks only those that make the picture are decoded."""

import struct
import zlib
from typing import NamedTuple

from diptych.transforms.images.raster import MAX_PROFILE_BYTES, BadImage

_SIGNATURE_BYTES = 8
# An orientation may stand in these texts: Adobe's XMP, and the EXIF of ImageMagick before PNG had a chunk for it
_MAX_TEXT_BYTES = {b"XML:com.adobe.xmp": 1 << 19, b"Raw profile type exif": 1 << 17}
# By type of colour: grey, RGB, palette (11.3.1.1)
_TRANSPARENCY_BYTES = {0: (2,), 2: (6,), 3: range(1, 257)}
_MAX_EXIF_BYTES = 1 << 20
# Writers fill at least a kilobyte before they begin another
_MAX_CHUNKS = 200_000


class PngParts(NamedTuple):
    """A PNG without what costs and does not show.

    Attributes:
        data: The PNG, of which only chunks are left that make the picture or turn it.
        profile: Its ICC profile, or None.
    """

    data: bytes
    profile: bytes | None


def essential_parts(data: bytes) -> PngParts:
    """Leaves out of a PNG its texts, later frames, and ancillary chunks that are damaged, as libpng does.

    Raises:
        BadImage: The checksum of a critical chunk is wrong: Pillow does not look at those of the pixels.
    """
    view, position = memoryview(data), _SIGNATURE_BYTES
    kept, profile, is_whole = [view[:position]], None, True
    seen: set[bytes] = set()
    num_chunks = 0
    while position + 12 <= len(data):
        num_chunks += 1
        if num_chunks > _MAX_CHUNKS:
            raise BadImage("corrupt", f"PNG of more than {_MAX_CHUNKS} chunks")
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data) and kind[:1].islower():  # what is left of a text, say
            position, is_whole = len(data), False
        if end > len(data) or kind == b"IEND":
            break
        is_critical, is_sound = kind[:1].isupper(), True
        if is_critical or kind in (b"tRNS", b"iCCP", b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
            is_sound = zlib.crc32(view[position + 4 : end - 4]) == int.from_bytes(view[end - 4 : end], "big")
        if is_critical and not is_sound:
            raise BadImage("corrupt", f"PNG: the checksum of a chunk {kind!r} is wrong")
        if kind == b"CgBI":
            raise BadImage(
                "unsupported", "a PNG in Apple's own form (CgBI): convert it with pngcrush -revert-iphone"
            )
        content = view[position + 8 : end - 4]
        if kind == b"iCCP" and is_sound and profile is None:
            profile = _profile(bytes(content))
        if is_critical or (is_sound and kind not in seen and _shows(kind, content, data[25])):
            kept.append(view[position:end])
        else:
            is_whole = False
        if not is_critical and is_sound and kind in (b"tRNS", b"eXIf"):
            seen.add(kind)
        position = end
    return PngParts(data if is_whole else b"".join([*kept, view[position:]]), profile)


def _shows(kind: bytes, content: memoryview, colour_type: int) -> bool:
    """Tells whether an ancillary chunk changes what is decoded."""
    if kind == b"tRNS":
        return len(content) in _TRANSPARENCY_BYTES.get(colour_type, ())
    if kind == b"eXIf":
        return len(content) <= _MAX_EXIF_BYTES
    if kind not in (b"tEXt", b"zTXt", b"iTXt"):
        return False
    keyword = bytes(content[:80]).partition(b"\0")[0]
    max_bytes = _MAX_TEXT_BYTES.get(keyword, 0)
    if len(content) > max_bytes:
        return False
    rest = bytes(content[len(keyword) + 1 :])
    packed = rest[1:] if kind == b"zTXt" else rest[2:].split(b"\0", 2)[-1] if rest[:1] == b"\1" else b""
    return not packed or _inflate(packed, max_bytes) is not None


def _profile(content: bytes) -> bytes | None:
    """Returns the ICC profile of a chunk iCCP (11.3.2.3), or None where it is damaged or too large to be one."""
    _, _, rest = content.partition(b"\0")
    return _inflate(rest[1:], MAX_PROFILE_BYTES) if rest[:1] == b"\0" else None


def _inflate(packed: bytes, max_bytes: int) -> bytes | None:
    """Returns a zlib stream unpacked, or None where it is damaged or longer than allowed."""
    stream = zlib.decompressobj()
    try:
        content = stream.decompress(packed, max_bytes)
    except zlib.error:
        return None
    return content if stream.eof or not stream.unconsumed_tail else None
