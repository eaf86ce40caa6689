"""What `clip-jax doctor` says of buckets: real stores on loopback, and places as their stores tell them."""

import http.server
import json
import threading
import time

import pytest

from clip_jax.train.doctor import buckets
from clip_jax.train.doctor.buckets import Place
from tests.data import buckets as stores


class Answers(http.server.ThreadingHTTPServer):
  """A server with fixed answers: a dict from paths to (status, headers, body), or to None for no answer; 404 for all else."""

  def __init__(self, answers):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.answers, self.asked = answers, []
    self.host = f"127.0.0.1:{self.server_address[1]}"
    threading.Thread(target=self.serve_forever, daemon=True).start()


class _Handler(http.server.BaseHTTPRequestHandler):
  def log_message(self, *_):
    pass

  def do_GET(self):
    self.server.asked.append((self.command, self.path, dict(self.headers)))
    path = self.path if self.path in self.server.answers else self.path.partition("?")[0]
    answer = self.server.answers.get(path, (404, {}, "{}"))
    if answer is None:
      return time.sleep(2)
    status, headers, body = answer
    self.send_response(status)
    for name, value in ({"Content-Length": str(len(body))} | headers).items():
      self.send_header(name, value)
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(body.encode())
    return None

  do_HEAD = do_GET


@pytest.fixture(autouse=True)
def nowhere(monkeypatch):
  """No test asks the machine it runs on where that is, or who."""
  monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")
  monkeypatch.setenv("GCE_METADATA_ROOT", "127.0.0.1:9")
  monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "t")


@pytest.fixture
def answers():
  """A function that starts a server."""
  running = []

  def start(**of_paths):
    running.append(Answers({f"/{path}": answer for path, answer in of_paths.items()}))
    return running[-1]

  yield lambda those: start(**those)
  for server in running:
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module", params=["s3", "gs"])
def bucket(request):
  """An emulated bucket with two objects, and the environment that leads to it."""
  with pytest.MonkeyPatch.context() as patch, getattr(stores, request.param)("checked-shards") as found:
    for name, value in found.environment.items():
      patch.setenv(name, value)
    found.put("laion/", b"-")  # what consoles make for a folder
    found.put("laion/00000.tar", bytes(1 << 20))
    found.put("a/0.tar", b"" if request.param == "s3" else b"-")  # the emulator of gs:// takes nothing that is empty
    yield found


@pytest.mark.parametrize("key", ["laion", "laion/", "laion/00000.tar", "laion/*.tar", "laion/{00000..00009}.tar"])
def test_the_first_object_is_read(bucket, key):
  reading, _ = buckets.bucket(bucket.url(key))
  assert reading.status == "ok" and reading.found.startswith(f"{bucket.root}/laion/00000.tar: an answer in ")
  assert "1 MiB in one request" in reading.found


def test_a_bucket_without_anything_behind_its_name_is_read(bucket):
  reading, _ = buckets.bucket(bucket.root)
  assert reading.status == "ok" and reading.found.startswith(f"{bucket.root}/a/0.tar")
  assert ("can be read, and is empty" in reading.found) == bucket.root.startswith("s3")


def test_what_is_not_there_is_told_apart(bucket):
  reading, _ = buckets.bucket(bucket.url("cc12m/"))
  assert reading.status == "wrong" and reading.found == f"No object's name begins with {bucket.root}/cc12m/." and " ls " in reading.advice
  scheme = bucket.root.partition("://")[0]
  reading, region = buckets.bucket(f"{scheme}://sherds/laion")
  assert (reading.status, reading.found) == ("wrong", f"There is no bucket {scheme}://sherds.") and region.status == "skipped"


def test_a_refusal_says_how_to_log_in(bucket):
  bucket.proxy.forbid = True
  try:
    reading, region = buckets.bucket(bucket.url("laion/"))
  finally:
    bucket.proxy.forbid = False
  assert reading.status == "wrong" and "PERMISSION_DENIED" in reading.found
  assert ("AWS_ACCESS_KEY_ID" if bucket.root.startswith("s3") else "gcloud auth application-default login") in reading.advice
  assert region.status == "skipped" and "HTTP 403" in region.found


def test_a_store_that_does_not_answer_is_given_up(bucket, monkeypatch):
  monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
  monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", "http://127.0.0.1:9")
  reading, region = buckets.bucket(bucket.url("laion/"), deadline=1.0)
  assert reading.status == "wrong" and "within 1 seconds" in reading.found and "curl -I http://127.0.0.1:9" in reading.advice
  assert region.status == "skipped" and "does not answer" in region.found


def test_regions_are_those_that_the_store_tells(bucket, monkeypatch):
  _, region = buckets.bucket(bucket.url("laion/"), zone="us-central1-a")
  google = bucket.root.startswith("gs")
  assert region.status == "warning" and f"{bucket.root} is in {'us' if google else 'us-east-1'}, this machine in us-central1-a" in region.found
  monkeypatch.setenv("AWS_REGION", "us-east-1")
  _, region = buckets.bucket(bucket.url("laion/"))
  assert region.status == ("skipped" if google else "ok")


