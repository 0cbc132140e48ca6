"""A study: the learning rate of each objective, then its seeds; each finished run is one JSON file.

A study that stopped resumes with the runs whose file is missing. Each file holds its configuration; a file of another
configuration is refused, never mixed in. More seeds and more objectives can be added to a finished study.
"""

import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rankclip_jax.common.errors import InputError
from rankclip_jax.common.files import make_folder, write_whole
from rankclip_jax.common.ownership import Owned, inside
from rankclip_jax.common.tokenizer import Tokenizer
from rankclip_jax.config import complete
from rankclip_jax.evaluation import suite
from rankclip_jax.study import measure, report
from rankclip_jax.study.data import Labelled, read_labelled, read_pairs, view_of
from rankclip_jax.study.training import Job, Programs
from rankclip_jax.train.session import Session, canvas_side, image_side


class Study:
    """The data of a study, read once, and its runs.

    Attributes:
      folder: `workdir`/runs and `workdir`/search hold the finished runs.
    """

    def __init__(self, config: ConfigDict, workdir: str | Path):
        """`config`: complete, with config.study. Raises InputError for what cannot be studied."""
        self.config, self.folder = config, Path(workdir)
        study, side = config.study, image_side(config)
        if not study.objectives:
            raise InputError("config.study.objectives is empty: name them, as configs/study_shapes.py does")
        if study.baseline not in study.objectives:
            raise InputError(f"config.study.baseline={study.baseline!r}. Expected one of {', '.join(study.objectives)}")
        if unknown := sorted(set(study.more_seeds) - set(study.objectives)):
            known = ", ".join(study.objectives)
            raise InputError(f"config.study.more_seeds.{unknown[0]} is not an objective. Expected one of {known}")
        if config.model.pack_text == "on":
            raise InputError("config.model.pack_text=on. Expected auto or off: a study pads, on the device")
        for name in study.objectives:  # a wrong one is found now, not after hours of the others
            self.config_of(name)
        canvas = canvas_side(config, side) or side
        train = read_pairs(config.data, config.data.train, side=side, canvas=canvas, split="train", limit=study.limit)
        if len(train.captions) < config.batch_size:
            raise InputError(f"{len(train.captions)} training pairs are fewer than a batch of {config.batch_size}")
        self.tokenizer = (
            Tokenizer.load(config.tokenizer.path)
            if config.tokenizer.path
            else Tokenizer.train(train.captions, config.tokenizer.vocab_size)
        )
        model = self._model(complete(config.to_dict() | {"loss": {"objective": "clip"}}))
        self._embedder = measure.Embedder(model, self.tokenizer)
        self._count = len(train.captions)
        self._data = {
            "image": jnp.asarray(train.canvas),
            "size": jnp.asarray(train.size),
            "tokens": jnp.asarray(self.tokenizer(train.captions, model.config.text.context_length)),
        }
        val = read_pairs(config.data, config.data.val, side=side, canvas=canvas, split="val", limit=study.pairs)
        self._val = view_of(val, side), val.captions
        self._selecting, self._reported = {}, {}
        for name, spec in suite.zero_shot_sets(config.eval).items():
            selecting, self._reported[name] = split(read_labelled(name, spec, side=side), study.select_share)
            self._selecting[name] = selecting
        if unknown := sorted(set(study.select_on) - set(self._selecting)):
            known = ", ".join(self._selecting)
            raise InputError(f"config.study.select_on: unknown set {unknown[0]!r}. Expected one of {known}")

    def _model(self, config):
        """Checked and built for the one device that a study trains on."""
        return Session(config, self.tokenizer, devices=jax.devices()[:1]).model

    def run(self) -> list[dict]:
        """Does what is not done yet; returns every run of the study (not of the search), as its file has it."""
        Owned(self.folder, "study").claim(report.FILES)
        done, clock = [], Clock(self._planned())
        for name in self.config.study.objectives:
            config = self.config_of(name)
            lr = self._search(name, config, clock)
            jobs = [Job(lr, seed) for seed in range(self.config.study.more_seeds.get(name, self.config.study.seeds))]
            done += self._finish(self.folder / "runs", name, config, jobs, clock, full=True)
        return done

    def config_of(self, name: str) -> ConfigDict:
        """The training configuration of an objective."""
        fields = self.config.to_dict()
        changed = fields["study"]["objectives"][name]
        if not isinstance(changed, dict):
            raise InputError(f"config.study.objectives.{name}={changed!r}. Expected changed keys of config.loss")
        fields["loss"] |= changed
        return complete(fields)

    def _planned(self) -> int:
        study = self.config.study
        seeds = sum(study.more_seeds.get(name, study.seeds) for name in study.objectives)
        return seeds + len(study.objectives) * (len(study.lrs) if len(study.lrs) > 1 else 0)

    def _search(self, name: str, config: ConfigDict, clock: "Clock") -> float:
        """The rate with the best mean zero-shot top-1 on the selecting parts; the lower one wins a tie."""
        lrs = sorted(self.config.study.lrs) or [self.config.optim.lr]
        if len(lrs) == 1:
            return lrs[0]
        jobs = [Job(lr, self.config.study.search_seed) for lr in lrs]
        tried = self._finish(self.folder / "search", name, config, jobs, clock, full=False)
        names = self.config.study.select_on or list(self._selecting)
        scores = {r["lr"]: np.mean([r["curve"][-1][f"zero_shot/{n}"] for n in names]) for r in tried}
        return max(scores, key=lambda lr: (scores[lr], -lr))

    def _finish(
        self, folder: Path, name: str, config: ConfigDict, jobs: list[Job], clock: "Clock", full: bool
    ) -> list[dict]:
        """The jobs' runs, those read that are there."""
        wanted = _identity(config)
        read = {job: _read(_file(folder, name, job), wanted) for job in jobs}
        known = {job: found for job, found in read.items() if found is not None}
        missing = [job for job in jobs if job not in known]
        clock.skip(len(jobs) - len(missing))
        programs = None
        for start in range(0, len(missing), self.config.study.at_once):
            some = missing[start : start + self.config.study.at_once]
            if programs is None:  # compiled only where something is to be trained
                programs = Programs(self._model(config), config, self._count)
            began, results = time.monotonic(), self._train(programs, config, some, full)
            seconds = (time.monotonic() - began) / len(some)
            for job in some:
                result = {"objective": name, "lr": job.lr, "seed": job.seed, "seconds": seconds, **results[job]}
                make_folder(folder)
                write_whole(_file(folder, name, job), json.dumps(result | {"config": wanted}, indent=1))
                known[job] = result
                clock.did(f"{folder.name} {name} seed {job.seed} lr {job.lr:g}: {_summary(result)}")
        return [known[job] for job in jobs]

    def _train(self, programs: Programs, config: ConfigDict, jobs: list[Job], full: bool) -> dict[Job, dict]:
        curves, finals = {job: [] for job in jobs}, {job: {} for job in jobs}

        def seen(job, state, metrics):
            epoch = len(curves[job]) + 1
            last = epoch == config.epochs
            point = {"epoch": epoch, "step": epoch * programs.steps_per_epoch}
            point |= {f"train/{key}": value for key, value in metrics.items()}
            if last or (full and epoch % config.eval.every_epochs == 0):
                model = self._embedder.of(state)
                point |= measure.zero_shot(model, self._selecting)
                if full:
                    point |= measure.pairs(model, *self._val)
            curves[job].append(point)
            if last and full:
                finals[job] = measure.labelled(model, self._selecting, self._reported, self.config.study.probe_l2)
                finals[job] |= {k: v for k, v in point.items() if k.startswith(("retrieval", "geometry", "gradient"))}

        programs.train(jobs, self._data, config.epochs, seen)
        return {job: {"curve": curves[job], "final": finals[job]} for job in jobs}


