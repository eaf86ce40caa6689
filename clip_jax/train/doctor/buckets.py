"""Whether buckets can be read, how fast, and whether they are where this machine is."""

import dataclasses
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request

from clip_jax.data import locations
from clip_jax.data.storage import Storage
from clip_jax.errors import DataError, StorageError, UsageError, redact
from clip_jax.parallel import metadata
from clip_jax.train.doctor.check import Check

DEADLINE, PLACE_SECONDS, METADATA_SECONDS = 20.0, 5.0, 1.0
TRIAL_BYTES = 16 << 20
# https://cloud.google.com/storage/docs/locations: what regions' names begin with, and which ones are joined.
MULTI_REGIONS = {"us": "us-", "eu": "europe-", "asia": "asia-"}
DUAL_REGIONS = {
  "nam4": ("us-central1", "us-east1"),
  "eur4": ("europe-north1", "europe-west4"),
  "asia1": ("asia-northeast1", "asia-northeast2"),
}
LOGIN = {
  "gs": "Log in with `gcloud auth application-default login`, or, on a machine of Google Cloud, let its service account read the bucket: "
  "roles/storage.objectViewer, and the machine's access scope must include storage.",
  "s3": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, of an account that has s3:ListBucket and s3:GetObject there; "
  "AWS_NO_SIGN_REQUEST=1 for public data.",
}
# Dollars a terabyte each time it is read, as https://cloud.google.com/storage/pricing and https://aws.amazon.com/s3/pricing have it (2026):
# from one region to another, and out of Amazon's network.
WITHIN, BETWEEN, OUT_OF_AMAZON = 20, 50, 90
LISTING = {"gs": "gcloud storage ls", "s3": "aws s3 ls"}


@dataclasses.dataclass(frozen=True)
class Place:
  """What a store tells of a bucket.

  Attributes:
    status: of its HTTP answer, or None if there was none.
    regions: in which the bucket is, in lower case; none if they are not told.
  """

  status: int | None = None
  regions: tuple[str, ...] = ()


def check_url(url):
  """Checks that a URL is of a bucket.

  Raises:
    UsageError: it is not.
  """
  if not locations.is_remote(url):
    raise UsageError(f"--bucket {url}: expected gs://NAME, or s3://NAME, with or without what names of objects begin with.")
  locations.check(url)


def bucket(url, zone="", deadline=DEADLINE):
  """Reads from a bucket and finds out where it is.

  Args:
    url: `gs://NAME` or `s3://NAME`, and maybe what the names of objects begin with, an object, or a glob.
    zone: of this machine on Google Cloud, or "".
    deadline: seconds that one request may take, with all its repetitions.

  Returns:
    A list of two `Check`s: of reading, and of regions.
  """
  scheme, name = re.match(r"(\w+)://([^/]*)", url).groups()
  prefix = re.split(r"[*?\[{]", url)[0]
  token = machine_token() if zone and scheme == "gs" else None
  place = where(scheme, name, token, min(PLACE_SECONDS, deadline))
  aws_region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or ""
  return [_reading(scheme, name, prefix, place, deadline), judge_region(f"{scheme}://{name}", place, zone, aws_region)]


def _reading(scheme, name, prefix, place, deadline):
  storage = Storage(deadline)
  root = f"{scheme}://{name}"
  missing = Check("bucket", "wrong", f"There is no bucket {root}.", f"Look at its name: `{LISTING[scheme]}` lists those of your account.")
  try:
    path = _object(storage, prefix if "/" in prefix.partition("://")[2] else f"{prefix}/")
    if path:
      return _speed(storage, path)
  except (StorageError, UsageError) as error:
    if place.status == 404 or "NOT_FOUND" in str(error):
      return missing
    if isinstance(error, UsageError):
      return Check("bucket", "wrong", str(error), LOGIN[scheme])
    if "has not been listed" in str(error) and place.status is not None:
      return Check("bucket", "warning", str(error), "It may hold very many objects: name one of them, or more of what their names begin with.")
    endpoint = redact(_google() if scheme == "gs" else _amazon(name))
    return Check("bucket", "wrong", str(error), f"See whether this machine reaches the store: curl -I {endpoint}")
  if place.status == 404:
    return missing
  unknown = "" if place.regions else ", or there is no such bucket"
  return Check("bucket", "wrong", f"No object's name begins with {prefix}{unknown}.", f"`{LISTING[scheme]} {root}` shows what is there.")


def _object(storage, prefix):
  # Google Cloud lists what may not be listed, and what is not there, as if it were empty; reading tells the difference.
  probe = f"{prefix}clip-jax-doctor" if prefix.endswith("/") else prefix
  try:
    storage.read(probe, 0, 0)
    return probe
  except DataError:
    return storage.first(prefix)


def _speed(storage, path):
  start = time.perf_counter()
  storage.read(path, 0, 0)
  wait = time.perf_counter() - start
  try:
    start = time.perf_counter()
    count = len(storage.read(path, 0, TRIAL_BYTES))
  except DataError:  # it has fewer
    start = time.perf_counter()
    count = len(storage.read(path))
  seconds = time.perf_counter() - start
  if not count:
    return Check("bucket", "ok", f"{path} can be read, and is empty.")
  found = f"{path}: an answer in {wait * 1e3:,.0f} ms; {count / 2**20:,.3g} MiB in one request at {count / seconds / 1e6:,.3g} MB/s."
  return Check("bucket", "ok", found)


