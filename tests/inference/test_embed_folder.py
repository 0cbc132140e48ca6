"""Embeddings in folders of Parquet, local and in buckets: streamed, resumed, by many workers, searched in chunks."""

import functools
import json
import os
import signal
import tracemalloc
import types
import weakref
from pathlib import Path

import jax
import numpy as np
import pyarrow.dataset
import pytest
from PIL import Image

import rankclip_jax
from benchmarks.quick_compile import XLA_FLAGS
from rankclip_jax import embed
from rankclip_jax.common import storage, tasks
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.ownership import at_work
from rankclip_jax.common.pictures import read, read_file
from rankclip_jax.inference import collection, search, store
from rankclip_jax.inference.pictures import Pictures
from tests.support.made_models import VIT, make_workdir
from tests.support.rays import two_workers_of_ray
from tests.support.s3 import served_s3

D = 16


class FakeModel:
    """Embeds a grey level g as the unit vector of direction g; texts as their length."""

    def __init__(self):
        config = types.SimpleNamespace(embed_dim=D)
        self.source = types.SimpleNamespace(config=config, view=self.view, path="fake", tokenizer="one")
        self.seen = 0

    @staticmethod
    def view(image):
        return np.asarray(read(read_file(image)))

    def encode_views(self, views):
        z = [self.of(int(view[0, 0, 0])) for view in views]
        self.seen += len(z)
        return np.stack(z) if z else np.zeros((0, D), np.float32)

    def encode_captions(self, texts):
        z = [self.of(len(text)) for text in texts]
        return np.stack(z) if z else np.zeros((0, D), np.float32)

    def encode_text(self, text):
        return self.of(len(text))[None]

    @staticmethod
    def of(number):
        z = np.random.default_rng(number).normal(size=D)
        return (z / np.linalg.norm(z)).astype(np.float32)

    def identity(self):
        return {"model": "0123abcd"}


@pytest.fixture
def model(monkeypatch):
    made = FakeModel()
    monkeypatch.setattr(rankclip_jax, "load", lambda *_, **__: made, raising=False)
    monkeypatch.setattr(collection, "PART", 2)
    monkeypatch.setattr(store, "SHARD", 4)
    return made


@pytest.fixture
def run(model, monkeypatch):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["embed", "fake", *map(str, arguments)])
        embed.main()

    return run


@pytest.fixture
def photos(tmp_path):
    return made_photos(tmp_path / "photos")


def made_photos(folder):
    """12 pictures, some of which (5, and 8 to 11: a whole shard) are none."""
    folder.mkdir()
    for i in range(12):
        if i == 5 or i >= 8:
            (folder / f"{i:02}.png").write_text("no picture")
        else:
            Image.new("RGB", (4, 4), (i, i, i)).save(folder / f"{i:02}.png")
    return folder


GOOD = [0, 1, 2, 3, 4, 6, 7]


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


WRITTEN = [".rankclip_jax", "00000.parquet", "00001.parquet", "00002.parquet", "_about.json", "_bad_samples.jsonl"]


def test_a_captioned_collection_has_a_cosine_of_each_pair_in_a_folder_too(run, photos, tmp_path):
    """Also where a whole shard has no picture."""
    for i in (0, 3, 5, 8):
        (photos / f"{i:02}.txt").write_text("a" * (i + 1))
    run(photos, "--out", tmp_path / "made")
    run(photos, "--out", tmp_path / "one.parquet")
    expected = [float(FakeModel.of(i) @ FakeModel.of(i + 1)) if i in (0, 3) else np.nan for i in GOOD]
    for made in "made", "one.parquet":
        table = pyarrow.dataset.dataset(tmp_path / made, exclude_invalid_files=False).to_table(["row", "cosine"])
        assert table["row"].to_pylist() == GOOD
        np.testing.assert_allclose(table["cosine"].to_numpy(), expected, rtol=1e-6)


