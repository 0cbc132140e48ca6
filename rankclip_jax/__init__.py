"""RankCLIP in JAX: contrastive image-text pretraining with ranking consistency."""
