"""ICC profiles to test with: of three curves and a matrix, of grey, and of a press."""

import struct
from collections.abc import Sequence

from PIL import ImageCms

# Colorants as profiles hold them, adapted to D50 (rows R, G, B of X, Y, Z)
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
DISPLAY_P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
PROPHOTO = ((0.79767, 0.28804, 0.0), (0.13519, 0.71188, 0.0), (0.03134, 0.00009, 0.82491))
SPACES = {"sRGB": SRGB, "Adobe RGB": ADOBE_RGB, "Display P3": DISPLAY_P3, "ProPhoto": PROPHOTO}

SRGB_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def fixed(*values: float) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + fixed(*values)


def gamma_curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def table_curve(steps: Sequence[float]) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(
        f">I{len(steps)}H", len(steps), *(round(65535 * step) for step in steps)
    )


def parametric_curve(kind: int, *values: float) -> bytes:
    return b"para\0\0\0\0" + struct.pack(">HH", kind, 0) + fixed(*values)


SRGB_CURVE = parametric_curve(3, 2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
CURVES = {
    "linear": b"curv\0\0\0\0" + bytes(4),
    "gamma 1.8": gamma_curve(1.8),
    "gamma 2.2": gamma_curve(2.19921875),
    "table of sRGB": table_curve(
        [((i / 1023 + 0.055) / 1.055) ** 2.4 if i > 41 else i / 1023 / 12.92 for i in range(1024)]
    ),
    "table of 3": table_curve([0, 0.2, 1]),
    "parametric 0": parametric_curve(0, 2.2),
    "parametric 1": parametric_curve(1, 2.2, 1.1, -0.1),
    "parametric 2": parametric_curve(2, 2.2, 0.9, 0.05, 0.02),
    "parametric 3": SRGB_CURVE,
    "parametric 4": parametric_curve(4, 2.4, 0.94, 0.05, 0.08, 0.04, 0.004, 0.002),
}


def profile_of(space: bytes, pcs: bytes, kind: bytes, tags: dict[bytes, bytes], version: int = 2) -> bytes:
    """An ICC profile (ICC.1:2022, 7): a header, a table of tags, and the tags."""
    tags = {b"wtpt": xyz(0.9642, 1.0, 0.8249), b"desc": b"desc\0\0\0\0\0\0\0\x02x\0" + bytes(78), **tags}
    offset = 132 + 12 * len(tags)
    table, content = struct.pack(">I", len(tags)), b""
    for name, tag in tags.items():
        padded = tag + bytes(-len(tag) % 4)
        table += struct.pack(">4sII", name, offset + len(content), len(tag))
        content += padded
    header = bytearray(128)
    struct.pack_into(">I4xI", header, 0, 128 + len(table) + len(content), version << 24)
    header[12:24] = kind + space + pcs
    header[36:40] = b"acsp"
    header[68:80] = fixed(0.9642, 1.0, 0.8249)
    return bytes(header) + table + content


def rgb_profile(colorants: Sequence[Sequence[float]], curve: bytes, version: int = 2) -> bytes:
    tags = {bytes([letter]) + b"XYZ": xyz(*values) for letter, values in zip(b"rgb", colorants, strict=True)}
    tags |= {bytes([letter]) + b"TRC": curve for letter in b"rgb"}
    return profile_of(b"RGB ", b"XYZ ", b"mntr", tags, version)


def grey_profile(curve: bytes) -> bytes:
    return profile_of(b"GRAY", b"XYZ ", b"mntr", {b"kTRC": curve})


def cmyk_profile() -> bytes:
    """A press whose only visible ink is black: Lab is a table of two steps an ink (ICC.1:2022, 10.11)."""
    ramp = bytes(range(256))
    corners = b"".join(bytes([0 if corner & 1 else 255, 128, 128]) for corner in range(16))
    identity = fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + ramp * 4 + corners + ramp * 3
    return profile_of(b"CMYK", b"Lab ", b"prtr", {b"A2B0": table})
