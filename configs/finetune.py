"""Fine-tuning a trained model on the captioned CIFAR-10 pictures that configs/cifar10.py describes.

rankclip train configs/finetune.py:dir=PATH,start=runs/start trains all of it; docs/tutorials.md says how to train less.
Evaluated on these pictures, and on the drawn shapes that the start of the tutorial was trained on: what was forgotten.
"""

from ml_collections import ConfigDict


def get_config(dir: str = "data/cifar10", start: str = "runs/start", objective: str = "rankclip") -> ConfigDict:
    """`dir`: the folder of the csv files and images; `start`: the model, any path for config.init_from."""
    return ConfigDict(
        dict(
            init_from=start,
            batch_size=None,
            epochs=2,
            log_every=None,
            loss=dict(objective=objective, schedule=None),
            model=dict(name=None),  # that of `start`
            # For the small model of the tutorial. Of OpenAI's, 1e-5: config.optim.lr=None.
            optim=dict(lr=3e-4, weight_decay=0.1, warmup_steps=None, grad_clip_norm=1.0),
            data=dict(
                format="csv",
                train=f"{dir}/train.csv",
                val=f"{dir}/val.csv",
                hint="name the folder of the csv files and unzipped images: --config configs/finetune.py:dir=FOLDER",
                crop_scale=(0.5, 1.0),
                flip=True,
            ),
            eval=dict(
                every_epochs=None,
                zero_shot=dict(
                    cifar10=dict(
                        path=f"{dir}/labels.csv",
                        classes=f"{dir}/classes.json",
                        templates=f"{dir}/templates.json",
                    ),
                    shapes=dict(format="shapes", path="seen"),
                ),
            ),
        )
    )
