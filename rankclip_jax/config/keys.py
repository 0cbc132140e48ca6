"""Every configuration key with its default and a comment. docs/config.md is generated from this file."""

from ml_collections import ConfigDict

# Keys that may change when a run resumes: they change what is logged, evaluated or kept. mesh, sharding and
# model.attention change trained numbers only by rounding; the others not at all.
MAY_CHANGE = ("log_every", "eval", "checkpoint", "plan", "profile", "study", "mesh", "sharding", "model.attention")

# Listed here so that reading a configuration does not import JAX; a test compares them with rankclip_jax/losses.
OBJECTIVES = ("clip", "rankclip", "rank", "siglip", "cyclip")
SCHEDULES = ("ramp", "constant")
TERMS = ("clip", "siglip", "cross_modal", "in_modal", "cyclic_cross_modal", "cyclic_in_modal")

# One source of a mixture (config.data.train.NAME). None: the value of config.data.
MIXTURE_PART = dict(
    path=None,  # as config.data.train
    weight=None,  # share of the samples, relative to the others; None, for all sources: its number of rows
    format=None,  # as config.data.format
    image_key=None,  # as config.data.image_key
    caption_key=None,  # as config.data.caption_key
    delimiter=None,  # as config.data.delimiter
    data_dir=None,  # as config.data.data_dir
)
# One labelled set for zero-shot classification (config.eval.zero_shot.NAME).
ZERO_SHOT_SET = dict(
    format="csv",  # csv | folder | clip_benchmark | tfds | shapes (input_pipeline/labelled.py)
    path=None,  # the file or folder; tfds: "NAME:SPLIT"; shapes: "seen" or "held_out", also "seen:COUNT"
    image_key="image",  # csv: the column of paths, relative to the file
    label_key="label",  # csv: the column of class numbers, starting at 0
    delimiter=",",  # csv; a .tsv has tabs
    data_dir=None,  # tfds: where the sets were prepared; None: TFDS's default
    classes=None,  # JSON list of class names, in label order; None: those of the set or the protocol
    templates=None,  # JSON list of prompts with {}; None: the same, or "a photo of a {}."
    protocol=None,  # openai | simple: class names and prompts of evaluation/protocols
    protocol_set=None,  # the set's name in the protocol; None: NAME
    hint=None,  # message for users who do not have the data
)
# One set for a linear probe (config.eval.linear_probe.NAME), tested on `path`.
LINEAR_PROBE_SET = ZERO_SHOT_SET | dict(
    train=None,  # as `path`: the training images
    metric="top1",  # top1 | mean_per_class: selects the regularisation
)
# One set of images with captions (config.eval.retrieval.NAME).
CAPTIONED_SET = dict(
    format="csv",  # csv (the rows of one image are its captions) | clip_benchmark | tfds | shapes
    path=None,  # the file or folder; tfds: "NAME:SPLIT"; shapes: a number of scenes
    image_key="image",  # csv: the column of paths
    caption_key="caption",  # csv: the column of captions
    image_folder=None,  # csv: folder of the images, relative to the file
    delimiter=",",  # csv; a .tsv has tabs
    data_dir=None,  # tfds: where the sets were prepared; None: TFDS's default
    hint=None,  # message for users who do not have the data
)
# The same for config.eval.geometry.NAME.
GEOMETRY_SET = CAPTIONED_SET | dict(sample=1000)  # number of images, from the first, each with its first caption
EVAL_SETS = dict(
    zero_shot=ZERO_SHOT_SET, linear_probe=LINEAR_PROBE_SET, retrieval=CAPTIONED_SET, geometry=GEOMETRY_SET
)


