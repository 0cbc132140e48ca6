"""CC3M with the published hyperparameters. `--config configs/cc3m.py:objective=clip,model=RN50` changes the two.

Sources: [p] RankCLIP, arXiv 2404.09387; [c] the code that its authors released; [o] CLIP, arXiv 2103.00020.
"""

from ml_collections import ConfigDict


def get_config(objective: str = "rankclip", model: str = "ViT-B/32") -> ConfigDict:
    """`objective`: of config.loss; `model`: a preset."""
    return ConfigDict(
        dict(
            # Not published for the paper's runs. Chosen: 2,048. A v5e-8 holds it with blocks rematerialised (4 of its
            # 16 GiB a chip) and not without (22 GiB): docs/scaling.md.
            batch_size=2048,
            epochs=64,  # [p]
            log_every=50,
            loss=dict(
                objective=objective,
                lambda_in=1 / 16,  # [p], [c]
                lambda_cross=1 / 16,  # [p], [c]
                schedule="ramp",  # [c]; arXiv v2 of [p] has constant weights and decay="log"
            ),
            model=dict(
                name=model,
                dtype="bfloat16",
                remat=True,
                scan_layers=True,  # compiles several times as fast
            ),
            # OpenAI's byte-pair encoding, 49,408 tokens [o]: a hub id or the path of its tokenizer.json.
            tokenizer=dict(path="openai/clip-vit-base-patch32"),
            optim=dict(
                lr=5e-4,  # [p]
                b1=0.9,  # [p]
                b2=0.999,  # [p]
                eps=1e-8,  # [p]
                weight_decay=0.1,  # [p]
                warmup_steps=10_000,  # [p]
            ),
            data=dict(
                format="csv",
                train="data/cc3m/train.csv",
                val="data/cc3m/val.csv",
                hint="CC3M is a list of URLs from ai.google.com/research/ConceptualCaptions/download: fetch the images "
                "(img2dataset does), write a csv with columns image,caption, give it as --config.data.train=FILE.csv",
            ),
            eval=dict(every_epochs=1),
            checkpoint=dict(every_steps=1000, keep=2),
        )
    )