def where(scheme, name, token=None, seconds=PLACE_SECONDS):
  """Asks a store where a bucket is.

  Args:
    scheme: "gs" or "s3".
    name: of the bucket.
    token: for Google Cloud, where the bucket is not public.
    seconds: that an answer may take.

  Returns:
    A `Place`.
  """
  if scheme == "s3":
    # This header comes unsigned, and with a refusal, too.
    status, headers, _ = _ask(_amazon(name), "HEAD", {}, seconds)
    region = headers.get("x-amz-bucket-region")
    return Place(status, (region.lower(),) if region else ())
  base = _google()
  headers = {"Authorization": f"Bearer {token}"} if token and base.startswith("https://") else {}
  status = None
  # Who may list objects may ask for the first; the second needs storage.buckets.get, which readers seldom have.
  for path in ("/storageLayout", "?fields=location,customPlacementConfig"):
    status, _, body = _ask(f"{base}/storage/v1/b/{urllib.parse.quote(name, '')}{path}", "GET", headers, seconds)
    found = _json(body) if status == 200 else {}
    regions = (found.get("customPlacementConfig") or {}).get("dataLocations") or [found.get("location") or ""]
    if regions[0]:
      regions = [region.lower() for region in regions]
      return Place(status, DUAL_REGIONS.get(regions[0], tuple(regions)))
    if status is None:
      break
  return Place(status)


def machine_zone():
  """The zone of this machine, such as "us-central1-a", if it is one of Google Cloud; else ""."""
  return _metadata("zone").rpartition("/")[2]


def machine_token():
  """What this machine's service account shows to Google Cloud, or None."""
  return _json(_metadata("service-accounts/default/token")).get("access_token")


def judge_region(root, place, zone, aws_region):
  """Compares where a bucket is with where the machine is.

  Args:
    root: the bucket's URL.
    place: its `Place`.
    zone: the machine's on Google Cloud, or "".
    aws_region: what AWS_REGION says, or "".
  """
  google = root.startswith("gs://")
  bucket_in = " and ".join(place.regions)
  machine = zone.rpartition("-")[0] if zone else "" if google else aws_region.lower()
  if not place.regions:
    why = {None: "does not answer", 404: "does not know it"}.get(place.status, f"does not tell this account (HTTP {place.status})")
    advice = f"gcloud storage buckets describe {root} --format='value(location)'" if google and place.status in (401, 403) else ""
    return Check("region", "skipped", f"Nobody says where {root} is: its store {why}.", advice)
  if not machine:
    known = "this machine is not on Google Cloud" if google else "AWS_REGION is not set"
    return Check("region", "skipped", f"{root} is in {bucket_in}; {known}, so there is nothing to compare with.")
  here = f"this machine in {zone}" if zone else f"AWS_REGION is {aws_region}"
  found = f"{root} is in {bucket_in}, {here}"
  if zone and not google:
    return Check("region", "warning", f"{found} of Google Cloud.", f"Every byte is charged, about ${OUT_OF_AMAZON} a terabyte at each reading, and comes from afar: copy the data into a bucket of Google Cloud there.")
  if machine in place.regions:
    return Check("region", "ok", f"{found}.")
  if google and machine.startswith(MULTI_REGIONS.get(bucket_in, "nowhere")):
    return Check("region", "warning", f"{found}.", f"Reading from a multi-region is charged, about ${WITHIN} a terabyte each time, and slower at times: a bucket in {machine} alone is not.")
  if google and bucket_in not in MULTI_REGIONS and "-" not in bucket_in:
    return Check("region", "skipped", f"{found}; which regions {bucket_in} stands for is not known here.")
  if zone:
    near = machine.partition("-")[0] == bucket_in.partition("-")[0]
    cost = f"about ${WITHIN}" if near else f"${BETWEEN} or more"
    advice = f"Every byte is charged, {cost} a terabyte at each reading, and comes from afar: copy the data into a bucket in {machine}, or train in {bucket_in}."
  else:
    advice = f"AWS_REGION={bucket_in}, for requests are signed for a region; if the machine is elsewhere, every byte is charged."
  return Check("region", "warning", f"{found}.", advice)


def _google():
  return (os.environ.get("TENSORSTORE_GCS_HTTP_URL") or "https://storage.googleapis.com").rstrip("/")


def _amazon(name):
  # As TensorStore asks: the name in the path of other stores, and where a certificate does not hold for a name with dots.
  endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
  if endpoint or "." in name:
    return f"{(endpoint or 'https://s3.amazonaws.com').rstrip('/')}/{name}"
  return f"https://{name}.s3.amazonaws.com"


def _ask(url, method, headers, seconds):
  # Status, headers and body; the status is None where nothing answers.
  request = urllib.request.Request(url, method=method, headers=headers)
  try:
    # The answer of S3 for another region is what is wanted, not what it points to.
    with urllib.request.build_opener(metadata.Stay).open(request, timeout=seconds) as answer:
      return answer.status, answer.headers, answer.read()
  except urllib.error.HTTPError as error:
    with error:
      return error.code, error.headers, b""
  except (OSError, ValueError, http.client.HTTPException):  # nobody there, no answer in time, or no URL
    return None, {}, b""


def _metadata(path):
  try:
    return metadata.ask(path, METADATA_SECONDS)
  except OSError:
    return ""


def _json(text):
  try:
    found = json.loads(text)
  except ValueError:
    return {}
  return found if isinstance(found, dict) else {}