def split(labelled: Labelled, share: float) -> tuple[Labelled, Labelled]:
    """The first `share` of a labelled set, which chooses learning rates, and the rest, which is reported."""
    cut = round(share * len(labelled.labels))
    if not 0 < cut < len(labelled.labels):
        raise InputError(f"config.study.select_share = {share} leaves a part of {len(labelled.labels)} images empty")
    return labelled.part(slice(0, cut)), labelled.part(slice(cut, None))


class Clock:
    """A line after each run, with the time left at the pace so far."""

    def __init__(self, total: int):
        self._total, self._skipped, self._done, self._start = total, 0, 0, time.monotonic()

    def skip(self, count: int) -> None:
        """Notes runs that were done before."""
        self._skipped += count

    def did(self, line: str) -> None:
        """Prints the line of a run that just ended."""
        self._done += 1
        left = self._total - self._skipped - self._done
        seconds = round(left * (time.monotonic() - self._start) / self._done)
        of = f"{self._skipped + self._done}/{self._total}"
        print(f"{of}  {line}  {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left", flush=True)


def _identity(config: ConfigDict) -> dict:
    """What makes two runs the same: all of the configuration but what is looked at, printed or planned."""
    fields = json.loads(json.dumps(config.to_dict()))
    kept = {k: v for k, v in fields.items() if k not in ("log_every", "checkpoint", "plan", "study", "seed")}
    study = {k: fields["study"][k] for k in ("limit", "search_seed", "select_on", "select_share", "pairs", "probe_l2")}
    return kept | {"study": study}


def _file(folder: Path, name: str, job: Job) -> Path:
    return inside(folder, f"{name}-lr{job.lr:g}-seed{job.seed}.json")


def _read(file: Path, wanted: dict) -> dict | None:
    if not file.exists():
        return None
    try:
        found = json.loads(file.read_text())
        known = {"objective", "lr", "seed", "seconds", "curve", "final"} <= found.keys() and found["config"].keys()
    except (ValueError, KeyError, AttributeError, RecursionError):
        known = None
    if not known:
        raise InputError(f"{file} is there already, and no run of a study; take another --workdir, or move it away")
    if found["config"] != wanted:
        differing = sorted(k for k in wanted.keys() | found["config"].keys() if wanted.get(k) != found["config"].get(k))
        raise InputError(
            f"{file} is of another configuration ({', '.join(differing)}); take another --workdir, or remove it"
        )
    return {key: value for key, value in found.items() if key != "config"}


def _summary(result: dict) -> str:
    numbers = result["final"] or result["curve"][-1]
    shown = [f"{k.split('/')[1]} {100 * v:.1f} %" for k, v in numbers.items() if k.startswith("zero_shot/")]
    return f"{', '.join(shown)} ({result['seconds']:.0f} s)"
