"""Small inputs that people have and readers get wrong; tests/input_pipeline/test_cases.py says what each gives."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def picture(number, side=32):
    """A picture of one colour with a bar, so that each can be told from the others."""
    pixels = np.full((side, side, 3), [number * 37 % 256, number * 91 % 256, number * 13 % 256], np.uint8)
    pixels[number % side] = 255
    return Image.fromarray(pixels)


def jpeg(number):
    """The bytes of `picture` as a JPEG."""
    out = io.BytesIO()
    picture(number).save(out, "JPEG", quality=95)
    return out.getvalue()


def tar(path: Path, members):
    """Writes (name, bytes or str) in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members:
            data = data.encode() if isinstance(data, str) else data
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def images(folder: Path, count=60):
    """Writes `count` pictures below a folder; returns their paths in it."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / "images" / f"{i:04d}.jpg").write_bytes(jpeg(i))
    return [f"images/{i:04d}.jpg" for i in range(count)]


def tables(folder: Path):
    """Tables of 60 images."""
    rows = images(folder)
    plain = [f"{path},a thing number {i}" for i, path in enumerate(rows)]

    def write(name, lines, encoding="utf-8", end="\n"):
        (folder / name).write_bytes(end.join([*lines, ""]).encode(encoding))

    write("bom_crlf.csv", ["\ufeffimage,caption", *plain], end="\r\n")
    write("blank_in_header.csv", ["image, caption", *plain])
    write("semicolon.csv", ["image;caption", *(line.replace(",", ";", 1) for line in plain)])
    write("latin1.csv", ["image,caption", *(f"{p},une fen\xeatre n\xb0 {i}" for i, p in enumerate(rows))], "latin-1")
    write("gb18030.csv", ["image,caption", *(f"{p},\u4e00\u53ea\u732b {i}" for i, p in enumerate(rows))], "gb18030")
    write("utf16.csv", ["image,caption", *plain], "utf-16")
    bad = "\n".join(["image,caption", *plain, ""]).encode().replace(b"number 41", b"number \xff41")
    (folder / "one_bad_byte.csv").write_bytes(bad)
    tabs = [line.replace(",", "\t", 1) for line in plain]
    tabs[7], tabs[33] = f'{rows[7]}\t"we are open', f'{rows[33]}\tthe "end" of the road'
    write("stray_quotes.tsv", ["image\tcaption", *tabs])
    ragged = [f"{p},a red, round thing {i}" if i % 3 == 0 else f"{p},a thing {i}" for i, p in enumerate(rows)]
    write("unquoted_commas.csv", ["image,caption", *ragged])
    write("one_field_more.csv", ["image,caption", *(f"{line}," for line in plain)])
    last = "".join(f'{p},"a thing {i}\n"\n' for i, p in enumerate(rows))
    (folder / "newline_last.csv").write_text("image,caption\n" + last)
    write("metadata.jsonl", [json.dumps({"file_name": p, "text": f"a thing {i}"}) for i, p in enumerate(rows)])
    write("five.csv", ["image,caption", *plain[:5]])
    write(
        "labels_by_name.csv", ["image,group", *(f"{p},{['flag', 'food', 'face'][i % 3]}" for i, p in enumerate(rows))]
    )
    write("labels_from_1.csv", ["image,label", *(f"{p},{i % 9 + 1}" for i, p in enumerate(rows))])
    (folder / "ten_classes.json").write_text(json.dumps([f"class {i}" for i in range(10)]))


def tars(folder: Path):
    """Tars of 40 pictures."""

    def pair(key, i):
        return [(f"{key}.jpg", jpeg(i)), (f"{key}.txt", f"a thing number {i}")]

    def write(name, samples):
        tar(folder / name, [member for sample in samples for member in sample])

    write("some_dots.tar", [pair(f"{i:05d} v2.0" if i % 4 == 0 else f"{i:05d}", i) for i in range(40)])
    write("all_dots.tar", [pair(f"shot.{i:05d}.final", i) for i in range(40)])
    write("doubled.tar", [pair(f"{i // 2:05d}", i) for i in range(40)])
    two = [(f"{i:05d}", i) for i in range(20)]
    write("two_pictures_one_text.tar", [[(f"{key}.jpg", jpeg(i)), *pair(key, i + 20)] for key, i in two])
    write("not_adjacent.tar", zip(*(pair(f"{i:05d}", i) for i in range(40)), strict=True))
    about = [json.dumps({"caption": f"a thing {i}", "width": 32}) for i in range(40)]
    write("caption_in_json.tar", [[(f"{i:05d}.jpg", jpeg(i)), (f"{i:05d}.json", about[i])] for i in range(40)])
    lines = [f"a thing {i}\nthing number {i}\none thing" for i in range(40)]
    write("three_lines.tar", [[(f"{i:05d}.jpg", jpeg(i)), (f"{i:05d}.txt", lines[i])] for i in range(40)])


def folders(root: Path):
    """numbered, with_leftovers and imagenet/val: folders of classes."""

    def write(path, number, kind):
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path, kind)

    for name in range(1, 11):
        for i, kind in enumerate(("png", "png", "tif")):
            write(root / "numbered" / str(name) / f"{i}.{kind}", name * 10 + i, "TIFF" if kind == "tif" else "PNG")
    for name in ("cat", "dog", ".ipynb_checkpoints", "__MACOSX"):
        write(root / "with_leftovers" / name / "0.png", len(name), "PNG")
    for name in ("n01440764", "n01443537", "n15075141"):
        for i in range(2):
            write(root / "imagenet" / "val" / name / f"ILSVRC2012_val_{i:08d}.JPEG", i, "JPEG")
