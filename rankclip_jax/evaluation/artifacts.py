"""Files that evaluations write into WORKDIR/eval for the report, which reads neither data nor model."""

import base64
import contextlib
import functools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from ml_collections import ConfigDict

from rankclip_jax.common.files import whole
from rankclip_jax.evaluation import suite
from rankclip_jax.evaluation.geometry import project, similarity_histograms
from rankclip_jax.evaluation.retrieval import nearest

_QUERIES, _ANSWERS, _WRONG = 6, 5, 3  # of the gallery, in each direction
_EXAMPLES = 8  # right ones, and wrong ones


def names(config: ConfigDict) -> list[str]:
    """Names of all files that evaluations of config.eval may write. Raises InputError as `suite.zero_shot_sets`."""
    classified = suite.zero_shot_sets(config)
    sets = dict(zero_shot=classified, examples=classified, retrieval=config.retrieval, geometry=config.geometry)
    return [_name(kind, name) for kind, named in sets.items() for name in named]


def _name(kind: str, name: str) -> str:
    return f"{kind}_{plain(name)}.{'json' if kind in ('retrieval', 'examples') else 'npz'}"


def plain(name: str) -> str:
    """The name of a set as those of its files have it."""
    return re.sub(r"[/\\]", "_", name)


class Artifacts:
    """Writes into `folder`; None: writes nothing.

      zero_shot_NAME.npz   classes (C,) str, confusion (C, C) int64: [label, predicted class]
      examples_NAME.json   "right" and "wrong": {"picture", "label", "predicted"}, evenly spaced over those of the set
      retrieval_NAME.json  "image_to_text" and "text_to_image": queries with their 5 nearest, evenly spaced over the
                           set; the same with "_wrong": some of those whose nearest is not right
      geometry_NAME.npz    image, text (N, 2) float32 on two principal axes, explained (2,), captions (N,) str;
                           edges, positive, negative: the histograms of cosines

    Pictures are JPEG in base64.
    """

    def __init__(self, folder: Path | None, shown: dict[str, dict] | None = None):
        """`shown`: "zero_shot/NAME" -> examples, "retrieval/NAME" -> gallery is put into it, for whoever draws them."""
        self._folder, self._shown = folder, shown

    @contextlib.contextmanager
    def _file(self, kind: str, name: str) -> Iterator[BinaryIO]:
        assert self._folder
        self._folder.mkdir(parents=True, exist_ok=True)
        with whole(self._folder / _name(kind, name)) as part, open(part, "wb") as out:
            yield out

    def confusion(self, name: str, classes: list[str], confusion_CxC: np.ndarray) -> None:
        """Writes zero_shot_NAME.npz."""
        if self._folder:
            with self._file("zero_shot", name) as out:
                np.savez_compressed(out, classes=classes, confusion=confusion_CxC)

    def examples(
        self, name: str, source: Any, rows_N: np.ndarray, labels_N: np.ndarray, predicted_N: np.ndarray, classes: list
    ) -> None:
        """Writes examples_NAME.json of N images: rows of `source`, and numbers of `classes`."""

        def some(chosen):
            places = np.flatnonzero(chosen)
            return [
                dict(picture=_picture(source, rows_N[i]), label=classes[labels_N[i]], predicted=classes[predicted_N[i]])
                for i in places[_spaced(len(places), _EXAMPLES)]
            ]

        if self._folder or self._shown is not None:
            right = labels_N == predicted_N
            self._show("zero_shot", "examples", name, {"right": some(right), "wrong": some(~right)})

    def _show(self, kind: str, file: str, name: str, content: dict) -> None:
        if self._shown is not None:
            self._shown[f"{kind}/{name}"] = content
        if self._folder:
            with self._file(file, name) as out:
                out.write(json.dumps(content).encode())

    def geometry(self, name: str, z_img_NxD: np.ndarray, z_txt_NxD: np.ndarray, captions: list[str]) -> None:
        """Writes geometry_NAME.npz of N pairs; nothing for fewer than two."""
        if self._folder and len(captions) >= 2:
            arrays: dict[str, Any] = project(z_img_NxD, z_txt_NxD) | similarity_histograms(z_img_NxD, z_txt_NxD)
            with self._file("geometry", name) as out:
                np.savez_compressed(out, captions=[c[:120] for c in captions], **arrays)

    def gallery(
        self,
        name: str,
        source: Any,
        rows: Sequence[int],
        captions: Sequence[str],
        image_of_text: np.ndarray,
        z_img_NxD: np.ndarray,
        z_txt_MxD: np.ndarray,
        ranks: tuple[np.ndarray, np.ndarray],
    ) -> None:
        """Writes retrieval_NAME.json: queries not chosen by result, with their nearest, and some that went wrong.

        Args:
          ranks: as retrieval.retrieval_ranks gives them.
        """
        if not self._folder and self._shown is None:
            return

        picture = functools.cache(lambda i: _picture(source, rows[i]))  # the answer to many queries, read once

        def of_image(i):
            found = nearest(z_img_NxD[i], z_txt_MxD, _ANSWERS)
            answers = [{"caption": captions[t], "right": bool(image_of_text[t] == i)} for t in found]
            return {"picture": picture(i), "answers": answers}

        def of_text(t):
            found = nearest(z_txt_MxD[t], z_img_NxD, _ANSWERS)
            answers = [{"picture": picture(i), "right": bool(image_of_text[t] == i)} for i in found]
            return {"caption": captions[t], "answers": answers}

        content = {}
        for way, asked, ranks_N in zip(("image_to_text", "text_to_image"), (of_image, of_text), ranks, strict=True):
            wrong = np.flatnonzero(ranks_N)
            content[way] = [asked(i) for i in _spaced(len(ranks_N), _QUERIES)]
            content[f"{way}_wrong"] = [asked(i) for i in wrong[_spaced(len(wrong), _WRONG)]]
        self._show("retrieval", "retrieval", name, content)


def _spaced(n: int, most: int) -> np.ndarray:
    """At most `most` of n, evenly spaced, from the first to the last."""
    return np.linspace(0, n - 1, min(n, most)).astype(int)


def _picture(source: Any, row: int) -> str:
    from input_pipeline.labelled import thumbnail

    return base64.b64encode(thumbnail(source, int(row))).decode()
