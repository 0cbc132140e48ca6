"""Turns image-caption data into batches of uint8 images and int32 tokens. The only package that uses TensorFlow."""

from rankclip_jax.common.errors import InputError


def cpu_only() -> None:
    """Keeps TensorFlow, which only reads data here, off the GPUs of this process: it would take all their memory.

    Everything that opens data calls it. If TensorFlow does anything before that, call this first. It applies to the
    whole process and cannot be undone.

    Raises:
      InputError: TensorFlow has already started with GPUs.
    """
    from input_pipeline.tensorflow_import import tf  # here, since shapes.py and download.py do without

    try:
        tf.config.set_visible_devices([], "GPU")
    except RuntimeError as error:
        raise InputError(
            "TensorFlow holds the GPUs of this process, whose memory JAX needs: call input_pipeline.cpu_only() before "
            "TensorFlow does anything, in a notebook after a restart"
        ) from error
