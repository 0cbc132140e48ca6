"""A study: the learning rate of each objective, then its seeds; each finished run is one JSON file.

A study that stopped resumes with the runs whose file is missing. Each file holds its configuration; a file of another
configuration is refused, never mixed in. More seeds, objectives and conditions can be added to a finished study.
"""

import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rankclip_jax.common.errors import InputError
from rankclip_jax.common.ownership import Owned
from rankclip_jax.common.tokenizer import Tokenizer
from rankclip_jax.config import complete
from rankclip_jax.evaluation import suite
from rankclip_jax.study import measure, questions, report, results
from rankclip_jax.study.arms import Arm, arms_of, config_of
from rankclip_jax.study.data import Labelled, read_labelled, read_pairs, spoiled, truth_of, view_of
from rankclip_jax.study.training import Job, Programs
from rankclip_jax.train.resolve import settle_view
from rankclip_jax.train.session import Session, canvas_side, image_side


class Study:
    """The data of a study, read once, and its runs.

    Attributes:
      folder: `workdir`/runs and `workdir`/search hold the finished runs.
    """

    def __init__(self, config: ConfigDict, workdir: str | Path):
        """`config`: complete, with config.study. Raises InputError for what cannot be studied."""
        config = complete(config.to_dict())
        settle_view(config)
        self.config, self.folder, self.arms = config, Path(workdir), arms_of(config)
        study, self._side = config.study, image_side(config)
        if config.model.pack_text == "on":
            raise InputError("config.model.pack_text=on. Expected auto or off: a study pads, on the device")
        self._canvas = canvas_side(config, self._side) or self._side
        self._read = None, None  # what training data were read last, and they
        self._programs: dict[str, Programs] = {}
        self._configs = {arm: config_of(config, arm) for arm in self.arms}
        questions.check(study.questions, self.arms)
        if len(study.lrs) > 1 and study.search_seed < (end := max(map(self._seeds, self.arms))):
            raise InputError(f"config.study.search_seed={study.search_seed} is a seed of the study. Expected >= {end}")
        self.tokenizer = (
            Tokenizer.load(config.tokenizer.path)
            if config.tokenizer.path
            else Tokenizer.train(self._pairs(config).captions, config.tokenizer.vocab_size)
        )
        model = self._model(complete(config.to_dict() | {"loss": {"objective": "clip"}}))
        self._embedder = measure.Embedder(model, self.tokenizer, config.data.mean, config.data.std)
        self._length = model.config.text.context_length
        val = self._pairs_at(config.data.val, "val", config, study.pairs)
        view = dict(side=self._side, squash=config.data.squash)
        self._val, self._truth = (view_of(val, **view), val.captions), truth_of(config.data, len(val.captions))
        self._selecting, self._reported = {}, {}
        for name, spec in suite.zero_shot_sets(config.eval).items():
            selecting, self._reported[name] = split(read_labelled(name, spec, **view), study.select_share)
            self._selecting[name] = selecting
        if unknown := sorted(set(study.select_on) - set(self._selecting)):
            known = ", ".join(self._selecting)
            raise InputError(f"config.study.select_on: unknown set {unknown[0]!r}. Expected one of {known}")

    def _pairs_at(self, path, split, config, limit):
        return read_pairs(config.data, path, side=self._side, canvas=self._canvas, split=split, limit=limit)

    def _pairs(self, config):
        """The training pairs of a condition."""
        key = config.data.to_json(), config.study.limit, config.study.mismatched, config.study.duplicates
        if self._read[0] != key:
            found = self._pairs_at(config.data.train, "train", config, config.study.limit)
            if len(found.captions) < config.batch_size:
                raise InputError(f"{len(found.captions)} training pairs are fewer than a batch of {config.batch_size}")
            self._read = key, spoiled(found, config.study.mismatched, config.study.duplicates)
        return self._read[1]

    def _arrays(self, config):
        """The training pairs of a condition on the device, as `batches.batch_of` takes them."""
        pairs = self._pairs(config)
        arrays = {"image": pairs.canvas, "size": pairs.size, "tokens": self.tokenizer(pairs.captions, self._length)}
        return jax.tree.map(jnp.asarray, arrays)

    def _model(self, config):
        """Checked and built for the one device that a study trains on."""
        return Session(config, self.tokenizer, devices=jax.devices()[:1]).model

    def run(self, part: int = 0, parts: int = 1) -> list[dict]:
        """Does what is not done yet of arms[part::parts]; returns their runs, as their files have them."""
        Owned(self.folder, "study").claim(report.FILES)
        arms = self.arms[part::parts]
        done, clock = [], Clock(self._planned(arms))
        for arm in arms:
            lr = self._search(arm, clock)
            jobs = [Job(lr, seed) for seed in range(self._seeds(arm))]
            done += self._finish(self.folder / "runs", arm, jobs, clock, full=True)
        return done

    def _seeds(self, arm):
        return self.config.study.more_seeds.get(arm.objective, self.config.study.seeds)

    def _planned(self, arms):
        tried = len(self.config.study.lrs) if len(self.config.study.lrs) > 1 else 0
        return sum(self._seeds(arm) + tried for arm in arms)

    def _search(self, arm: Arm, clock: "Clock") -> float:
        """The rate with the best mean zero-shot top-1 on the selecting parts; the lower one wins a tie."""
        lrs = sorted(self.config.study.lrs) or [self._configs[arm].optim.lr]
        if len(lrs) == 1:
            return lrs[0]
        jobs = [Job(lr, self.config.study.search_seed) for lr in lrs]
        tried = self._finish(self.folder / "search", arm, jobs, clock, full=False)
        names = self.config.study.select_on or list(self._selecting)
        scores = {r["lr"]: np.mean([r["curve"][-1][f"zero_shot/{n}"] for n in names]) for r in tried}
        return max(scores, key=lambda lr: (scores[lr], -lr))

    def _finish(self, folder: Path, arm: Arm, jobs: list[Job], clock: "Clock", full: bool) -> list[dict]:
        """The jobs' runs, those read that are there."""
        config = self._configs[arm]
        wanted = results.identity(config)
        read = {job: results.read(results.file_of(folder, arm, job), wanted) for job in jobs}
        known = {job: found for job, found in read.items() if found is not None}
        missing = [job for job in jobs if job not in known]
        clock.skip(len(jobs) - len(missing))
        if missing:
            data = self._arrays(config)
        for start in range(0, len(missing), self.config.study.at_once):
            some = missing[start : start + self.config.study.at_once]
            began = time.monotonic()
            found = self._train(self._compiled(config, len(data["image"])), config, data, some, full)
            seconds = (time.monotonic() - began) / len(some)
            for job in some:
                result = arm._asdict() | {"lr": job.lr, "seed": job.seed, "seconds": seconds, **found[job]}
                results.write(results.file_of(folder, arm, job), result | {"config": wanted})
                known[job] = result
                if full:  # before hours of other runs
                    questions.check_metrics(self.config.study.questions, result["final"])
                clock.did(f"{folder.name} {arm} seed {job.seed} lr {job.lr:g}: {_summary(result)}")
        return [known[job] for job in jobs]

    def _compiled(self, config: ConfigDict, count: int) -> Programs:
        """The programs of a configuration, which arms share that differ in their data alone."""
        fields = config.to_dict() | {"study": None, "eval": None}
        fields["data"] = fields["data"] | {"train": None, "val": None}
        key = json.dumps([fields, count], default=str)
        if key not in self._programs:
            self._programs[key] = Programs(self._model(config), config, count)
        return self._programs[key]

    def _train(
        self, programs: Programs, config: ConfigDict, data: dict, jobs: list[Job], full: bool
    ) -> dict[Job, dict]:
        curves, finals = {job: [] for job in jobs}, {job: {} for job in jobs}

        def seen(job, state, metrics):
            epoch = len(curves[job]) + 1
            last = epoch == config.epochs
            point = {"epoch": epoch, "step": epoch * programs.steps_per_epoch}
            point |= {f"train/{key}": value for key, value in metrics.items()}
            if last or (full and epoch % config.eval.every_epochs == 0):
                model = self._embedder.of(state())
                point |= measure.zero_shot(model, self._selecting)
                if full:
                    point |= measure.pairs(model, *self._val)
                    point |= measure.graded(model, *self._val, self._truth) if self._truth is not None else {}
            curves[job].append(point)
            if last and full:
                finals[job] = measure.labelled(model, self._selecting, self._reported, self.config.study.probe_l2)
                kinds = ("retrieval", "geometry", "gradient", "truth")
                finals[job] |= {k: v for k, v in point.items() if k.startswith(kinds)}

        programs.train(jobs, data, config.epochs, seen)
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


def _summary(result: dict) -> str:
    numbers = result["final"] or result["curve"][-1]
    shown = [f"{k.split('/')[1]} {100 * v:.1f} %" for k, v in numbers.items() if k.startswith("zero_shot/")]
    return f"{', '.join(shown)} ({result['seconds']:.0f} s)"
