"""GIF (89a): what stands before its first frame."""

_EXTENSION, _GRAPHIC_CONTROL = 0x21, 0xF9
# Comments that are longer than this, all together, cost Pillow a time that grows with their square
_MAX_EXTENSION_BYTES = 1 << 16


def without_long_extensions(data: bytes) -> bytes:
    """Leaves out of a GIF the comments and application data before its first frame, from where they become long."""
    flags = data[10] if len(data) > 10 else 0
    position = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    kept, kept_from, num_bytes = [], 0, 0
    while position + 2 < len(data) and data[position] == _EXTENSION:
        end = position + 2
        while end < len(data) and data[end]:
            end += 1 + data[end]
        end = min(end + 1, len(data))
        if data[position + 1] != _GRAPHIC_CONTROL:
            num_bytes += end - position
            if num_bytes > _MAX_EXTENSION_BYTES:
                kept.append(data[kept_from:position])
                kept_from = end
        position = end
    return b"".join([*kept, data[kept_from:]]) if kept else data
