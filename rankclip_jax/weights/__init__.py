"""Weight files of this and other projects: layouts, checkpoints, and loading from any path (pretrained)."""
