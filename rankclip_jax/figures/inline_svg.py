"""A figure as SVG that stands inside a page of HTML, among others, in the page's font and ink."""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree

from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from rankclip_jax.figures.words import any_script, printable

PHOTOGRAPH = "photograph"  # gid of a picture with many colours, which is kept as a JPEG
_DPI = 144  # of pictures inside
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def svg(figure: Figure, name: str, labels: Mapping[str, Sequence[str]] | None = None) -> str:
    """The figure as an <svg class="drawing"> as wide as the page wants it; a point of the figure is a pixel of --width.

    The same figure gives the same text. What is black in the figure is `currentColor`; text stays text.

    Args:
      name: another for each figure of a page; ids are derived from it.
      labels: gid of a group of markers -> what pointing at each of them shows.
    """
    out = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": ascii(name)}), any_script():
        figure.savefig(out, format="svg", transparent=True, dpi=_DPI, metadata=_NO_METADATA)
    text = out.getvalue()
    root = ElementTree.fromstring(text[text.index("<svg") :])
    for group, words in (labels or {}).items():
        markers = root.iterfind(f".//*[@id='{group}']//{{*}}use")
        for marker, label in zip(markers, words, strict=True):
            ElementTree.SubElement(marker, "title").text = printable(label)
    for parent in root.iter():
        for child in [child for child in parent if child.find("{*}style") is not None]:
            parent.remove(child)  # matplotlib's rule for *, which would hold for the whole page
    referred = {name for element in root.iter() for name in re.findall(r"#([\w-]+)", " ".join(element.attrib.values()))}
    for element in root.iter():
        _rewrite(element, referred)
    box = root.attrib["viewBox"]
    root.attrib = {"class": "drawing", "viewBox": box, "style": f"--width:{box.split()[2]}px"}
    return ElementTree.tostring(root, encoding="unicode")


def _rewrite(element: ElementTree.Element, referred: set[str]) -> None:
    """Shortens an element in place, and gives it the page's font and ink."""
    element.tag = element.tag.partition("}")[2] or element.tag
    element.tail = None
    if element.tag not in ("text", "title"):
        element.text = None
    given, element.attrib = element.attrib, {}
    for key, value in given.items():
        key = key.partition("}")[2] or key  # xlink:href; HTML knows no namespaces
        if key == "id" and value not in referred:
            continue  # those of groups come again in every figure
        if key == "d":
            value = re.sub(r"\s+", " ", re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.2f}", value)).strip()
        if key == "style":
            rules = (rule for rule in value.split("; ") if not rule.startswith("font-family"))
            value = ";".join(rules).replace("#000000", "currentColor")
        if element.tag == "image" and key == "href":
            value = _smaller(value, photograph=given.get("id") == PHOTOGRAPH)
        element.set(key, value)


def _smaller(data: str, photograph: bool) -> str:
    """A PNG as JPEG, or with a palette: a colour map has 256 colours at most."""
    image = Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2]))).convert("RGB")
    out = io.BytesIO()
    if photograph:
        image.save(out, "JPEG", quality=85)
    else:
        image.quantize().save(out, "PNG", optimize=True)
    return f"data:image/{'jpeg' if photograph else 'png'};base64,{base64.b64encode(out.getvalue()).decode()}"