def default_config() -> ConfigDict:
    """All keys and their defaults. `None`: see the comment."""
    return ConfigDict(
        dict(
            seed=0,  # of parameters, data order, windows and jitter
            batch_size=256,  # global, over all devices and processes. [c] 128; [o] 32,768
            accumulate=1,  # parts in which a batch goes through the towers: less memory, more time, the same gradient
            epochs=32,  # passes over the training data. [o]; [p] [c] 64
            steps=None,  # number of steps, instead of `epochs`
            init_from=None,  # start from a workdir, export, OpenAI or RankCLIP .pt, open_clip or Hugging Face model
            init_towers="both",  # both | vision | text: the towers to take from `init_from`
            init_skip=(),  # regexes over parameters (visual/proj ...) that are initialised fresh
            log_every=50,  # steps between log lines
            profile=None,  # (first, last) steps to trace into WORKDIR/profile
            loss=dict(
                objective="rankclip",  # clip | rankclip | rank (ranking alone) | siglip | cyclip
                # weights of additional terms (TERMS of rankclip_jax/config/keys.py), or new weights of the objective's
                # own; with a schedule: {"weight": 0.25, "schedule": "ramp"}
                terms={},
                lambda_in=1 / 16,  # weight of the in-modal ranking term. [p] [c]
                lambda_cross=1 / 16,  # weight of the cross-modal ranking term. [p] [c]
                schedule="ramp",  # ramp: 0 to 2 over the epochs | constant: 1. [c]; [p] v2 constant
                decay=None,  # None | "log": list position k has weight 1 / log(k + 1). [c]; [p] v2 "log"
                top_k=None,  # count only the first k positions of every list
                keep_self=True,  # keep an item in its own in-modal lists. [c]
                form="exact",  # exact | released: ranking terms with the authors' 1e-10 inside the logarithm
            ),
            model=dict(
                name="ViT-B/32",  # a preset of rankclip_jax/models/presets.py
                image_size=None,  # None: the preset's
                context_length=None,  # tokens per caption; None: the preset's
                dtype="float32",  # of the computation: float32 | bfloat16; parameters stay float32
                activation=None,  # quick_gelu | gelu; None: the preset's
                attention="auto",  # auto | xla | cudnn: self-attention kernel; auto: cuDNN if possible, else XLA
                scan_layers=False,  # compile one layer for all of a tower: faster compilation, same numbers
                logit_scale=None,  # initial logarithm of the logit scale; None: ln(1 / 0.07), siglip: ln 10. [o] [s]
                logit_bias=None,  # initial value of siglip's learned bias; None: no bias, siglip: -10. [s]
                # Recompute activations in the backward pass: less memory, same numbers. True: all of a block; or a
                # policy of models/transformer.py: dots_saveable | dots_with_no_batch_dims_saveable
                remat=False,
                vision={},  # changed fields of the preset's vision tower
                text={},  # changed fields of the preset's text tower
            ),
            tokenizer=dict(
                path=None,  # tokenizer.json, or a Hugging Face hub id; None: train one on the captions
                vocab_size=4096,  # largest vocabulary of the trained tokenizer
            ),
            optim=dict(
                lr=5e-4,  # AdamW's learning rate after the warm-up, then a cosine to 0. [p] [c] [o]
                b1=0.9,  # decay of the first moment. [p] [c] [o]
                b2=0.999,  # decay of the second moment. [p] [c]; [o] 0.98 for vision transformers
                eps=1e-8,  # added to the root of the second moment. [p] [c]; [o] 1e-6 for vision transformers
                weight_decay=0.1,  # only on matrices, not on biases, norms and the logit scale. [p] [c]; [o] 0.2
                warmup_steps=10_000,  # steps in which the learning rate rises from 0. [p] [c]; [o] 2,000
                grad_clip_norm=None,  # clips the global gradient norm; None: no clipping. [c]
                freeze=None,  # vision | text: the frozen tower (LiT: vision, with init_from)
                layer_lr_decay=None,  # a block's learning rate as a share of the next one's, for fine-tuning
            ),
            data=dict(
                format="shapes",  # csv | tfrecord | webdataset | folder | parquet | tfds | shapes
                # A path, {00000..00331} range, glob, folder or list of these, also gs://; tfds: NAME:SPLIT; shapes: the
                # number of scenes per epoch. Or a mixture: name -> fields of MIXTURE_PART.
                train=None,
                val=None,  # the same, for the validation loss; None: none. Every row of a mixture is used once
                hint=None,  # message for users who do not have the data
                # Column, feature or member extension; of several, the first that a sample has. None: csv and parquet:
                # image; tfrecord and webdataset: jpg, jpeg, png or webp; tfds: its image feature.
                image_key=None,
                caption_key=None,  # None: caption; shards: txt or caption; tfds: its caption, captions, or a text
                delimiter=",",  # csv; a .tsv has tabs
                data_dir=None,  # tfds: where the sets were prepared; None: TFDS's default
                cache_dir=None,  # for offsets of shards and unpacked Parquet; None: next to the data, or ~/.cache
                crop_scale=(0.9, 1.0),  # share of the image's area that a training crop covers
                flip=False,  # mirror half of the training images
                color_jitter=None,  # (brightness, contrast, saturation): each factor lies within 1 +- its value
                resize="device",  # device | host: where windows are cut out and resized; host: by PIL, slower
                canvas=None,  # side of the square on which the host sends an image. None: 1.8 times image_size
                two_views=False,  # also a second window and an edited caption of each sample ("inmodal"). [y] [c]
                synonyms=None,  # JSON table of words for the edited captions: {"sofa": ["couch"]}
                recover_truncated=False,  # use the readable part of a truncated JPEG, grey below, as a good sample
                max_bad_fraction=0.1,  # stop when the share of unusable samples exceeds this
            ),
            eval=dict(
                every_epochs=1,  # epochs between zero-shot evaluations during training
                diagnostics=False,  # rank agreement, gradient cosine, modality gap ... on the first validation batch
                zero_shot={},  # name -> fields of ZERO_SHOT_SET
                suite=None,  # "all" or names of evaluation/suite.py: published zero-shot sets in data_dir
                data_dir=None,  # the folder with the sets of config.eval.suite
                retrieval={},  # name -> fields of CAPTIONED_SET
                linear_probe={},  # name -> fields of LINEAR_PROBE_SET
                geometry={},  # name -> fields of GEOMETRY_SET
                robustness=dict(
                    reference="imagenet",  # a zero-shot set
                    # Zero-shot sets that show the same classes differently.
                    shifted=("imagenet_v2", "imagenet_sketch", "imagenet_a", "imagenet_r"),
                    baselines=None,  # JSON {"imagenet_a": [[reference, shifted], ...], ...} of standard models
                ),
                every=dict(
                    retrieval=1,  # epochs between evaluations during training; None: in --mode=eval only
                    linear_probe=None,  # the same
                    geometry=1,  # the same
                ),
                model=None,  # --mode=eval: an export or an OpenAI .pt to evaluate instead of the workdir's checkpoint
            ),
            checkpoint=dict(
                folder=None,  # None: WORKDIR/checkpoints; or a bucket: gs://BUCKET/RUN
                every_steps=None,  # None: at the end of every epoch only
                keep=2,  # number of latest checkpoints kept
                keep_every=None,  # also save at every multiple of this number of steps, and keep these permanently
                best=None,  # metric (as in metrics.jsonl) whose best checkpoint is also kept
            ),
            study=dict(  # settings of python -m rankclip_jax.study
                objectives={},  # name -> changed keys of config.loss
                baseline="clip",  # the objective that the others are compared with
                seeds=3,  # runs of each objective: seeds 0, 1, 2
                more_seeds={},  # objective -> its number of seeds
                limit=None,  # training pairs, from the first of data.train; None: all
                lrs=(),  # learning rates to choose from, for each objective; empty: optim.lr
                search_seed=1000,  # seed of that search; must differ from the study's seeds
                select_on=(),  # names in eval.zero_shot: their mean top-1 on the selection part decides; empty: all
                select_share=0.2,  # the selection part, from the first, also shown in curves; results use the rest
                pairs=512,  # of data.val, from the first: for retrieval, rank agreement, geometry, gradients
                probe_l2=0.01,  # penalty of the linear probe, which is trained on the selection part
                at_once=1,  # seeds of one objective that train together under vmap
            ),
            plan=dict(  # settings of --mode=plan
                target="v5e:4x4",  # a TPU topology, or a number of GPUs: 8xH100
                utilisation=0.4,  # share of the devices' peak, for the time estimate
                samples=None,  # training samples, for the estimate of the whole schedule
            ),
            mesh=dict(data=-1),  # axis -> devices; -1: all remaining
            # replicated | fsdp | tensor | fsdp+tensor (parallel/sharding.py), or a list of rules (regex over parameter
            # paths, mesh axes of their last dimensions). None: replicated
            sharding=None,
        )
    )
