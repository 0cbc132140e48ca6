"""Every configuration key with its default and a comment. docs/config.md is generated from this file and fields.py."""

from typing import Any

from ml_collections import ConfigDict

from rankclip_jax.config.fields import FORMATS
from rankclip_jax.config.key import (
    Key,
    boolean,
    character,
    choice,
    choices,
    encoding,
    integer,
    pair,
    path,
    paths,
    real,
    reals,
    regex_rules,
    regexes,
    rules,
    string,
    strings,
    whole_pair,
)

# Keys that may change when a run resumes: they change what is logged, evaluated or kept. mesh, sharding and
# model.attention change trained numbers only by rounding; epochs and steps where the schedule allows it
# (train/workdir.py); the others not at all.
MAY_CHANGE = ("log_every", "eval", "checkpoint", "plan", "profile", "study", "mesh", "sharding", "model.attention")
MAY_CHANGE += ("epochs", "steps", "log")

_SEED = 2**32 - 1  # the largest seed: JAX's keys are of its last 32 bits alone

# What --help of training lists.
USUAL = ("batch_size", "accumulate", "epochs", "steps", "seed", "log_every", "log", "init_from", "init_towers")
USUAL += ("sharding",)
USUAL += ("loss.objective", "loss.lambda_in", "loss.lambda_cross", "loss.schedule", "loss.decay")
USUAL += ("model.name", "model.image_size", "model.context_length", "model.dtype", "model.remat", "model.scan_layers")
USUAL += ("optim.lr", "optim.warmup_steps", "optim.weight_decay", "optim.grad_clip_norm", "optim.schedule")
USUAL += ("optim.name", "optim.freeze", "optim.layer_lr_decay", "optim.rules", "optim.ema", "optim.lora")
USUAL += ("data.train", "data.val", "data.format", "data.image_key", "data.caption_key", "data.crop_scale", "data.flip")
USUAL += ("data.max_bad_fraction", "tokenizer.path", "tokenizer.vocab_size", "eval.every_epochs", "eval.suite")
USUAL += ("eval.data_dir", "checkpoint.every_steps", "checkpoint.keep", "checkpoint.best")

# Values of keys that a stored configuration lacks, because it is older than they are, where its run did not behave as
# today's default does. So that old workdirs resume as they began.
BEFORE: dict[str, Any] = {"model.pack_text": "off", "data.squash": "no", "data.shuffle": "rows"}

# What may be None (pack_text and shuffle: auto) until a run starts, and is settled there by the data and the devices
# (train/resolve.py).
RESOLVED = ("batch_size", "epochs", "log_every", "optim.lr", "optim.warmup_steps", "loss.schedule", "loss.ramp_epochs")
RESOLVED += ("data.mean", "data.std", "data.squash", "data.shuffle", "data.lanes")
RESOLVED += ("eval.every_epochs", "model.pack_text", "model.pack_rows")
# Groups that also take fields of the preset, which models/presets.py checks.
OPEN = ("config.model.vision",)
# Groups that are given whole, not key by key: one tower's fields, or one mesh's axes, mean nothing to another.
WHOLE = ("config.model.vision", "config.model.text", "config.mesh")
# Of config.model, where its name is None.
ARCHITECTURE = ("name", "image_size", "context_length", "embed_dim", "activation", "vision", "text")

# Listed here so that reading a configuration does not import JAX; a test compares them with rankclip_jax/losses.
OBJECTIVES = ("clip", "rankclip", "rank", "siglip", "cyclip")
SCHEDULES = ("ramp", "constant")
TERMS = ("clip", "siglip", "cross_modal", "in_modal", "cyclic_cross_modal", "cyclic_in_modal")


