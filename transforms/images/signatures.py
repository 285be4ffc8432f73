"""Formats of images, detected from their first bytes, never from the file name."""

import re

from diptych.transforms.images.raster import BadImage

# What Pillow may open: other formats have no signature (TGA), run programs (EPS) or hide another size inside (ICO)
_READ = {
    "PNG": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "WEBP": re.compile(rb"RIFF....WEBP", re.DOTALL),
    "GIF": re.compile(rb"GIF8[79]a"),
    "BMP": re.compile(rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", re.DOTALL),
    "TIFF": re.compile(rb"II[*+]\0(?!\x10\0\0\0CR)|MM\0[*+]"),
    "JPEG2000": re.compile(rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51"),
}
_CONVERT = "convert it to JPEG or PNG first"
_RAW = "a camera's raw photo ({}): develop it to JPEG first"
# Images of kinds that are not read
_UNSUPPORTED = {
    f"a JPEG XL image: {_CONVERT}": re.compile(rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n"),
    f"a JPEG XR image: {_CONVERT}": re.compile(rb"II\xbc\x01"),
    f"a Photoshop document (PSD): {_CONVERT}": re.compile(rb"8BPS\0[\1\2]"),
    f"a GIMP image (XCF): {_CONVERT}": re.compile(rb"gimp xcf"),
    f"a PDF document: {_CONVERT}": re.compile(rb"%PDF-"),
    f"PostScript (EPS): {_CONVERT}": re.compile(rb"%!PS|\xc5\xd0\xd3\xc6"),
    f"a Windows metafile (WMF, EMF): {_CONVERT}": re.compile(
        rb"\xd7\xcd\xc6\x9a|\x01\0\0\0.{36} EMF", re.DOTALL
    ),
    f"an icon (ICO, CUR, ICNS): {_CONVERT}": re.compile(rb"\0\0[\1\2]\0[\1-\x40]\0.{3}\0|icns", re.DOTALL),
    f"a Netpbm image (PBM, PGM, PPM, PAM): {_CONVERT}": re.compile(rb"P[1-7Ff][\r\n\t ]+[#0-9W]"),
    f"a DirectDraw surface (DDS): {_CONVERT}": re.compile(rb"DDS \x7c\0\0\0"),
    f"an OpenEXR image: {_CONVERT}": re.compile(rb"v/1\x01"),
    f"a Radiance image (HDR): {_CONVERT}": re.compile(rb"#\?R(?:ADIANCE|GBE)"),
    f"a FITS image: {_CONVERT}": re.compile(rb"SIMPLE  = "),
    f"a QOI image: {_CONVERT}": re.compile(rb"qoif"),
    f"a BPG image: {_CONVERT}": re.compile(rb"BPG\xfb"),
    f"a FLIF image: {_CONVERT}": re.compile(rb"FLIF[1-f]"),
    f"a DjVu document: {_CONVERT}": re.compile(rb"AT&TFORM"),
    f"a DICOM image: {_CONVERT}": re.compile(rb".{128}DICM", re.DOTALL),
    f"an SGI image: {_CONVERT}": re.compile(rb"\x01\xda[\0\1][\1\2]\0[\1-\3]"),
    f"a Sun raster image: {_CONVERT}": re.compile(rb"\x59\xa6\x6a\x95"),
    f"a PCX image: {_CONVERT}": re.compile(rb"\x0a[\0\2-\5]\x01[\1\2\4\x08].{60}\0[\1-\4]", re.DOTALL),
    _RAW.format("Canon"): re.compile(rb"II\*\0\x10\0\0\0CR|II\x1a\0\0\0HEAPCCDR|....ftypcrx ", re.DOTALL),
    _RAW.format("Fujifilm"): re.compile(rb"FUJIFILMCCD-RAW"),
    _RAW.format("Olympus"): re.compile(rb"IIR[OS]|MMOR"),
    _RAW.format("Panasonic"): re.compile(rb"IIU\0"),
    _RAW.format("Sigma"): re.compile(rb"FOVb"),
    _RAW.format("Minolta"): re.compile(rb"\0MRM"),
}
# What is met in the place of an image
_NO_IMAGES = {
    "a Git LFS pointer: fetch the file itself (git lfs pull)": re.compile(rb"version https://git-lfs"),
    "a Xet pointer: fetch the file itself (git xet checkout)": re.compile(rb"# xet version"),
    "a video (MP4, QuickTime)": re.compile(rb"....(?:ftyp|moov|mdat)", re.DOTALL),
    "a video (WebM, Matroska)": re.compile(rb"\x1a\x45\xdf\xa3"),
    "a video (AVI)": re.compile(rb"RIFF....AVI ", re.DOTALL),
    "sound (WAV, Ogg, FLAC, MP3)": re.compile(rb"RIFF....WAVE|OggS|fLaC|ID3[\2-\4]", re.DOTALL),
    "a ZIP archive or a document": re.compile(rb"PK[\3\5][\4\6]"),
    "a packed file (gzip, bzip2, xz, zstd, 7z, RAR): unpack it": re.compile(
        rb"\x1f\x8b\x08|BZh[1-9]|\xfd7zXZ\0|\x28\xb5\x2f\xfd|7z\xbc\xaf\x27\x1c|Rar!\x1a\x07"
    ),
    "a Parquet file": re.compile(rb"PAR1"),
    "a NumPy array": re.compile(rb"\x93NUMPY"),
    "a pickle": re.compile(rb"\x80[\2-\5][\x95cK}\](]"),
}
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
_AVIF_BRANDS = {b"avif", b"avis"}
_CONTAINER_BRANDS = {b"mif1", b"msf1", b"miaf"}


def image_format(data: bytes) -> str:
    """Returns the name of an image's format, as Pillow calls it.

    Raises:
        BadImage: It is of a format that is not read, or no image.
    """
    for name, signature in _READ.items():
        if signature.match(data):
            return name
    if data[4:8] == b"ftyp" and (name := _heif_format(data)):
        return name
    for description, signature in _UNSUPPORTED.items():
        if signature.match(data):
            raise BadImage("unsupported", description)
    raise _no_image(data)


def _heif_format(data: bytes) -> str:
    """Returns the format of a file of boxes (ISO/IEC 23008-12, 10.2), empty where it is no image."""
    major, end = data[8:12], min(int.from_bytes(data[:4], "big"), 256)
    brands = {major, *(data[start : start + 4] for start in range(16, end, 4))}
    if major in _AVIF_BRANDS:
        return "AVIF"
    if major in _HEIF_BRANDS:
        return "HEIF"
    if brands & _CONTAINER_BRANDS:
        return "AVIF" if brands & _AVIF_BRANDS else "HEIF"
    return ""


def _no_image(data: bytes) -> BadImage:
    for description, signature in _NO_IMAGES.items():
        if signature.match(data):
            return BadImage("not_an_image", f"{len(data)} bytes: {description}")
    head = data[:1024].lstrip(b"\xef\xbb\xbf\r\n\t ").lower()
    if head.startswith((b"<svg", b"<?xml", b"<!doctype svg", b"<!--")) and b"<svg" in head:
        return BadImage("unsupported", f"an SVG drawing: {_CONVERT}")
    if head.startswith((b"<!doctype html", b"<html", b"<?xml", b"<!--")):
        return BadImage("not_an_image", f"{len(data)} bytes: HTML or XML")
    return BadImage(
        "not_an_image", f"{len(data)} bytes: no known image signature, it begins with {data[:16]!r}"
    )
