"""The fields of what users name themselves: parts of a mixture, evaluation sets, rules. As keys.py has its keys."""

from rankclip_jax.config.key import boolean, character, choice, encoding, integer, path, paths, real, string

FORMATS = ("csv", "tfrecord", "webdataset", "folder", "parquet", "tfds", "shapes")

# One source of a mixture (config.data.train.NAME). None: the value of config.data.
MIXTURE_PART = dict(
    path=paths(None),  # as config.data.train
    # share of the samples, relative to the others; None, for all sources: its number of rows
    weight=real(None, above=0),
    format=choice(None, *FORMATS),  # as config.data.format
    image_key=string(None),  # as config.data.image_key
    caption_key=string(None),  # as config.data.caption_key
    captions_per_line=boolean(None),  # as config.data.captions_per_line
    delimiter=character(None),  # as config.data.delimiter
    encoding=encoding(None),  # as config.data.encoding
    image_folder=path(None),  # as config.data.image_folder
    data_dir=path(None),  # as config.data.data_dir
)
# One labelled set for zero-shot classification (config.eval.zero_shot.NAME).
ZERO_SHOT_SET = dict(
    # csv (any table) | folder | clip_benchmark | tfds | shapes (input_pipeline/labelled.py)
    format=choice("csv", "folder", "clip_benchmark", "tfds", "shapes"),
    path=paths(None),  # the file or folder; tfds: "NAME:SPLIT"; shapes: "seen" or "held_out", also "seen:COUNT"
    image_key=string(None),  # csv: the column of paths; None: image or file_name
    label_key=string("label"),  # csv: the column of class names, or of class numbers, starting at 0
    image_folder=path(None),  # csv: as config.data.image_folder
    delimiter=character(","),  # csv: as config.data.delimiter
    encoding=encoding(None),  # csv: as config.data.encoding
    data_dir=path(None),  # tfds: where the sets were prepared; None: TFDS's default
    classes=path(None),  # JSON list of names, in label order, or the set's own in any; None: the set's or protocol's
    templates=path(None),  # JSON list of prompts with {}; None: the same, or "a photo of a {}."
    protocol=choice(None, "openai", "simple"),  # openai | simple: class names and prompts of evaluation/protocols
    protocol_set=string(None),  # the set's name in the protocol; None: NAME
    hint=string(None),  # message for users who do not have the data
)
# One set for a linear probe (config.eval.linear_probe.NAME), tested on `path`.
LINEAR_PROBE_SET = ZERO_SHOT_SET | dict(
    train=paths(None),  # as `path`: the training images
    metric=choice("top1", "mean_per_class"),  # top1 | mean_per_class: selects the regularisation
)
# One set of images with captions (config.eval.retrieval.NAME).
CAPTIONED_SET = dict(
    # csv (any table; the rows of one image are its captions) | clip_benchmark | tfds | shapes
    format=choice("csv", "clip_benchmark", "tfds", "shapes"),
    path=paths(None),  # the file or folder; tfds: "NAME:SPLIT"; shapes: a number of scenes
    image_key=string(None),  # csv: the column of paths; None: image or file_name
    caption_key=string(None),  # csv: the column of captions; None: caption or text
    image_folder=path(None),  # csv: as config.data.image_folder
    delimiter=character(","),  # csv: as config.data.delimiter
    encoding=encoding(None),  # csv: as config.data.encoding
    data_dir=path(None),  # tfds: where the sets were prepared; None: TFDS's default
    hint=string(None),  # message for users who do not have the data
)
# The same for config.eval.geometry.NAME.
GEOMETRY_SET = CAPTIONED_SET | dict(
    sample=integer(1000, 3),  # number of images, from the first, each with its first caption
)
# What a rule of config.optim.rules says of the parameters whose names its regex is found in.
PARAMETER_RULE = dict(
    lr=real(1.0, above=0),  # a factor on the learning rate
    # also of biases, norms and embeddings; None: that of config.optim, on matrices
    weight_decay=real(None, 0),
    freeze=boolean(False),  # True: no gradient, no moments, no change
)
EVAL_SETS = dict(zero_shot=ZERO_SHOT_SET, linear_probe=LINEAR_PROBE_SET, retrieval=CAPTIONED_SET, geometry=GEOMETRY_SET)