def test_a_folder_is_a_data_set_of_parquet(run, photos, tmp_path, capsys):
    out = tmp_path / "made"
    run(photos, "--out", out)
    assert names(out) == WRITTEN
    table = pyarrow.dataset.dataset(out).to_table().to_pydict()
    assert table["name"] == [f"{i:02}.png" for i in GOOD] and table["row"] == GOOD
    np.testing.assert_array_equal(np.float32(table["embedding"]), np.stack([FakeModel.of(i) for i in GOOD]))
    bad = [json.loads(line) for line in (out / store.BAD).read_text().splitlines()]
    assert [(line["row"], line["where"]) for line in bad] == [(i, f"{i:02}.png") for i in (5, 8, 9, 10, 11)]
    said = capsys.readouterr().out
    assert "5 images were left out, for example 05.png: " in said
    assert f"all are listed in {out}/_bad_samples.jsonl" in said
    assert f"wrote {out}: 7 embeddings of {D} dimensions" in said


def test_the_search_of_a_folder_is_that_of_a_file(run, photos, tmp_path, capsys):
    said = []
    for out in (tmp_path / "made", tmp_path / "made.npz", tmp_path / "made.parquet"):
        run(photos, "--out", out)
        capsys.readouterr()
        run(out, "--search", "a dog", "two cats", "--top", 3, "--png", tmp_path / "m.png")
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == said[2]
    z = np.stack([FakeModel.of(i) for i in GOOD]).astype(np.float64)
    cosines = z @ FakeModel.of(len("a dog")).astype(np.float64)
    lines = [line.split() for line in said[0].splitlines()[1:4]]
    nearest = np.argsort(-cosines)[:3]
    assert lines == [[str(n + 1), f"{cosines[i]:.4f}", f"{GOOD[i]:02}.png"] for n, i in enumerate(nearest)]


def test_a_second_start_does_what_is_missing(run, model, photos, tmp_path, monkeypatch, capsys):
    out = tmp_path / "made"
    run(photos, "--out", out)
    whole = {name: (out / name).read_bytes() for name in names(out)}
    (out / "00001.parquet").unlink()
    (out / "_00001.parquet.part").write_bytes(b"half")
    model.seen = 0
    run(photos, "--out", out)
    assert model.seen == 3 and {name: (out / name).read_bytes() for name in names(out)} == whole
    assert f"resuming: 2 of 3 shards of {out} are done" in capsys.readouterr().out
    (photos / "00.png").rename(photos / "99.png")  # as many, of which all have another number
    with pytest.raises(SystemExit, match=r"made belongs to another run \(names: '\w{8}' -> '\w{8}'\)"):
        run(photos, "--out", out)


def test_what_is_not_ours_or_not_complete_is_refused(run, photos, tmp_path):
    out = tmp_path / "made"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match=r"holds files that embed did not write \(mine.txt"):
        run(photos, "--out", out)
    (out / "mine.txt").unlink()
    run(photos, "--out", out)
    with at_work(out, "embed", ""), pytest.raises(SystemExit, match=f"another embed is at work in {out}; wait for "):
        run(photos, "--out", out)
    shard = out / "00001.parquet"
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(SystemExit, match="made lacks 00001.parquet, and 1 shards in all; finish it with --out"):
        run(out, "--search", "a dog")
    for damaged in (b"", content[:-9], content[:200] + content[300:]):
        shard.write_bytes(damaged)
        with pytest.raises(SystemExit, match="00001.parquet is not a file of embeddings"):
            run(out, "--search", "a dog")
    shard.write_bytes(content)
    (out / store.ABOUT).write_text("[]")
    with pytest.raises(SystemExit, match="made is not a file of embeddings"):
        run(out, "--search", "a dog")
    for flags in (["e.npz", "--workers", 2], ["e", "--workers", 2, "--ray"]):
        with pytest.raises(SystemExit) as stop:
            run(photos, "--out", tmp_path / flags[0], *flags[1:])
        assert stop.value.code == 2


