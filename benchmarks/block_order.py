"""Does training by blocks learn as well as by rows, where that is hard: in shards that are sorted by class?

python -m benchmarks.block_order DIR [--seeds 3] [--epochs 4]

DIR is the folder of configs/cifar10.py: 20,000 pictures of 10 classes, here as 20 shards of 1,000 of one class each.
A block is 64 rows. With one lane a window of a hundredth is 3 blocks, so a batch has few classes. With 64 lanes a batch
has a row of 64 windows, of one block each. The model and the rates are configs/study_cifar10.py's. What is printed is
zero-shot accuracy on the 10,000 test pictures after the last epoch. 15 runs of some 40 s on 2 cores.
"""

import argparse
import itertools
import os
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
import jax.numpy as jnp
import numpy as np

from input_pipeline.blocks import BlockOrder, shuffled
from input_pipeline.sources import Blocks
from rankclip_jax import config as configs
from rankclip_jax.common import tables
from rankclip_jax.common.tokenizer import Tokenizer
from rankclip_jax.study import measure
from rankclip_jax.study.batches import batch_of
from rankclip_jax.study.data import read_labelled, read_pairs
from rankclip_jax.train import optim
from rankclip_jax.train import step as steps
from rankclip_jax.train.session import Session

SHARD, BLOCK = 1000, 64
# Name -> (share of the set in a window, lanes); rows have neither.
ORDERS = {
    "rows": None,
    "blocks, a window of all": (1.0, 1),
    "blocks, a tenth": (0.1, 1),
    "blocks, a hundredth": (0.01, 1),
    "blocks, 64 lanes of one block": (0.01, 64),
}


def rows_of(order: tuple[float, int] | None, seed: int, count: int, total: int) -> np.ndarray:
    """The first `total` rows of the endless stream, a whole number of rows of each lane, as training reads them."""
    if order is None:
        epochs = (shuffled(count, seed, epoch) for epoch in itertools.count())
        return np.fromiter(itertools.chain.from_iterable(epochs), np.int64, total)
    window, lanes = order
    first = np.concatenate([np.arange(begin, begin + SHARD, BLOCK) for begin in range(0, count, SHARD)])
    blocks = Blocks(first, np.minimum(BLOCK, SHARD - first % SHARD), count, lambda *_: None, lambda *_: None)
    dealt = BlockOrder(blocks, seed=seed, lanes=lanes, window_bytes=max(int(window * count), 1))
    own = (itertools.chain.from_iterable(rows for _, rows in dealt.after(lane, 0)) for lane in range(lanes))
    return np.stack([np.fromiter(lane, np.int64, total // lanes) for lane in own], axis=1).ravel()


def classes_in_a_batch(rows_SxB: np.ndarray, class_N: np.ndarray) -> float:
    """The mean over batches."""
    return float(np.mean([len(np.unique(class_N[rows])) for rows in rows_SxB]))


class Experiment:
    """The sorted set on the device, and one program that trains on any order of its rows."""

    def __init__(self, folder: Path, epochs: int):
        config = configs.load(f"study_cifar10:dir={folder}", [f"epochs={epochs}", "loss.objective=rankclip"])
        pairs = read_pairs(config.data, config.data.train, side=32, canvas=32, split="train")
        names = [os.path.dirname(path) for path in tables.read_table(config.data.train).images.to_pylist()]
        by_class_N = np.argsort(names, kind="stable")
        self.class_N = np.unique(names, return_inverse=True)[1][by_class_N]
        tokenizer = Tokenizer.train(pairs.captions, config.tokenizer.vocab_size)
        tokens = tokenizer(pairs.captions, config.model.context_length)
        arrays = {"image": pairs.canvas, "size": pairs.size, "tokens": tokens}
        self._data = {name: jnp.asarray(array[by_class_N]) for name, array in arrays.items()}
        self.per_epoch, self.batch = len(names) // config.batch_size, config.batch_size
        total = self.per_epoch * epochs
        model = Session(config, tokenizer, devices=jax.devices()[:1]).model
        self._tests = {"test": read_labelled("test", config.eval.zero_shot.cifar10, side=32)}
        self._embedder = measure.Embedder(model, tokenizer)
        tx = optim.make_optimizer(config.optim, total, self.per_epoch)
        length = dict(total_steps=total, steps_per_epoch=self.per_epoch)
        step = steps.train_step_function(model, tx, config, None, **length, whole=True)

        def train(seed, rows_SxB, data):
            step_key, window_key = jax.random.split(jax.random.key(seed))

            def one(state, rows_B):
                batch = batch_of(data, rows_B, jax.random.fold_in(window_key, state.step), config.data.crop_scale)
                return step(state, batch, step_key)[0], None

            return jax.lax.scan(one, steps.fresh_state(model, tx, seed), rows_SxB)[0]

        self._train, self.total = jax.jit(train), total

    def accuracy(self, seed: int, rows_SxB: np.ndarray) -> float:
        """On the test pictures, in percent, of a model trained on batches of these rows."""
        state = self._train(seed, jnp.asarray(rows_SxB), self._data)
        return 100 * measure.zero_shot(self._embedder.of(state), self._tests)["zero_shot/test"]


def main() -> None:
    """Prints each run, then a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    flags = parser.parse_args()
    experiment = Experiment(flags.folder, flags.epochs)
    found: dict[str, list] = {name: [] for name in ORDERS}
    for seed in range(flags.seeds):  # all orders of a seed, so that it can be stopped early
        for name, order in ORDERS.items():
            begin, count = time.monotonic(), len(experiment.class_N)
            rows = rows_of(order, seed, count, experiment.total * experiment.batch).reshape(-1, experiment.batch)
            accuracy = experiment.accuracy(seed, rows)
            found[name].append((accuracy, classes_in_a_batch(rows, experiment.class_N)))
            print(f"seed {seed}  {name:30} {accuracy:5.1f} %  {time.monotonic() - begin:4.0f} s", flush=True)
    print("\n| order | classes in a batch | accuracy, % | the seeds' |\n| --- | ---: | ---: | --- |")
    for name, runs in found.items():
        accuracies, classes = zip(*runs, strict=True)
        each = ", ".join(f"{one:.1f}" for one in accuracies)
        print(f"| {name} | {np.mean(classes):.1f} | {np.mean(accuracies):.1f} | {each} |")


if __name__ == "__main__":
    main()
