"""`clip-jax embed`: what it writes, against one example at a time; and what stops, kills and disturbs it."""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import clip_jax
from clip_jax import benchmark, embedding
from clip_jax.cli import embedding as verb
from clip_jax.convert import native, sources
from clip_jax.data import sources as data
from clip_jax.embedding import folder as folders
from clip_jax.errors import StorageError, UsageError
from clip_jax.evaluate.encode import Encoder
from tests.conftest import COMPILED, write_colors
from tests.convert.models import random_params
from tests.end_to_end.runs import finish, start_together, wait_until
from tests.evaluate.conftest import MODEL, pictures, png, write_shard

ROOT = Path(__file__).parents[1]
BATCH, COUNT, PART = 4, 50, 20
LABELLED = 30  # records of the set in which some are bad
COPIES = 80  # of eight colours: enough to be killed in the middle of


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("CLIP_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """The folder of a tiny model with random weights."""
  path = tmp_path_factory.mktemp("models") / "tiny"
  native.write(path, MODEL, None, random_params(MODEL).items())
  return path


def caption(number):
  return " ".join([f"picture {number}", *["very"] * (number % 8), "nice"])


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
  """A tar of `COUNT` pictures, of the model's size and others, with captions of all lengths."""
  random, records = np.random.default_rng(1), []
  for number in range(COUNT):
    size = MODEL.image_size if number % 2 else 24 + number
    pixels = random.integers(0, 256, (size, size + 3 * (number % 2), 3), np.uint8)
    records.append({"png": png(pixels), "txt": caption(number).encode()})
  return write_shard(tmp_path_factory.mktemp("data") / "a.tar", records)


def embed(model, path, output, devices=1, batch=BATCH, options=None, progress=lambda part, done, total: None, **request):
  """Embeds in this process."""
  weights, mesh = sources.find(model), benchmark.everywhere(jax.devices()[:devices])
  encoder = Encoder(weights.model, mesh, batch * devices, tokenizer=weights.tokenizer)
  request = embedding.Request(str(output), str(path), **{"part_size": PART, **request})
  params = benchmark.on_all(weights.params(), mesh)
  return embedding.embed(encoder, params, weights, data.create("auto", str(path), options), request, progress)


def contents(output):
  """The bytes of each file by its name."""
  return {str(path.relative_to(output)): path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file()}


def arrays(output, kind):
  return np.concatenate([np.load(path) for path in sorted((output / kind).iterdir())])


def metadata(output):
  rows = [row for path in sorted((output / "metadata").iterdir()) for row in pq.read_table(path).to_pylist()]
  assert [row["index"] for row in rows] == sorted({row["index"] for row in rows})
  return rows


@pytest.fixture(scope="module")
def whole(model, shard, tmp_path_factory):
  """The set, embedded on one device without any disturbance."""
  output = tmp_path_factory.mktemp("whole") / "out"
  embed(model, shard, output)
  return output


def assert_rounded(found, wanted):
  """Float16 has eleven bits; what is below 2**-14 has fewer."""
  assert found.dtype == np.float16 and found.shape == wanted.shape
  np.testing.assert_allclose(found.astype(np.float64), wanted, rtol=2**-11, atol=2e-6)


def test_rows_are_those_of_the_model_one_at_a_time(model, shard, whole):
  loaded, source = clip_jax.load(model), data.create("auto", shard)
  images = [loaded.encode_image(loaded.preprocess(Image.open(io.BytesIO(record.image)))) for record in source]
  texts = [loaded.encode_text(loaded.tokenize([record.captions[0]])) for record in source]
  assert_rounded(arrays(whole, "img_emb"), np.concatenate(images).astype(np.float64))
  assert_rounded(arrays(whole, "text_emb"), np.concatenate(texts).astype(np.float64))


def test_the_layout_is_that_of_clip_retrieval(shard, whole):
  names = [f"{kind}/{kind}_{part}.{ending}" for kind, ending in (("img_emb", "npy"), ("metadata", "parquet"), ("text_emb", "npy")) for part in range(3)]
  assert sorted(contents(whole)) == ["embed.json", *names]
  for path in whole.glob("*_emb/*"):  # as NumPy itself would write them
    buffer = io.BytesIO()
    np.save(buffer, np.load(path))
    assert path.read_bytes() == buffer.getvalue()
  rows = metadata(whole)
  assert [row["index"] for row in rows] == list(range(COUNT))
  assert [(row["caption"], row["key"]) for row in rows] == [(record.captions[0], record.key) for record in data.create("auto", shard)]
  assert [row["image_path"] for row in rows] == [row["key"] for row in rows] and "label" not in rows[0]


def test_numbers_have_as_many_digits_as_that_of_the_parts(model, shard, tmp_path):
  embed(model, shard, tmp_path, part_size=5)
  assert sorted(path.name for path in (tmp_path / "img_emb").iterdir()) == [f"img_emb_{part:02}.npy" for part in range(10)]


@pytest.mark.parametrize("only", ["", "text"])
def test_bytes_do_not_depend_on_devices_or_hosts(only, model, shard, tmp_path, monkeypatch):
  monkeypatch.setattr(embedding, "BLOCK", 12)  # a part has several blocks, as large ones have
  embed(model, shard, tmp_path / "one", only=only)
  embed(model, shard, tmp_path / "eight", devices=8, only=only)
  assert contents(tmp_path / "eight") == contents(tmp_path / "one")
  for host in (1, 0, 2):
    embed(model, shard, tmp_path / "hosts", devices=host + 1, host=host, hosts=3, only=only)
  assert contents(tmp_path / "hosts") == contents(tmp_path / "one")


def test_what_is_there_is_not_made_again_and_what_is_not_whole_is(model, shard, whole, tmp_path):
  shutil.copytree(whole, tmp_path / "out")
  made = []

  def again(**request):
    made.clear()
    return embed(model, shard, tmp_path / "out", progress=lambda part, done, total: made.append((part, done, total)), **request)

  found = again()
  assert made == [(0, COUNT, COUNT)] and found["parts_before"] == found["parts_done"] == 3 and found["rows"] == COUNT
  (tmp_path / "out/metadata/metadata_1.parquet").unlink()
  (tmp_path / "out/img_emb/.img_emb_1.npy.0123abcd.tmp").write_bytes(b"of a killed process")
  os.truncate(tmp_path / "out/text_emb/text_emb_2.npy", 300)
  found = again(hosts=2)  # another number of hosts is no other set
  assert {part for part, *_ in made} == {2} and found["parts_there"] == 2
  found = again(host=1, hosts=2)
  assert {part for part, *_ in made} == {1} and found["parts_there"] == found["all_parts"] == 3
  assert contents(tmp_path / "out") == contents(whole)


def test_a_stopped_part_leaves_nothing_and_is_begun_again(model, shard, whole, tmp_path):
  def progress(part, done, total):
    if done > PART + BATCH:
      raise embedding.Stopped

  found = embed(model, shard, tmp_path / "out", progress=progress)
  assert found["stopped"] and found["parts_done"] == 1 and found["records_done"] == PART
  assert all(name.rpartition("_")[2].startswith("0.") for name in contents(tmp_path / "out") if name != "embed.json")
  assert not embed(model, shard, tmp_path / "out")["stopped"]
  assert contents(tmp_path / "out") == contents(whole)


def test_a_full_disk_is_no_crash(model, shard, whole, tmp_path, monkeypatch):
  def full(part):
    raise OSError(errno.ENOSPC, "No space left on device")

  with monkeypatch.context() as patch, pytest.raises(StorageError, match="out cannot be written: No space left on device.*goes on"):
    patch.setattr(folders.Part, "finish", full)
    embed(model, shard, tmp_path / "out")
  assert list(contents(tmp_path / "out")) == ["embed.json"]
  embed(model, shard, tmp_path / "out")
  assert contents(tmp_path / "out") == contents(whole)


def test_the_metadata_stand_for_a_whole_part(model, shard, tmp_path, monkeypatch):
  replace, order = os.replace, []

  def named(source, target):
    replace(source, target)
    if Path(target).is_relative_to(tmp_path):
      order.append(target.name)

  monkeypatch.setattr(os, "replace", named)
  embed(model, shard, tmp_path, part_size=COUNT)
  assert order == ["img_emb_0.npy", "text_emb_0.npy", "metadata_0.parquet"]


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
  """A tar with records that cannot be decoded, have no caption, or have one that is no Unicode."""
  records = [{"png": png(pixels), "json": json.dumps({"caption": f"picture {i}"}).encode()} for i, pixels in enumerate(pictures(LABELLED))]
  records[3]["png"] = records[3]["png"][:60]
  records[12].pop("json")
  records[13]["json"] = b'{"caption": "half \\ud83d of one"}'
  return write_shard(tmp_path_factory.mktemp("data") / "odd.tar", records)


def test_bad_records_are_left_out_of_all_files_and_listed(model, odd, tmp_path):
  found = embed(model, odd, tmp_path / "one", part_size=10)
  assert found["bad_records"] == 2 and found["rows"] == LABELLED - 2 == len(arrays(tmp_path / "one", "img_emb"))
  rows = metadata(tmp_path / "one")
  assert {row["index"] for row in rows} == set(range(LABELLED)) - {3, 12}
  assert next(row for row in rows if row["index"] == 13)["caption"] == "half ? of one"
  listed = {path.name: [json.loads(line) for line in path.read_text().splitlines()] for path in (tmp_path / "one/bad_records").iterdir()}
  assert {name: [line["index"] for line in lines] for name, lines in listed.items()} == {"bad_records_0.jsonl": [3], "bad_records_1.jsonl": [12]}
  assert listed["bad_records_0.jsonl"][0]["key"] == "odd.tar/00003.png" and "no caption" in listed["bad_records_1.jsonl"][0]["error"]
  # Those that remain are what they are in a set without the others, and on any number of devices.
  loaded, source = clip_jax.load(model), data.create("auto", odd)
  wanted = [loaded.encode_image(loaded.preprocess(Image.open(io.BytesIO(source[row["index"]].image)))) for row in rows]
  assert_rounded(arrays(tmp_path / "one", "img_emb"), np.concatenate(wanted).astype(np.float64))
  assert embed(model, odd, tmp_path / "one", part_size=10) == found | {"parts_before": 3}
  embed(model, odd, tmp_path / "two", devices=2, part_size=10)
  assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_only_images_and_only_texts(model, shard, odd, whole, tmp_path):
  embed(model, shard, tmp_path / "images", only="image")
  assert not (tmp_path / "images/text_emb").exists() and metadata(tmp_path / "images") == metadata(whole)
  assert arrays(tmp_path / "images", "img_emb").tobytes() == arrays(whole, "img_emb").tobytes()
  found = embed(model, odd, tmp_path / "texts", only="text")  # the picture that is cut off is not decoded
  assert found["rows"] == LABELLED - 1 == len(arrays(tmp_path / "texts", "text_emb")) and not (tmp_path / "texts/img_emb").exists()
  assert {"key", "index", "caption"} == metadata(tmp_path / "texts")[3].keys()


def test_a_set_with_classes_alone_has_images_and_labels(model, tmp_path):
  path = write_shard(tmp_path / "classes.tar", [{"png": png(pixels), "cls": b"%d" % (7 - i)} for i, pixels in enumerate(pictures(8))])
  found = embed(model, path, tmp_path / "out")
  assert found["embeddings"] == ["image"] and [row["label"] for row in metadata(tmp_path / "out")] == list(range(7, -1, -1))
  assert "caption" not in metadata(tmp_path / "out")[0]
  with pytest.raises(UsageError, match="no captions"):
    embed(model, path, tmp_path / "texts", only="text")


def test_a_chosen_caption(model, tmp_path):
  records = [{"png": png(pixels), "json": json.dumps({"caption": "usual", "alt": f"other {i}"}).encode()} for i, pixels in enumerate(pictures(3))]
  path = write_shard(tmp_path / "a.tar", records)
  embed(model, path, tmp_path / "out", options=data.Options(captions=(("alt", 1.0),)))
  assert [row["caption"] for row in metadata(tmp_path / "out")] == ["other 0", "other 1", "other 2"]
  with pytest.raises(UsageError, match="fingerprint"):
    embed(model, path, tmp_path / "out")


def test_another_command_is_refused(model, shard, odd, whole, tmp_path):
  shutil.copytree(model, tmp_path / "copy")
  native.write(tmp_path / "other", MODEL, None, random_params(MODEL, seed=1).items())
  embed(tmp_path / "copy", shard, whole)  # the same weights elsewhere
  before = contents(whole)
  for name, there, changes in [
    ("part_size", f"{PART}", {"part_size": 7}),
    ("batch_size", f"{BATCH}", {"batch": 2}),
    ("embeddings", r"\['image', 'text'\]", {"only": "text"}),
    ("weights", r"\w+ \(.*tiny\)", {"model": tmp_path / "other"}),
    ("fingerprint", r"tar .* \(.*a.tar\)", {"path": odd}),
  ]:
    arguments = {"model": model, "path": shard, **changes}
    with pytest.raises(UsageError, match=f"was made with {name} {there}, and this command has .*--output another folder"):
      embed(output=whole, **arguments)
  assert contents(whole) == before


def test_a_folder_that_holds_other_things_is_refused(model, shard, tmp_path):
  (tmp_path / "file").write_text("mine")
  with pytest.raises(UsageError, match="holds other things, such as file"):
    embed(model, shard, tmp_path)
  with pytest.raises(UsageError, match="is a file"):
    embed(model, shard, tmp_path / "file")
  with pytest.raises(UsageError, match="mounted"):
    embed(model, shard, "gs://bucket/out")
  assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_secrets_do_not_come_into_files(model, shard):
  request = embedding.Request("out", "s3://bucket/a.tar?X-Amz-Signature=verysecret", part_size=PART)
  weights = sources.find(model)
  encoder = Encoder(weights.model, benchmark.everywhere(jax.devices()[:1]), BATCH)
  assert embedding.describe(encoder, weights.params(), weights, data.create("auto", shard), request)["source"].endswith("Signature=***")


# In real processes.


@pytest.fixture(scope="module")
def start(model, tmp_path_factory):
  """A function that starts the command, on a set of eight colours."""
  colors = tmp_path_factory.mktemp("colors") / "colors.tar"
  write_colors(colors, COPIES)

  def starts(output, *arguments, devices=1, environment=()):
    command = [sys.executable, "-m", "clip_jax.cli", "embed", str(model), str(colors), "--output", str(output), "--part-size", "16", "--batch-size", "4", *arguments]
    variables = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(COMPILED)}
    return subprocess.Popen(command, cwd=ROOT, env=variables | dict(environment), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

  return starts


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
  """The folder that one process makes, on one device; and what it prints."""
  output = tmp_path_factory.mktemp("undisturbed") / "out"
  return output, finish(start(output, "--json"))


def test_a_process_tells_what_it_did(undisturbed):
  output, (out, err) = undisturbed
  found = json.loads(out)
  assert found["rows"] == found["records"] == 8 * COPIES == len(metadata(output)) and found["parts"] == COPIES // 2
  assert [row["label"] for row in metadata(output)][:8] == list(range(8))
  assert f"{8 * COPIES}/{8 * COPIES} records" in err and "records/s" in err and " left" in err


def in_the_middle(process, output):
  wait_until(process, lambda: len(list(output.glob("metadata/*.parquet"))) >= 3, "the third part")


def test_after_a_kill_the_same_command_gives_the_same_bytes(start, undisturbed, tmp_path):
  process = start(tmp_path / "out")
  in_the_middle(process, tmp_path / "out")
  process.kill()
  process.communicate()
  there = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("metadata/*.parquet")}
  assert 3 <= len(there) < COPIES // 2
  found = json.loads(finish(start(tmp_path / "out", "--json", devices=2))[0])
  assert found["parts_before"] == len(there) and found["rows"] == 8 * COPIES
  assert {path: path.stat().st_mtime_ns for path in there} == there
  assert contents(tmp_path / "out") == contents(undisturbed[0])