# Every key. Groups whose keys are the user's own (names, axes, fields of a preset) are plain dicts: {}.
KEYS = dict(
    seed=integer(0, 0, high=_SEED),  # of parameters, data order, windows and jitter
    # global, over all devices and processes; None: by the number of pairs and the devices. [c] 128; [o] 32,768
    batch_size=integer(256, 1, optional=True),
    # parts in which a batch goes through the towers: less memory, more time, the same gradient
    accumulate=integer(1, 1),
    # passes over the training data; None: by the number of pairs and the devices. [o]; [p] [c] 64
    epochs=integer(32, 1, optional=True),
    steps=integer(None, 1),  # number of steps, instead of `epochs`
    # start from a workdir, export, OpenAI or RankCLIP .pt, open_clip or Hugging Face model; or a hub id
    init_from=path(None),
    init_towers=choice("both", "vision", "text"),  # both | vision | text: the towers to take from `init_from`
    init_skip=regexes(()),  # regexes over parameters (visual/proj ...) that are initialised fresh
    log_every=integer(50, 1, optional=True),  # steps between log lines; None: about 50 lines
    # where numbers and pictures also go, beside metrics.jsonl: tensorboard (files in WORKDIR), wandb (pip install it:
    # numbers, configuration and pictures of the evaluation sets are sent to its server)
    log=choices(("tensorboard",), "tensorboard", "wandb"),
    # (first, last) steps to trace into WORKDIR/profile
    profile=whole_pair(None, "(first, last), steps counted from 1", lambda first, last: 1 <= first <= last),
    loss=dict(
        objective=choice("rankclip", *OBJECTIVES),  # clip | rankclip | rank (ranking alone) | siglip | cyclip
        # weights of additional terms (TERMS of rankclip_jax/config/keys.py), or new weights of the objective's
        # own; with a schedule: {"weight": 0.25, "schedule": "ramp"}
        terms={},
        lambda_in=real(1 / 16, 0),  # weight of the in-modal ranking term. [p] [c]
        lambda_cross=real(1 / 16, 0),  # weight of the cross-modal ranking term. [p] [c]
        # ramp: 0 in the first epoch, to 2 over the others | constant: 1 | None: ramp; constant for a run of one epoch.
        # [c]; [p] v2 constant
        schedule=choice("ramp", *SCHEDULES, None),
        # epochs of the ramp, which then keeps its last weight; None: those of the run
        ramp_epochs=integer(None, 1),
        # None | "log": list position k has weight 1 / log(k + 1). [c]; [p] v2 "log"
        decay=choice(None, "log"),
        top_k=integer(None, 1),  # count only the first k positions of every list
        # items of a list, a divisor of the batch: the ranking terms are computed within groups of so many consecutive
        # rows; another hyper-parameter (docs/ranking_loss.md). None: the whole batch
        list_size=integer(None, 2),
        keep_self=boolean(True),  # keep an item in its own in-modal lists. [c]
        # exact | released: ranking terms with the authors' 1e-10 inside the logarithm
        form=choice("exact", "released"),
    ),
    model=dict(
        # a preset of rankclip_jax/models/presets.py. None: with init_from, the model there; otherwise a ViT by the
        # number of pairs and the devices
        name=string("ViT-B/32", optional=True),
        image_size=integer(None, 1),  # None: the preset's
        context_length=integer(None, 2),  # tokens per caption; None: the preset's
        embed_dim=integer(None, 1),  # of the embeddings that both towers end in; None: the preset's
        # of the computation: float32 | bfloat16; parameters stay float32
        dtype=choice("float32", "bfloat16"),
        activation=choice(None, "quick_gelu", "gelu", "gelu_tanh"),  # quick_gelu | gelu | gelu_tanh; None: the preset's
        # auto | xla | cudnn: self-attention kernel; auto: cuDNN if possible, else XLA
        attention=choice("auto", "xla", "cudnn"),
        # auto | on | off: captions one behind the other in rows of the text tower, which then computes no padding; the
        # same numbers but for rounding. auto: where that saves a tenth of the tokens or more (docs/scaling.md)
        pack_text=choice("auto", "on", "off"),
        # (rows, captions): so many rows for so many captions, a device's share of a part of a batch; a batch that needs
        # more is padded. None: measured on the captions, and measured again for another share
        pack_rows=whole_pair(None, "(rows, captions) with 1 <= rows <= captions", lambda rows, n: 1 <= rows <= n),
        scan_layers=boolean(False),  # compile one layer for all of a tower: faster compilation, same numbers
        # initial logarithm of the logit scale, from 0 to ln 100; None: ln(1 / 0.07), siglip: ln 10. [o] [s]
        logit_scale=real(None),
        logit_bias=real(None),  # initial value of siglip's learned bias; None: no bias, siglip: -10. [s]
        # Recompute activations in the backward pass: less memory, same numbers. True: all of a block; or a
        # policy of models/transformer.py: dots_saveable | dots_with_no_batch_dims_saveable
        remat=choice(False, True, "dots_saveable", "dots_with_no_batch_dims_saveable"),
        # changed fields of the preset's vision tower, and what a ViT leaves out in training
        vision=dict(
            # share of the patches that each image leaves out in training, drawn anew in each step (FLIP, arXiv
            # 2212.00794): 0.5 about halves the vision tower's work
            patch_dropout=real(0.0, 0, below=1),
            # share of the steps, from the first, that leave patches out; the rest sees whole images
            patch_dropout_until=real(1.0, 0, 1),
        ),
        text={},  # changed fields of the preset's text tower
    ),
    tokenizer=dict(
        # tokenizer.json, its folder (or vocab.json and merges.txt), or a Hugging Face hub id; None: train one on the
        # captions
        path=path(None),
        vocab_size=integer(4096, 2, high=2**24),  # largest vocabulary of the trained tokenizer
    ),
    optim=dict(
        # standard | released: as in the authors' code, the rates of an epoch later, and decay also on class and
        # position embeddings and some gains (docs/ranking_loss.md). [c] released
        recipe=choice("standard", "released"),
        # adamw | lion | adafactor | muon, for matrices, and AdamW for the rest (docs/finetuning.md). Each multiplies
        # weight_decay by the rate. [p] [c] [o]
        name=choice("adamw", "lion", "adafactor", "muon"),
        # learning rate after the warm-up; None: by the model, or for fine-tuning with init_from. [p] [c] [o]
        lr=real(5e-4, above=0, optional=True),
        # cosine: to 0 over the rest of the steps | constant | wsd: constant, then linearly to 0. [p] [c] [o]
        schedule=choice("cosine", "constant", "wsd"),
        decay_steps=integer(None, 1),  # wsd: the last steps, in which the rate falls
        b1=real(0.9, 0, below=1),  # decay of the first moment. [p] [c] [o]
        # decay of the second moment; lion: of its only moment, 0.99 by its authors. [p] [c]; [o] 0.98 for vision
        # transformers
        b2=real(0.999, 0, below=1),
        # added to the root of the second moment. [p] [c]; [o] 1e-6 for vision transformers
        eps=real(1e-8, above=0),
        # only on matrices, not on biases, norms and the logit scale. [p] [c]; [o] 0.2
        weight_decay=real(0.1, 0),
        # steps in which the learning rate rises from 0; None: a tenth of all, at most 500. [p] [c]; [o] 2,000
        warmup_steps=integer(10_000, 0, optional=True),
        grad_clip_norm=real(None, above=0),  # clips the global gradient norm; None: no clipping. [c]
        # vision | text: the frozen tower (LiT: vision, with init_from)
        freeze=choice(None, "vision", "text"),
        # a block's learning rate as a share of the next one's, for fine-tuning
        layer_lr_decay=real(None, above=0, high=1),
        # (regex, fields of PARAMETER_RULE) pairs: of those whose regex is found in a parameter's name, such as
        # visual/transformer/resblocks_0/mlp/c_fc/kernel, the first counts (docs/finetuning.md)
        rules=regex_rules(()),
        # decay of an average of the weights over the steps, kept and evaluated beside them; None: none
        ema=real(None, above=0, below=1),
        # rank of adapters (LoRA) of the attention and MLP matrices, with init_from: they and the logit scale are
        # trained, the towers are frozen; None: none
        lora=integer(None, 1),
    ),
    data=dict(
        # csv (also tsv, .jsonl, COCO's captions) | tfrecord | webdataset | folder | parquet | tfds | shapes
        # None: by the path of `train`
        format=choice("shapes", None, *FORMATS),
        # A path, {00000..00331} range, glob, folder or list of these, also gs://, s3://, http(s)://; tfds:
        # NAME:SPLIT; shapes: the number of scenes per epoch. Or a mixture: name -> fields of MIXTURE_PART.
        train=paths(None),
        val=paths(None),  # the same, for the validation loss; None: none. Every row of a mixture is used once
        hint=string(None),  # message for users who do not have the data
        # Column, feature or member extension; of several, the first that a sample has. None: csv: image or file_name;
        # parquet: image or jpg; tfrecord: jpg, jpeg, png or webp; webdataset: any image; tfds: its image feature.
        image_key=string(None),
        # None: csv: caption or text; shards: txt or caption, of parquet also text; tfds: its caption, captions, or a
        # text. webdataset, parquet and .jsonl: also a path inside JSON, such as json:caption
        caption_key=string(None),
        captions_per_line=boolean(False),  # each line of a text is a caption of its own
        delimiter=character(","),  # csv; a .tsv has tabs
        # of a csv without a byte order mark, and of .txt files; what it cannot decode is a bad sample. None: UTF-8, and
        # a csv in any other is refused
        encoding=encoding(None),
        # csv: folder of the images, relative to the file; None: the file's own
        image_folder=path(None),
        data_dir=path(None),  # tfds: where the sets were prepared; None: TFDS's default
        # auto | rows | blocks: what is shuffled in training: all rows; or blocks of tars, TFRecord and Parquet, read in
        # one request each, and rows within windows of blocks (docs/input_pipeline.md). auto: blocks where not all of
        # such shards are local, but rows in a mixture by weights, and where blocks are fewer than processes
        shuffle=choice("auto", "rows", "blocks"),
        block_rows=integer(64, 1),  # neighbouring rows of a shard that are a block; in Parquet a row group is one
        # MiB of blocks, of all lanes together, whose rows are shuffled; two such windows are in memory
        window_mb=integer(1024, 1),
        # with blocks: streams, each of which gives an equal share of every batch; a process reads some of them. None:
        # the greatest common divisor of 64 and the batch, less where blocks are few, or large for a window
        lanes=integer(None, 1),
        # for the index of shards (it may be in a bucket) and unpacked Parquet; None: next to the data, or ~/.cache
        cache_dir=path(None),
        # share of the image's area that a training crop covers
        crop_scale=pair((0.9, 1.0), "(low, high) with 0 < low <= high <= 1", lambda low, high: 0 < low <= high <= 1),
        flip=boolean(False),  # mirror half of the training images
        # of the channels of pixels in [0, 1], which are normalised by them; None: those of init_from, or of the model's
        # kind: CLIP's, or SigLIP's 0.5. [o]
        mean=reals(None, 3),
        std=reals(None, 3),  # the same
        # no | bicubic | bilinear: evaluate on the whole image, resized to a square whatever its ratio, and not on the
        # central square; None: as init_from, or the model's kind: bicubic for SigLIP's. [s]
        squash=choice(None, "no", "bicubic", "bilinear"),
        # (brightness, contrast, saturation): each factor lies within 1 +- its value
        color_jitter=reals(None, 3),
        # device | host: where windows are cut out and resized; host: by PIL, slower
        resize=choice("device", "host"),
        # side of the square on which the host sends an image. None: 1.8 times image_size
        canvas=integer(None, 1),
        # also a second window and an edited caption of each sample ("inmodal"). [y] [c]
        two_views=boolean(False),
        synonyms=path(None),  # JSON table of words for the edited captions: {"sofa": ["couch"]}
        # use the readable part of a truncated JPEG, grey below, as a good sample
        recover_truncated=boolean(False),
        # a picture of more MB is not read, and unusable; in evaluation sets: of more than 100
        max_file_mb=integer(100, 1),
        max_bad_fraction=real(0.1, 0, 1),  # stop when the share of unusable samples exceeds this
    ),
    eval=dict(
        # images or texts at a time, over all devices; None: the training batch, at most 256 a device, and without
        # a training 256 a device, 32 a CPU
        batch_size=integer(None, 1),
        # epochs between zero-shot evaluations during training; None: about 10 of them
        every_epochs=integer(1, 1, optional=True),
        # rank agreement, gradient cosine, modality gap ... on the first validation batch
        diagnostics=boolean(False),
        zero_shot={},  # name -> fields of ZERO_SHOT_SET
        suite=strings(None),  # "all" or names of evaluation/suite.py: published zero-shot sets in data_dir
        data_dir=path(None),  # the folder with the sets of config.eval.suite, or the one set's own folder
        retrieval={},  # name -> fields of CAPTIONED_SET
        linear_probe={},  # name -> fields of LINEAR_PROBE_SET
        geometry={},  # name -> fields of GEOMETRY_SET
        robustness=dict(
            reference=string("imagenet"),  # a zero-shot set
            # Zero-shot sets that show the same classes differently.
            shifted=strings(("imagenet_v2", "imagenet_sketch", "imagenet_a", "imagenet_r")),
            # JSON {"imagenet_a": [[reference, shifted], ...], ...} of standard models
            baselines=path(None),
        ),
        every=dict(
            # epochs between evaluations during training; 0: as every_epochs; None: in --mode=eval only
            retrieval=integer(1, 0, optional=True),
            linear_probe=integer(None, 0),  # the same
            geometry=integer(1, 0, optional=True),  # the same
        ),
        # --mode=eval: what to evaluate instead of the workdir's checkpoint: any path or hub id that init_from takes
        model=path(None),
    ),
    checkpoint=dict(
        folder=path(None),  # None: WORKDIR/checkpoints; or a bucket: gs://BUCKET/RUN
        every_steps=integer(None, 1),  # None: at the end of every epoch only
        keep=integer(2, 1),  # number of latest checkpoints kept
        # also save at every multiple of this number of steps, and keep these permanently
        keep_every=integer(None, 1),
        # metric of an evaluation (as in metrics.jsonl) whose best checkpoint is also kept: the one where it is highest;
        # where validation losses, alignment, uniformity or a drop in robustness are lowest
        best=string(None),
    ),
    study=dict(  # settings of python -m rankclip_jax.study
        objectives={},  # name -> changed keys of config.loss
        # name -> changed groups of the configuration, and "objectives", those to train under it (none: all); no
        # conditions: the configuration as it is
        conditions={},
        # name -> {"metric": NAME, "contrasts": {label: formula}}, such as "noisy/rankclip - noisy/clip": what the
        # report answers first, tested together by Holm's method (study/questions.py)
        questions={},
        baseline=string("clip"),  # the objective that the others are compared with
        seeds=integer(3, 1),  # runs of each objective: seeds 0, 1, 2
        more_seeds={},  # objective -> its number of seeds
        limit=integer(None, 1),  # training pairs, from the first of data.train; None: all
        mismatched=real(0.0, 0, 1),  # share of the training pairs that have another pair's caption
        duplicates=real(0.0, 0, 1),  # share of the training pairs that nearly repeat another pair
        lrs=reals((), None),  # learning rates to choose from, for each objective; empty: optim.lr
        search_seed=integer(1000, 0, high=_SEED),  # seed of that search; must differ from the study's seeds
        # names in eval.zero_shot: their mean top-1 on the selection part decides; empty: all
        select_on=strings(()),
        # the selection part, from the first, also shown in curves; results use the rest
        select_share=real(0.2, above=0, below=1),
        # of data.val, from the first: for retrieval, rank agreement, geometry, gradients
        pairs=integer(512, 3),
        probe_l2=real(0.01, 0),  # penalty of the linear probe, which is trained on the selection part
        at_once=integer(1, 1),  # seeds of one objective that train together under vmap, for an accelerator
        processes=integer(1, 1),  # that share the runs, on this machine
    ),
    plan=dict(  # settings of --mode=plan
        target=string("v5e:4x4"),  # a TPU topology, or a number of GPUs: 8xH100
        utilisation=real(0.4, above=0, high=1),  # share of the devices' peak, for the time estimate
        # training samples, for the estimate of the whole schedule; None: of a run that is there, or rows of a table
        samples=integer(None, 1),
    ),
    mesh=dict(data=-1),  # axis -> devices; -1: all remaining
    # replicated | fsdp | tensor | fsdp+tensor (parallel/sharding.py), or a list of rules (regex over parameter
    # paths, mesh axes of their last dimensions). None: replicated
    sharding=rules(None, "replicated", "fsdp", "tensor", "fsdp+tensor"),
)


def default_config() -> ConfigDict:
    """All keys with their defaults."""
    return ConfigDict(defaults(KEYS))


def defaults(keys: dict) -> dict[str, Any]:
    """Declarations -> their defaults."""

    def default(value):
        return value.default if isinstance(value, Key) else defaults(value) if isinstance(value, dict) else value

    return {name: default(value) for name, value in keys.items()}
