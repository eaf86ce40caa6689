"""What the loop writes about a run."""

import json
import shutil

from clip_jax import train
from tests.conftest import tiny


def test_what_signs_a_request_stands_in_no_file(colors, tmp_path):
  """A local file whose pattern looks like a signed URL: the run is one run all the same, and can be resumed."""
  shutil.copy(colors, tmp_path / "colors.tar-token=s3cret")
  config = tiny(data={"source": "tar", "path": f"{tmp_path}/colors.tar?token=s3cret"}, train={"steps": 1})
  train.run(config, tmp_path / "run")
  assert train.run(config, tmp_path / "run").started == 1
  written = (tmp_path / "run/config.json").read_text()
  assert json.loads(written)["data"]["path"] == f"{tmp_path}/colors.tar?token=***"
  for path in (tmp_path / "run").rglob("*"):
    assert path.is_dir() or b"s3cret" not in path.read_bytes(), path
