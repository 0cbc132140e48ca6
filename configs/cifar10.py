"""Small real images in the csv layout: 20,000 captioned CIFAR-10 pictures, zero-shot on the 10,000 test images.

The folder holds train.csv and val.csv (image,caption), labels.csv (image,label), classes.json and templates.json:
--config configs/cifar10.py:dir=PATH,objective=clip
"""

from ml_collections import ConfigDict


def get_config(dir: str = "data/cifar10", objective: str = "rankclip") -> ConfigDict:
    """`dir`: the folder of the csv files and images; `objective`: of config.loss."""
    return ConfigDict(
        dict(
            batch_size=128,
            epochs=10,
            log_every=50,
            loss=dict(objective=objective),
            model=dict(
                name="RN-tiny",
                image_size=32,
                context_length=16,
                text=dict(layers=1),
            ),
            tokenizer=dict(vocab_size=512),
            optim=dict(lr=2e-3, weight_decay=0.1, warmup_steps=200, grad_clip_norm=1.0),
            data=dict(
                format="csv",
                train=f"{dir}/train.csv",
                val=f"{dir}/val.csv",
                hint="name the folder of the csv files and unzipped images: --config configs/cifar10.py:dir=FOLDER",
                crop_scale=(0.5, 1.0),
                flip=True,
                canvas=32,  # no picture is larger
            ),
            eval=dict(
                every_epochs=2,
                zero_shot=dict(
                    cifar10=dict(
                        path=f"{dir}/labels.csv",
                        classes=f"{dir}/classes.json",
                        templates=f"{dir}/templates.json",
                    )
                ),
                # The images lie in a folder a class. Only --mode=eval does this one.
                linear_probe=dict(cifar10=dict(format="folder", train=f"{dir}/train", path=f"{dir}/test")),
                geometry=dict(val=dict(path=f"{dir}/val.csv")),
            ),
        )
    )
