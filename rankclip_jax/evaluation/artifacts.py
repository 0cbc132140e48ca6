"""Files that evaluations write into WORKDIR/eval for the report, which reads neither data nor model."""

import base64
import contextlib
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

_QUERIES, _ANSWERS = 6, 5


def names(config: ConfigDict) -> list[str]:
    """Names of all files that evaluations of config.eval may write. Raises InputError as `suite.zero_shot_sets`."""
    sets = {"zero_shot": suite.zero_shot_sets(config), "retrieval": config.retrieval, "geometry": config.geometry}
    return [_name(kind, name) for kind, named in sets.items() for name in named]


def _name(kind: str, name: str) -> str:
    plain = re.sub(r"[/\\]", "_", name)
    return f"{kind}_{plain}.{'json' if kind == 'retrieval' else 'npz'}"


class Artifacts:
    """Writes into `folder`; None: writes nothing.

      zero_shot_NAME.npz   classes (C,) str, confusion (C, C) int64: [label, predicted class]
      retrieval_NAME.json  "image_to_text" and "text_to_image": queries with their 5 nearest, images as JPEG in base64
      geometry_NAME.npz    image, text (N, 2) float32 on two principal axes, explained (2,), captions (N,) str;
                           edges, positive, negative: the histograms of cosines
    """

    def __init__(self, folder: Path | None):
        self._folder = folder

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
    ) -> None:
        """Writes retrieval_NAME.json: queries evenly spaced over the set, not chosen by result, with their nearest."""
        if not self._folder:
            return
        from input_pipeline.labelled import thumbnail

        def picture(i):
            return base64.b64encode(thumbnail(source, int(rows[i]))).decode()

        def spaced(n):
            return np.linspace(0, n - 1, min(n, _QUERIES)).astype(int)

        from_images = []
        for i in spaced(len(z_img_NxD)):
            found = nearest(z_img_NxD[i], z_txt_MxD, _ANSWERS)
            answers = [{"caption": captions[t], "right": bool(image_of_text[t] == i)} for t in found]
            from_images.append({"picture": picture(i), "answers": answers})
        from_texts = []
        for t in spaced(len(z_txt_MxD)):
            found = nearest(z_txt_MxD[t], z_img_NxD, _ANSWERS)
            answers = [{"picture": picture(i), "right": bool(image_of_text[t] == i)} for i in found]
            from_texts.append({"caption": captions[t], "answers": answers})
        with self._file("retrieval", name) as out:
            out.write(json.dumps({"image_to_text": from_images, "text_to_image": from_texts}).encode())