def test_who_may_only_list_learns_where_a_bucket_is(answers, monkeypatch):
  layout = json.dumps({"location": "EU", "customPlacementConfig": {"dataLocations": ["EUROPE-WEST1", "EUROPE-WEST4"]}})
  server = answers({"storage/v1/b/shards/storageLayout": (200, {}, layout), "storage/v1/b/shards": (403, {}, "{}")})
  monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://{server.host}")
  assert buckets.where("gs", "shards", token="secret") == Place(200, ("europe-west1", "europe-west4"))
  assert "Authorization" not in server.asked[0][2]  # what is not encrypted could be read on its way
  server.answers["/storage/v1/b/shards/storageLayout"] = (200, {}, json.dumps({"location": "NAM4"}))
  assert buckets.where("gs", "shards").regions == ("us-central1", "us-east1")


def test_an_empty_list_may_be_of_a_bucket_that_is_not_there(answers, monkeypatch):
  missing = 404, {"Content-Type": "application/json"}, '{"error": {"code": 404}}'
  server = answers({"storage/v1/b/shards/o": missing, "storage/v1/b/shards": (401, {}, "")})  # as Google answers who is not logged in
  monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://{server.host}")
  reading, _ = buckets.bucket("gs://shards/laion")
  assert (reading.status, reading.found) == ("wrong", "No object's name begins with gs://shards/laion, or there is no such bucket.")


def test_what_is_too_much_to_list_is_no_broken_bucket(answers, monkeypatch):
  server = answers({"storage/v1/b/shards/o": None, "storage/v1/b/shards/storageLayout": (200, {}, '{"location": "US"}')})
  monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://{server.host}")
  reading, region = buckets.bucket("gs://shards/", deadline=1.0)
  assert reading.status == "warning" and "has not been listed within 1 seconds" in reading.found and "name one of them" in reading.advice
  assert "gs://shards is in us" in region.found


def test_s3_tells_the_region_with_a_redirection(answers, monkeypatch):
  there = {"x-amz-bucket-region": "eu-west-1", "Location": "http://127.0.0.1:9/"}
  server = answers({"shards": (301, there, "")})
  monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{server.host}")
  assert buckets.where("s3", "shards") == Place(301, ("eu-west-1",))
  assert [request[:2] for request in server.asked] == [("HEAD", "/shards")]


def test_the_zone_is_asked_of_googles_server_and_no_other(answers, monkeypatch):
  zone, token = (f"computeMetadata/v1/instance/{name}" for name in ("zone", "service-accounts/default/token"))
  google = {"Metadata-Flavor": "Google"}
  server = answers({zone: (200, google, "projects/1/zones/us-central1-a"), token: (200, google, '{"access_token": "t"}')})
  monkeypatch.setenv("GCE_METADATA_HOST", server.host)
  assert (buckets.machine_zone(), buckets.machine_token()) == ("us-central1-a", "t")
  assert all(headers["Metadata-Flavor"] == "Google" for _, _, headers in server.asked)
  monkeypatch.setenv("GCE_METADATA_HOST", answers({zone: (200, {}, "projects/1/zones/us-central1-a")}).host)
  assert (buckets.machine_zone(), buckets.machine_token()) == ("", None)
  monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")
  assert buckets.machine_zone() == ""


@pytest.mark.parametrize(
  "root, regions, zone, aws_region, status, message",
  [
    ("gs://b", ["us-central1"], "us-central1-a", "", "ok", "gs://b is in us-central1, this machine in us-central1-a."),
    ("gs://b", ["us-central1", "us-east1"], "us-east1-c", "eu-west-1", "ok", "us-central1 and us-east1"),
    ("gs://b", ["europe-west4"], "us-central1-a", "", "warning", "$50 or more a terabyte at each reading, and comes from afar: copy the data into a bucket in us-central1"),
    ("gs://b", ["us-west4"], "us-central1-a", "", "warning", "about $20 a terabyte at each reading"),
    ("gs://b", ["us"], "us-central1-a", "", "warning", "multi-region is charged, about $20 a terabyte"),
    ("gs://b", ["eu"], "us-central1-a", "", "warning", "copy the data into a bucket in us-central1"),
    ("gs://b", ["eur9"], "us-central1-a", "", "skipped", "which regions eur9 stands for"),
    ("gs://b", ["us-central1"], "", "us-east-1", "skipped", "not on Google Cloud"),
    ("gs://b", [], "us-central1-a", "", "skipped", "gcloud storage buckets describe gs://b"),
    ("s3://b", ["us-east-1"], "", "us-east-1", "ok", "AWS_REGION is us-east-1"),
    ("s3://b", ["us-east-1"], "", "eu-west-1", "warning", "AWS_REGION=us-east-1"),
    ("s3://b", ["us-east-1"], "", "", "skipped", "AWS_REGION is not set"),
    ("s3://b", ["us-east-1"], "us-east1-c", "us-east-1", "warning", "about $90 a terabyte at each reading, and comes from afar: copy the data into a bucket of Google Cloud"),
  ],
)
def test_regions_are_compared(root, regions, zone, aws_region, status, message):
  found = buckets.judge_region(root, Place(403 if not regions else 200, tuple(regions)), zone, aws_region)
  assert found.status == status and message in f"{found.found} {found.advice}"