def test_none_can_be_used(run, photos, tmp_path):
    for file in photos.iterdir():
        file.write_text("no picture")
    with pytest.raises(SystemExit, match=r"none of the 12 images could be used; for example 00.png: "):
        run(photos, "--out", tmp_path / "made")


@pytest.mark.parametrize("kind", ["gs", "s3"])
def test_a_bucket_gets_what_a_folder_gets(kind, run, model, photos, tmp_path, monkeypatch, request, capsys):
    run(photos, "--out", tmp_path / "made")
    run(tmp_path / "made", "--search", "a dog")
    found = capsys.readouterr().out.splitlines()[-8:]
    request.getfixturevalue("bucket" if kind == "gs" else "s3")
    url = f"{kind}://mine/made"
    run(photos, "--out", url)
    assert [storage.name_of(file.path) for file in storage.files_in(url)] == WRITTEN
    for name in WRITTEN:
        assert storage.read(f"{url}/{name}") == (tmp_path / "made" / name).read_bytes(), name
    storage.delete(f"{url}/00000.parquet")
    model.seen = 0
    run(photos, "--out", url)
    assert model.seen == 4
    assert storage.read(f"{url}/00000.parquet") == (tmp_path / "made/00000.parquet").read_bytes()
    run(url, "--search", "a dog")
    assert capsys.readouterr().out.splitlines()[-8:] == found


@pytest.fixture
def s3(tmp_path, monkeypatch):
    with served_s3(tmp_path, monkeypatch) as client:
        yield client


