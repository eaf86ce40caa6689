"""What Google Cloud tells a machine about itself."""

import http.client
import os
import urllib.error
import urllib.request

# By its address: a resolver may look for the name metadata.google.internal longer than it takes to ask.
ADDRESS = "169.254.169.254"


def host():
  """Where the metadata server is; `GCE_METADATA_HOST` or, as JAX has it, `GCE_METADATA_IP` name another one."""
  return os.environ.get("GCE_METADATA_HOST") or os.environ.get("GCE_METADATA_IP") or ADDRESS


def ask(path, seconds):
  """Asks the metadata server.

  Args:
    path: what is asked for, such as "zone" or "attributes/tpu-env".
    seconds: that an answer may take.

  Returns:
    The answer as text; "" where there is no such thing, or another cloud's server at the same address.

  Raises:
    OSError: nobody answers, or it is no answer.
  """
  request = urllib.request.Request(f"http://{host()}/computeMetadata/v1/instance/{path}", headers={"Metadata-Flavor": "Google"})
  # Never through a proxy, which would answer for its own machine.
  direct = urllib.request.build_opener(urllib.request.ProxyHandler({}), Stay)
  try:
    with direct.open(request, timeout=seconds) as answer:
      return answer.read().decode() if answer.headers.get("Metadata-Flavor") == "Google" else ""
  except urllib.error.HTTPError as error:
    with error:
      if error.code == 404:
        return ""
      raise OSError(f"HTTP {error.code}") from error
  except (ValueError, http.client.HTTPException) as error:
    raise OSError(str(error) or type(error).__name__) from error


class Stay(urllib.request.HTTPRedirectHandler):
  """Takes an answer that points elsewhere as it is."""

  def redirect_request(self, *_):
    """Goes nowhere."""
    return
