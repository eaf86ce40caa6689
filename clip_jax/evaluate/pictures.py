"""Pictures that a page can hold."""

import base64
import io

from PIL import Image

from clip_jax.data import images

THUMBNAIL = 96  # pixels


def data_uri(encoded):
  """An image file's picture as a small PNG that a page can hold."""
  picture = Image.fromarray(images.decode(encoded))
  picture.thumbnail((THUMBNAIL, THUMBNAIL))
  buffer = io.BytesIO()
  picture.save(buffer, "png")
  return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
