"""No secret of a path, such as what signs a URL, on a screen or on disk."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys

import pytest

from clip_jax import train
from clip_jax.data import sources
from clip_jax.data.pipeline import BadRecords
from clip_jax.errors import UsageError, redact
from clip_jax.report import page
from tests.conftest import COMPILED, tiny
from tests.data import buckets
from tests.test_security import ROOT, cli, write_tar

SECRET = "s3cret"
SIGNED = f"X-Amz-Signature={SECRET}"


def test_a_run_whose_mixture_has_signed_urls_shows_the_secret_nowhere(tmp_path, monkeypatch, capfd):
  """Also where records are bad, whose names are made of the path; of one path it is in tests/train/test_loop.py."""
  monkeypatch.setenv("CLIP_JAX_CACHE", str(tmp_path / "cache"))
  shard = tmp_path / f"a.tar?{SIGNED}"
  write_tar(shard, [f"{number:03}" for number in range(20)], bad=["003", "004"])
  other = tmp_path / f"b.tar?{SIGNED}"
  write_tar(other, [f"{number:03}" for number in range(20)], bad=["005"])
  mixture, workdir = ((str(shard), 1.0), (str(other), 1.0)), tmp_path / "run"
  train.run(tiny(data={"source": "tar", "max_bad_share": 1.0, "mixture": mixture}), workdir)
  page.write(workdir)
  assert (workdir / "bad_records.jsonl").read_text().count("a.tar?X-Amz-Signature=***") >= 2
  for path in workdir.rglob("*"):
    assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path
  shown = capfd.readouterr()
  assert SECRET not in shown.out + shown.err


def test_a_bad_record_is_known_again_whose_source_has_a_secret(tmp_path):
  for _ in range(2):
    counter = BadRecords(tmp_path / "bad_records.jsonl", 1.0)
    for source in ("a", "b"):
      counter.report({"index": 1, "source": f"s3://bucket/{source}.tar?{SIGNED}"}, "key", "error", 2)
  lines = [json.loads(line) for line in (tmp_path / "bad_records.jsonl").read_text().splitlines()]
  assert [line["source"] for line in lines] == [f"s3://bucket/{source}.tar?X-Amz-Signature=***" for source in ("a", "b")]


@pytest.mark.parametrize("kind", ["s3", "gs"])
@pytest.mark.parametrize("how", ["credentials", "missing", "refused", "broken"])
def test_what_is_said_of_a_store_has_no_secret(tmp_path, kind, how):
  """Whoever reads a log of a job that failed can read from no bucket by it."""
  with getattr(buckets, kind)("pictures") as bucket:
    signed = bucket.url(f"a.tar?{SIGNED}") if how != "credentials" else f"{kind}://me:{SECRET}@pictures/a.tar"
    if how == "broken":
      bucket.put(f"a.tar?{SIGNED}", b"no archive" * 100)
    bucket.proxy.forbid = how == "refused"
    environment = {**bucket.environment, "CLIP_JAX_CACHE": str(tmp_path), "HOME": str(tmp_path)}
    done = cli("data", "inspect", f"tar:{signed}", cwd=tmp_path, codes=(1, 2), environment=environment)
  assert "a.tar" in done.stderr and "***" in done.stderr
  assert SECRET not in done.stdout + done.stderr


def test_a_run_that_cannot_begin_says_no_secret_and_leaves_none(tmp_path):
  path = f"{tmp_path}/a.tar?{SIGNED}"
  variables = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(COMPILED)}
  command = [sys.executable, "main.py", "--config=tests/end_to_end/recipe.py", f"--workdir={tmp_path / 'run'}", f"--config.data.path=tar:{path}"]
  done = subprocess.run(command, cwd=ROOT, env=variables, text=True, capture_output=True, timeout=300, check=False)
  assert done.returncode == 2 and "no such file" in done.stderr
  assert SECRET not in done.stdout + done.stderr
  for written in tmp_path.rglob("*"):
    assert written.is_dir() or SECRET.encode() not in written.read_bytes(), written


@pytest.mark.parametrize("form", ["array_record", "tar"])
def test_a_prepared_data_set_does_not_carry_what_signed_its_input(tmp_path, monkeypatch, form):
  """Neither when it is finished, nor while it is made."""
  pytest.importorskip("apache_beam", reason="apache-beam is not installed: pip install 'clip_jax[beam]'")
  monkeypatch.setenv("CLIP_JAX_CACHE", str(tmp_path / "cache"))
  from clip_jax.data import preparation

  shard, other = tmp_path / f"a.tar?{SIGNED}", tmp_path / f"b.tar?{SIGNED}"
  write_tar(shard, [f"{number:03}" for number in range(10)], bad=["003"])
  write_tar(other, ["same"])
  out, said = tmp_path / "out", []

  def convert(pattern=f"tar:{shard}", **settings):
    given = preparation.Settings(near_distance=None, exclude=(f"tar:{other}",), **settings)
    return preparation.convert(pattern, str(out), given, [], log=said.append)

  with contextlib.redirect_stdout(io.StringIO()) as printed:
    with pytest.raises(UsageError, match="No record is left"):
      convert(min_size=1000)
    at_work = [path for path in out.rglob("*") if path.is_file()]
    assert out / "work/input.json" in at_work and not [path for path in at_work if SECRET.encode() in path.read_bytes()]
    # What has another signature may be something else: that is told, and neither of them.
    again = tmp_path / f"a.tar?{SIGNED}2"
    os.rename(shard, again)
    with pytest.raises(UsageError, match=r"was begun with other input: files of tar:.*\*\*\*") as error:
      convert(f"tar:{again}", min_size=1000)
    os.rename(again, shard)
    shutil.rmtree(out)
    info = convert(format=form)
  assert SECRET not in "\n".join([*said, printed.getvalue(), str(error.value)])
  assert info["input"]["path"] == f"tar:{redact(str(shard))}" and info["settings"]["exclude"] == [f"tar:{redact(str(other))}"]
  for path in out.rglob("*"):
    assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path
  records = list(sources.create("auto", f"{out}/{info['path']}", sources.Options(extra=True)))
  assert sorted(record.extra["key"] for record in records) == [f"a.tar?X-Amz-Signature=***/{number:03}.jpg" for number in (1, 2, 4, 5, 6, 7, 8, 9)]


def test_what_a_command_line_got_wrong_is_quoted_without_its_secret(tmp_path):
  for arguments in (["data", "inspect", "a.tar", f"b.tar?{SIGNED}"], ["models", f"--config.data.path=gs://b/a.tar?{SIGNED}"]):
    done = cli(*arguments, cwd=tmp_path, codes=(2,))
    assert "***" in done.stderr and SECRET not in done.stderr
