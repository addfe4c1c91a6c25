"""The smallest experiment that walks the whole journey, shared by the tests that need one."""

from __future__ import annotations

# A network of a few thousand weights at a coarse scale: the whole journey in seconds.
TINY = (
    "data.n_folds=2",
    "scale.policy=physical",
    "scale.um_per_px=3.2",
    "tiles.size=64",
    "augment.pipeline=light",
    "model.encoder=tu-test_resnet",
    "model.options={encoder_depth: 3, decoder_channels: [16, 8, 8]}",
    "training.epochs=2",
    "training.samples_per_epoch=16",
    "training.batch_size=4",
    "training.workers=0",
    "model.mean=[0.485, 0.456, 0.406]",
    "model.std=[0.229, 0.224, 0.225]",
    "training.ema_decay=0.9",
    "inference.window=64",
    "inference.views=flips",
)


def overrides(*settings: str) -> list[str]:
    """Command-line arguments for overrides."""
    return [word for setting in settings for word in ("--set", setting)]