def test_a_signal_ends_it_with_what_is_finished(start, undisturbed, tmp_path):
  process = start(tmp_path / "out")
  in_the_middle(process, tmp_path / "out")
  process.send_signal(signal.SIGTERM)
  out, err = finish(process, code=75)
  assert "The same command goes on" in out and "SIGTERM" in err
  made = contents(tmp_path / "out")
  assert not [name for name in made if "/." in name] and made.items() < contents(undisturbed[0]).items()


def test_two_processes_and_eight_devices_give_the_same_bytes(start, undisturbed, tmp_path):
  first, second = start_together(start, 2, tmp_path / "two", of_each=[(), ("--json",)])
  (out, _), (found, err) = finish(first), finish(second)
  assert f"{COPIES // 4} of {COPIES // 4} parts of host 0 (of 2), {4 * COPIES} rows" in out and "host 1 of 2" in err
  found = json.loads(found)
  assert found["host"] == 1 and found["rows"] == 4 * COPIES
  assert contents(tmp_path / "two") == contents(undisturbed[0])
  finish(start(tmp_path / "eight", "--host", "0", "--hosts", "1", devices=8))
  assert contents(tmp_path / "eight") == contents(undisturbed[0])


def test_a_wrong_command_is_one_sentence(start, undisturbed):
  for arguments, message in [(["--batch-size", "5"], "was made with batch_size 4"), (["--source", "zip"], "no format"), (["--host", "1"], "--host and --hosts")]:
    out, err = finish(start(undisturbed[0], *arguments), code=2)
    assert message in err and not out and err.count("\n") == 1


