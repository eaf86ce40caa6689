"""Both encoders as ONNX, by way of the model's twin in transformers and torch's own exporter."""

import contextlib
import io
import logging
import warnings
from pathlib import Path

import numpy as np

from clip_jax.convert import containers
from clip_jax.errors import MissingExtraError

FILES = {"image": "image.onnx", "text": "text.onnx"}
INPUTS = {"image": "pixel_values", "text": "input_ids"}
LIMIT = 2**31 - 2**20  # bytes of one file, which is a protocol buffer; larger weights go into a file beside it


def write(folder, twin_folder):
  """Writes `image.onnx` and `text.onnx`.

  Args:
    folder: where.
    twin_folder: the same model as a Hugging Face folder.

  Raises:
    MissingExtraError: torch, transformers or torch's exporter is not installed.
  """
  torch = containers.import_torch("--to onnx")
  try:
    import onnxscript  # noqa: F401  (torch's exporter needs it, and says so late)
    import transformers
  except ImportError as error:
    raise MissingExtraError("--to onnx", "onnx", error.name) from error
  with contextlib.redirect_stderr(io.StringIO()):  # its own progress
    twin = transformers.AutoModel.from_pretrained(twin_folder, dtype=torch.float32, local_files_only=True).eval()
  vision, text = twin.config.vision_config, twin.config.text_config
  tokens = torch.full((2, text.max_position_embeddings), text.vocab_size - 1)
  examples = {"image": torch.zeros(2, 3, vision.image_size, vision.image_size), "text": tokens}
  for tower, file in FILES.items():
    size = sum(parameter.nbytes for parameter in twin.parameters())
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(), _quiet():
      warnings.simplefilter("ignore")  # the exporter's own, of its libraries
      torch.onnx.export(
        _tower(torch, twin, tower),
        (examples[tower],),
        Path(folder) / file,
        dynamo=True,
        input_names=[INPUTS[tower]],
        output_names=[f"{tower}_embeds"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=size > LIMIT,
      )


def _tower(torch, twin, tower):
  class Tower(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.twin = twin

    def forward(self, x):
      if tower == "image":
        features = self.twin.get_image_features(pixel_values=x)
      else:
        features = self.twin.get_text_features(input_ids=x)
      features = getattr(features, "pooler_output", features)  # a tensor before transformers 5
      return features / features.norm(dim=-1, keepdim=True)

  return Tower().eval()


@contextlib.contextmanager
def _quiet():
  # Of operators of torchvision that are not there, and not needed.
  logger = logging.getLogger("torch.onnx")
  before = logger.level
  logger.setLevel(logging.ERROR)
  try:
    yield
  finally:
    logger.setLevel(before)


def run(folder, pixels, tokens):
  """Both encoders of a folder, by onnxruntime.

  Args:
    folder: what `write` wrote to.
    pixels: float32 [batch, 3, size, size], mean and standard deviation removed.
    tokens: int32 [batch, context_length].

  Returns:
    Its name and version, and both embeddings, [batch, embed_dim].
  """
  try:
    import onnxruntime
  except ImportError as error:
    raise MissingExtraError("--verify of ONNX", "onnx", "onnxruntime") from error
  inputs, outputs = {"image": pixels.astype(np.float32), "text": tokens.astype(np.int64)}, []
  for tower, file in FILES.items():
    session = onnxruntime.InferenceSession(Path(folder) / file, providers=["CPUExecutionProvider"])
    outputs.append(session.run(None, {INPUTS[tower]: inputs[tower]})[0])
  return f"onnxruntime {onnxruntime.__version__}", *outputs
