"""One picture of 16 x 16 in every mode and format that is read, each with the pixels that it must give."""

import io
import struct
import zlib

import numpy as np
import PIL
from packaging.version import Version
from PIL import Image

READS_YCBCR = Version(PIL.__version__) >= Version("13")  # older Pillow calls its own uncompressed TIFF truncated
SIDE = 16
GREY = np.arange(256).reshape(SIDE, SIDE)  # every level once
RGB = np.stack([GREY, GREY.T, 255 - GREY], -1)
ALPHA = np.where(GREY < 32, 0, np.where(GREY < 64, 255, GREY[::-1]))
BIT = GREY % 3 == 0
INDEX = GREY % 7
PALETTE = np.array([[0, 0, 0], [255, 255, 255], [200, 10, 10], [9, 99, 199], [1, 2, 3], [250, 128, 0], [77, 77, 77]])
LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True, "exact": True}, "TIFF": {}, "BMP": {}, "GIF": {}}


def grey(levels):
    return np.repeat(np.asarray(levels)[..., None], 3, -1)


def on_white(rgb, alpha):
    alpha = np.asarray(alpha)[..., None] / 255
    return rgb * alpha + 255 * (1 - alpha)


def saved(pixels, kind, mode=None, **options):
    """An array, or a PIL image, as a file."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    if mode:
        image = image.convert(mode)
    out = io.BytesIO()
    image.save(out, kind, **LOSSLESS.get(kind, {}) | options)
    return out.getvalue()


def png(depth, colour, values, *chunks):
    """What Pillow does not write: `values` (16, 16) or (16, 16, channels) of `depth` bits a channel."""
    rows = np.asarray(values).reshape(SIDE, -1)
    bits = (rows[..., None] >> np.arange(depth - 1, -1, -1)) & 1
    packed = np.packbits(bits.reshape(SIDE, -1).astype(np.uint8), axis=1)
    data = zlib.compress(np.concatenate([np.zeros((SIDE, 1), np.uint8), packed], 1).tobytes())
    header = struct.pack(">IIBBBBB", SIDE, SIDE, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b"")]
    crc = lambda name, body: struct.pack(">I", zlib.crc32(name + body))  # noqa: E731
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(b)) + n + b + crc(n, b) for n, b in parts)


def tiff(values, bits, sample_format=1, photometric=1, order="<"):
    """An uncompressed grey TIFF of one strip."""
    data = values.tobytes()
    at = 8 + 2 + 10 * 12 + 4
    tags = [(256, SIDE), (257, SIDE), (258, bits), (259, 1), (262, photometric), (273, at), (277, 1), (278, SIDE)]
    tags += [(279, len(data)), (339, sample_format)]
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags)
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HI", 42, 8) + struct.pack(order + "H", len(tags))
    return head + entries + bytes(4) + data


def palette(transparency=None, kind="PNG"):
    image = Image.fromarray(INDEX.astype(np.uint8))
    image.putpalette(PALETTE.astype(np.uint8).tobytes())
    return saved(image, kind, **({} if transparency is None else {"transparency": transparency}))


def several(kind, **options):
    frames = [Image.fromarray(RGB.astype(np.uint8)), Image.fromarray((255 - RGB).astype(np.uint8))]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)


def turned(kind, pixels=RGB, **options):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees
    return saved(pixels.astype(np.uint8), kind, exif=exif, **options)


def _packed12(values):
    first, second = values.reshape(-1, 2).T
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1).astype(np.uint8)


def kinds() -> dict[str, tuple[bytes, np.ndarray]]:
    """name -> (the file, float pixels (16, 16, 3)). A name's first word is the format."""
    g8, rgb8, rgba8 = (x.astype(np.uint8) for x in (GREY, RGB, np.concatenate([RGB, ALPHA[..., None]], -1)))
    la8 = np.stack([g8, rgba8[..., 3]], -1)
    g16 = GREY * 256 + GREY[::-1]  # the lower 8 bits say nothing
    rgb16 = RGB * 256 + RGB[::-1]
    flat = np.full((SIDE, SIDE), 200)
    clear = np.where(INDEX == 3, 0, 255)
    made = {}
    for kind in LOSSLESS:
        made[f"{kind} L"] = saved(g8, kind), grey(GREY)
        made[f"{kind} 1"] = saved(BIT, kind, None if kind != "WEBP" else "RGB"), grey(255 * BIT)
        if kind != "GIF":
            made[f"{kind} RGB"] = saved(rgb8, kind), RGB
        if kind != "WEBP":
            made[f"{kind} P"] = palette(kind=kind), PALETTE[INDEX]
        if kind not in ("BMP", "GIF"):
            made[f"{kind} RGBA"] = saved(rgba8, kind), on_white(RGB, ALPHA)
            made[f"{kind} LA"] = saved(Image.fromarray(la8), kind), on_white(grey(GREY), ALPHA)
    for kind in ("PNG", "GIF"):
        made[f"{kind} P, a clear entry"] = palette(3, kind), on_white(PALETTE[INDEX], clear)
    some = bytes([255, 0, 128, 255, 64])
    made["PNG P, alpha of entries"] = palette(some), on_white(PALETTE[INDEX], np.array([*some, 255, 255])[INDEX])
    colour = lambda *levels: (b"tRNS", struct.pack(f">{len(levels)}H", *levels))  # noqa: E731
    for depth in (1, 2, 4, 8):
        values, top = GREY % 2**depth, 2**depth - 1
        made[f"PNG grey of {depth} bits"] = png(depth, 0, values), grey(values * (255 // top))
        made[f"PNG grey of {depth} bits, a clear level"] = (
            png(depth, 0, values, colour(1)),
            on_white(grey(values * (255 // top)), np.where(values == 1, 0, 255)),
        )
    made["PNG grey of 16 bits"] = png(16, 0, g16), grey(GREY)
    made["PNG grey of 16 bits, a clear level"] = (
        png(16, 0, g16, colour(int(g16[3, 4]))),
        on_white(grey(GREY), np.where(g16 == g16[3, 4], 0, 255)),
    )
    made["PNG LA of 16 bits"] = png(16, 4, np.stack([g16, ALPHA * 257], -1)), on_white(grey(GREY), ALPHA)
    made["PNG RGB of 16 bits"] = png(16, 2, rgb16), RGB
    made["PNG RGBA of 16 bits"] = png(16, 6, np.concatenate([rgb16, ALPHA[..., None] * 257], -1)), on_white(RGB, ALPHA)
    chosen = on_white(RGB, np.where((RGB == RGB[2, 9]).all(-1), 0, 255))
    made["PNG RGB, a clear colour"] = png(8, 2, RGB, colour(*map(int, RGB[2, 9]))), chosen
    deep = (int(level) * 257 for level in RGB[2, 9])
    made["PNG RGB of 16 bits, a clear colour"] = png(16, 2, RGB * 257, colour(*deep)), chosen
    long = (b"tEXt", b"Comment\0" + b"x" * 9000)  # the transparent colour comes late
    made["PNG RGB, a clear colour after a long text"] = png(8, 2, RGB, long, colour(*map(int, RGB[2, 9]))), chosen
    for order, name in (("<", "I;16"), (">", "I;16B")):
        deep = g16.astype(order + "u2")
        made[f"TIFF {name}"] = tiff(deep, 16, order=order), grey(GREY)
    made["TIFF I;16, 0 is white"] = tiff(g16.astype("<u2"), 16, photometric=0), grey(255 - GREY)
    made["TIFF of 12 bits"] = tiff(_packed12(g16 >> 4), 12), grey(GREY)
    made["TIFF L, 0 is white"] = tiff(g8, 8, photometric=0), grey(255 - GREY)
    made["TIFF of signed 16 bits"] = tiff((g16 - 2**15).astype("<i2"), 16, 2), grey(np.maximum(g16 - 2**15, 0) >> 8)
    made["TIFF I, values of 16 bits"] = tiff(g16.astype("<i4"), 32, 2), grey(GREY)
    made["TIFF I"] = tiff((g16.astype("<i8") * 32768).astype("<i4"), 32, 2), grey(GREY >> 1)
    made["TIFF of unsigned 32 bits"] = tiff((g16.astype("<u4") << 16), 32), grey(GREY)
    made["TIFF F, 0 to 1"] = tiff((GREY / 255).astype("<f4"), 32, 3), grey(GREY)
    over = np.minimum(GREY * 1.1, 255)
    made["TIFF F, 0 to 1, a little over"] = tiff((GREY / 255 * 1.1).astype("<f4"), 32, 3), grey(over)
    made["TIFF F, 0 to 255"] = tiff(GREY.astype("<f4"), 32, 3), grey(GREY)
    made["TIFF F, 0 to 1, 0 is white"] = tiff((GREY / 255).astype("<f4"), 32, 3, 0), grey(255 - GREY)
    odd, expected = (GREY / 255).astype("<f4"), GREY.copy()
    odd[0, :4], expected[0, :4] = (np.nan, np.inf, -np.inf, -3), (0, 255, 0, 0)
    made["TIFF F with NaN and infinity"] = tiff(odd, 32, 3), grey(expected)
    # Red, green and blue by ITU-R 601, which JPEG uses; L* = 53.585 is the grey of 128 / 255 in sRGB.
    cmyk = np.concatenate([rgb8, g8[..., None]], -1)
    made["TIFF CMYK"] = (
        saved(Image.frombytes("CMYK", (SIDE, SIDE), cmyk.tobytes()), "TIFF"),
        ((255 - RGB) * (255 - GREY[..., None]) / 255),
    )
    ycc = np.stack([flat, np.full_like(flat, 100), np.full_like(flat, 150)], -1).astype(np.uint8)
    if READS_YCBCR:
        made["TIFF YCbCr"] = (
            saved(Image.frombytes("YCbCr", (SIDE, SIDE), ycc.tobytes()), "TIFF"),
            np.broadcast_to([200 + 1.402 * 22, 200 + 0.344136 * 28 - 0.714136 * 22, 200 - 1.772 * 28], (SIDE, SIDE, 3)),
        )
    lab = np.stack([np.full_like(flat, round(53.585 * 2.55)), flat * 0, flat * 0], -1).astype(np.uint8)
    made["TIFF LAB"] = saved(Image.frombytes("LAB", (SIDE, SIDE), lab.tobytes()), "TIFF"), np.full(RGB.shape, 128)
    made["WEBP several, the first"] = several("WEBP"), RGB
    made["TIFF several, the first"] = several("TIFF"), RGB
    made["PNG several, the first"] = several("PNG"), RGB
    first = Image.fromarray(INDEX.astype(np.uint8))
    first.putpalette(PALETTE.astype(np.uint8).tobytes())
    second = first.point(lambda i: (i + 1) % 7)
    made["GIF several, the first"] = saved(first, "GIF", save_all=True, append_images=[second]), PALETTE[INDEX]
    for kind in ("PNG", "WEBP"):
        made[f"{kind} to be turned"] = turned(kind), RGB
    made["TIFF to be turned, which Pillow does"] = turned("TIFF"), np.rot90(RGB, -1)
    # Smooth, so that JPEG changes little.
    level = 60 + GREY // SIDE * 8
    made["JPEG L"] = saved(level.astype(np.uint8), "JPEG", quality=100), grey(level)
    made["JPEG RGB"] = saved(grey(level).astype(np.uint8), "JPEG", quality=100), grey(level)
    made["JPEG to be turned"] = turned("JPEG", grey(level), quality=100), grey(level)
    inks = np.stack([level, level, level, level * 0], -1).astype(np.uint8)
    inks = Image.frombytes("CMYK", (SIDE, SIDE), inks.tobytes())
    made["JPEG CMYK"] = saved(inks, "JPEG", quality=100), grey(255 - level)
    first, others = Image.fromarray(grey(level).astype(np.uint8)), [Image.new("RGB", (SIDE, SIDE))]
    made["JPEG several, the first"] = saved(first, "MPO", quality=100, save_all=True, append_images=others), grey(level)
    return made


def modes() -> dict[str, tuple[Image.Image, np.ndarray]]:
    """Pillow's modes, as a program makes them: mode -> (image, float pixels (16, 16, 3))."""
    made = lambda mode, *bands: Image.frombytes(  # noqa: E731
        mode, (SIDE, SIDE), np.stack(bands, -1).astype(np.uint8).tobytes()
    )
    alpha, deep = ALPHA, GREY * 256 + GREY[::-1]
    colours = Image.fromarray(INDEX.astype(np.uint8))
    colours.putpalette(PALETTE.astype(np.uint8).tobytes())
    with_alpha = colours.convert("PA")
    with_alpha.putalpha(Image.fromarray(alpha.astype(np.uint8)))
    premultiplied = np.rint(RGB * alpha[..., None] / 255)
    inks = (255 - RGB) * (255 - GREY[..., None]) / 255
    turned = np.stack([GREY * 0, GREY, GREY * 0 + 240], -1)  # a hue of 0: red
    all_modes = {
        "1": (Image.fromarray(BIT), grey(255 * BIT)),
        "L": (made("L", GREY), grey(GREY)),
        "P": (colours, PALETTE[INDEX]),
        "PA": (with_alpha, on_white(PALETTE[INDEX], alpha)),
        "LA": (made("LA", GREY, alpha), on_white(grey(GREY), alpha)),
        "La": (made("LA", GREY, alpha).convert("La"), on_white(grey(GREY), alpha)),
        "RGB": (made("RGB", *RGB.T.swapaxes(1, 2)), RGB),
        "RGBX": (made("RGBX", *RGB.T.swapaxes(1, 2), GREY), RGB),
        "RGBA": (made("RGBA", *RGB.T.swapaxes(1, 2), alpha), on_white(RGB, alpha)),
        "RGBa": (made("RGBa", *premultiplied.T.swapaxes(1, 2), alpha), premultiplied + 255 - alpha[..., None]),
        "CMYK": (made("CMYK", *RGB.T.swapaxes(1, 2), GREY), inks),
        "YCbCr": (made("YCbCr", GREY, GREY * 0 + 128, GREY * 0 + 128), grey(GREY)),
        "HSV": (made("HSV", *turned.T.swapaxes(1, 2)), 240 - np.stack([0 * GREY, GREY, GREY], -1) / 255 * 240),
        "LAB": (made("LAB", GREY * 0 + round(53.585 * 2.55), GREY * 0, GREY * 0), np.full(RGB.shape, 128)),
        "I": (Image.fromarray(deep.astype(np.int32)), grey(GREY)),
        "F": (Image.fromarray((GREY / 255).astype(np.float32)), grey(GREY)),
    }
    for mode, order in (("I;16", "<"), ("I;16L", "<"), ("I;16B", ">"), ("I;16N", "=")):
        all_modes[mode] = Image.frombytes(mode, (SIDE, SIDE), deep.astype(order + "u2").tobytes()), grey(GREY)
    return all_modes


def others() -> dict[str, bytes]:
    """What Pillow opens, or might, and the project does not."""
    image = Image.fromarray(RGB.astype(np.uint8))
    kinds = ("EPS", "PPM", "TGA", "PCX", "ICO", "PDF", "SGI", "DDS", "JPEG2000", "AVIF")
    ready = [kind for kind in kinds if Image.init() is None or kind in Image.SAVE]
    return {kind: saved(image, kind) for kind in ready}