OPEN_MPI = {f"OMPI_COMM_WORLD_{name}": value for name, value in (("SIZE", "2"), ("RANK", "1"), ("LOCAL_SIZE", "1"), ("LOCAL_RANK", "0"))}


@pytest.mark.parametrize(
  "environment, given, wanted",
  [
    ({}, (), (0, 1)),
    ({}, (2, 4), (2, 4)),
    ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}, (), (3, 4)),
    ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}, (0, 2), (0, 2)),
    ({"SLURM_STEP_NODELIST": "n[1-4]", "SLURM_NTASKS": "4", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}, (), (1, 4)),
    ({**OPEN_MPI, "JAX_COORDINATOR_ADDRESS": "a:1"}, (), (1, 2)),
    ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "4"}, (), "JAX_PROCESS_ID=4 and JAX_NUM_PROCESSES=4"),
    ({"JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}, (), "set without JAX_COORDINATOR_ADDRESS"),
    ({}, (4, 4), "--host and --hosts"),
    ({}, (None, 4), "--host and --hosts"),
  ],
)
def test_each_process_knows_its_number_without_the_others(environment, given, wanted, monkeypatch):
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  if isinstance(wanted, str):
    with pytest.raises(UsageError, match=wanted):
      verb.place(*given)
  else:
    assert verb.place(*given) == wanted


def test_processes_that_share_a_machine_take_a_gpu_each(monkeypatch):
  slurm = {"SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "3", "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_JOB_ID": "7"}
  for name, value in slurm.items():
    monkeypatch.setenv(name, value)
  taken = []
  monkeypatch.setattr(jax.config, "update", lambda name, value: taken.append(value) if name == "jax_cuda_visible_devices" else None)
  assert verb.place() == (3, 4) and taken == ["3"]
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")  # by its launcher
  assert verb.place() == (3, 4) and taken == ["3"]