@pytest.mark.slow
def test_memory_does_not_grow_with_the_collection(model, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHARD", 256)
    monkeypatch.setattr(collection, "PART", 64)
    picture = tmp_path / "one.png"
    Image.new("RGB", (4, 4)).save(picture)
    peaks = []
    for shards in (2, 2, 12):  # the first imports and fills caches
        out = tmp_path / f"{shards}-{len(peaks)}"
        pictures = Pictures(shards * 256, lambda row: "x" * 1000, lambda row: picture)
        about = {"data": "", "image_key": None, "delimiter": ",", "model": "", "size": pictures.size}
        tracemalloc.start()
        collection.embed_to_folder(model, pictures, out, about)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.3 * peaks[1]  # the names of all would be 3 MB
    assert sum(len(chunk.names) for chunk in store.chunks(str(out))) == 12 * 256


def test_a_search_holds_one_chunk():
    alive = weakref.WeakSet()

    class Chunk:
        def __init__(self, number):
            assert len(alive) <= 1  # the one before, until this one takes its name
            alive.add(self)
            self.rows = np.arange(10) + 10 * number
            self.z = np.stack([FakeModel.of(row) for row in self.rows])
            self.names = [f"picture {row}" for row in self.rows]

    query = np.stack([FakeModel.of(1000), FakeModel.of(1001)])
    matches, found, cosines = search.best((Chunk(number) for number in range(20)), query, 7)
    all_z = np.stack([FakeModel.of(i) for i in range(200)]).astype(np.float64)
    expected = np.argsort(-(query.astype(np.float64) @ all_z.T), axis=1)[:, :7]
    assert [[int(matches.rows[i]) for i in one] for one in found] == expected.tolist()
    assert [[matches.names[i] for i in one] for one in found] == [[f"picture {i}" for i in one] for one in expected]
    np.testing.assert_allclose(cosines, np.take_along_axis(query @ all_z.T, expected, 1), atol=1e-6)


class KillsItsWorker:
    def __init__(self, worker, marker):
        self.worker, self.marker = worker, marker

    def __call__(self, number, threads):
        if number == 1 and not os.path.exists(self.marker):
            Path(self.marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        store.SHARD = 4
        return self.worker(number, threads)


def small_shards(monkeypatch):
    """And the flags of the workers: they have one device, and programs that are compiled soon."""
    monkeypatch.setattr(store, "SHARD", 4)
    jax.devices()  # eight, for all tests of this process
    monkeypatch.setenv("XLA_FLAGS", XLA_FLAGS)


@pytest.fixture(scope="module")
def embedding(tmp_path_factory):
    """A small model, what its workers need, and what one worker, which was killed once, has written."""
    folder = tmp_path_factory.mktemp("made")
    photos, workdir = made_photos(folder / "photos"), make_workdir(folder / "run", VIT)
    model, opening = rankclip_jax.load(workdir), (str(photos), None, ",", None)
    pictures = collection.open_pictures(*opening)
    about = {"data": str(photos), "image_key": None, "delimiter": ",", "size": 12}
    about |= model.identity() | {"names": pictures.fingerprint()}

    def worker(out="", **changes):
        return collection.Worker((str(workdir), None, "quick_gelu"), opening, about | changes, str(out))

    def made(name, run, killed):
        out, marker = folder / name, folder / f"{name} killed"
        if not killed:
            marker.touch()
        work = functools.partial(run, KillsItsWorker(worker(out), str(marker)))
        collection.embed_to_folder(model, pictures, out, about, work)
        assert marker.exists()
        return {name: (out / name).read_bytes() for name in names(out)}

    with pytest.MonkeyPatch.context() as patched:
        small_shards(patched)
        one = made("one", functools.partial(tasks.run, workers=1, threads=1), killed=True)
    return types.SimpleNamespace(folder=folder, photos=photos, model=model, worker=worker, made=made, one=one)


@pytest.mark.slow
def test_a_killed_worker_and_two_at_once_change_nothing(embedding, monkeypatch):
    small_shards(monkeypatch)
    two = embedding.made("two", functools.partial(tasks.run, workers=2, threads=1), killed=False)
    assert two == embedding.one
    np.testing.assert_allclose(
        np.concatenate([chunk.z for chunk in store.chunks(str(embedding.folder / "two"))]),
        embedding.model.encode_image([embedding.photos / f"{i:02}.png" for i in GOOD]),
        atol=1e-6,
    )
    with pytest.raises(InputError, match="another model or collection"):
        embedding.worker(names="00000000")(0, 1)


@pytest.mark.slow
def test_a_killed_worker_of_ray_changes_nothing(embedding, monkeypatch):
    pytest.importorskip("ray")
    small_shards(monkeypatch)
    with two_workers_of_ray(monkeypatch):
        by_ray = functools.partial(tasks.run_by_ray, address="", threads=1)
        assert embedding.made("ray", by_ray, killed=True) == embedding.one


def test_the_three_lines_of_the_docs_fill_an_index(run, photos, tmp_path, monkeypatch):
    faiss = pytest.importorskip("faiss")
    run(photos, "--out", tmp_path / "photos-embedded")
    page = (Path(__file__).parents[2] / "docs/interop.md").read_text()
    code = page.split("```py\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(code.replace("512", str(D)), found)
    cosines, rows = found["index"].search(FakeModel.of(6)[None], 2)
    assert rows[0, 0] == 6 and abs(cosines[0, 0] - 1) < 1e-6 and isinstance(found["index"], faiss.Index)


def test_an_image_of_several_rows_is_found_once():
    def chunk(first, names, cosines):
        z = np.array([[cosine, (1 - cosine**2) ** 0.5] for cosine in cosines], np.float32)
        return store.Embeddings(z, np.arange(first, first + len(names)), names, {})

    chunks = [chunk(0, list("aaba"), [0.5, 0.5, 0.25, 0.5]), chunk(4, list("ccab"), [0.75, 0.75, 0.5, 0.25])]
    matches, found, cosines = search.best(chunks, np.float32([[1, 0], [0, 1]]), 3)
    assert [[matches.names[i] for i in row] for row in found] == [["c", "a", "b"], ["b", "a", "c"]]
    assert matches.rows[found[0]].tolist() == [4, 0, 2] and cosines[0].tolist() == [0.75, 0.5, 0.25]
