"""Reading other people's files: which door GDAL and fsspec take to them, who we are there, and what is tried again.

GeoTIFFs over HTTP and S3 are read by GDAL's own range reader (`/vsicurl`, `/vsis3`): two requests open a COG, blocks of one read
are fetched together, connections are kept. Everything else, and every other protocol, goes through fsspec.

Who we are, from the environment and never from a config file:
    SOURCE_AWS_ACCESS_KEY_ID, SOURCE_AWS_SECRET_ACCESS_KEY, SOURCE_AWS_SESSION_TOKEN, SOURCE_AWS_ENDPOINT_URL, SOURCE_AWS_REGION
                        identity for reading `s3://` sources where it is not the one that writes the output (CDSE, say)
    AWS_REQUEST_PAYER=requester      buckets whose reader pays;  AWS_NO_SIGN_REQUEST=YES  public ones, read without an identity
    EARTHDATA_TOKEN     bearer token, sent to NASA's hosts only; SOURCE_BEARER_TOKEN with SOURCE_BEARER_HOSTS (comma-separated) to others
Planetary Computer's hrefs are signed by GDAL as they are read, and again when the signature has run out.
"""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import fsspec

from cluster.storage import filesystem, is_local
from data_prep.sources.traffic import TRAFFIC

Result = TypeVar("Result")

ATTEMPTS = 5
FIRST_WAIT_S = 0.5
# errors of network file systems that pass; anything else a local disk says is final
PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ECONNRESET, errno.EINTR, errno.EBUSY)
FINAL = (
    "404",
    "403",
    "401",
    "not found",
    "does not exist",
    "access denied",
    "forbidden",
    "unauthorized",
    "not recognized as",
)
NASA_HOSTS = ("earthdata.nasa.gov", "earthdatacloud.nasa.gov", "asf.alaska.edu")
AZURE_HOST = ".blob.core.windows.net"

GDAL_REMOTE = {
    # no listing of the folder, and the header with the first request: 2 requests open a COG
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_INGESTED_BYTES_AT_OPEN": "32768",
    "CPL_VSIL_CURL_CHUNK_SIZE": "16384",
    "GDAL_HTTP_MERGE_CONSECUTIVE_RANGES": "YES",
    "GDAL_HTTP_MULTIPLEX": "YES",
    "GDAL_HTTP_TCP_KEEPALIVE": "YES",
    "GDAL_HTTP_CONNECTTIMEOUT": "20",
    "GDAL_HTTP_TIMEOUT": "120",
    # what a server says in passing is tried again where it is met (a failed header would be remembered as an absent file), with
    # growing, jittered pauses; resets and truncated bodies by `retrying`
    "GDAL_HTTP_MAX_RETRY": "4",
    "GDAL_HTTP_RETRY_CODES": "429,500,502,503,504",
    # what failed must not be remembered as absent
    "CPL_VSIL_CURL_NON_CACHED": "/vsicurl/:/vsis3/",
}


def gdal_path(href: str, attempt: int = 0) -> str | None:
    """The path under which GDAL reads a remote file by itself; None for protocols that fsspec must open.

    attempt: a further one gets a URL fragment (which is never sent): GDAL remembers by URL what it could not open.
    """
    href = f"{href}#{attempt}" if attempt and href.startswith("http") else href
    scheme = urlsplit(href).scheme
    if scheme in ("http", "https"):
        host = urlsplit(href).hostname or ""
        if host.endswith(AZURE_HOST) and "sig=" not in href:
            return f"/vsicurl?pc_url_signing=yes&url={quote(href, safe='')}"
        return f"/vsicurl/{href}"
    if scheme in ("s3", "s3a"):
        return f"/vsis3/{href.partition('://')[2]}"
    return None


def gdal_options(href: str) -> dict[str, Any]:
    """GDAL settings for one remote file: the general ones, and who we are there."""
    options: dict[str, Any] = {**GDAL_REMOTE, "GDAL_HTTP_RETRY_DELAY": str(FIRST_WAIT_S)}
    if href.startswith(("s3://", "s3a://")):
        return options | _gdal_s3()
    if token := _bearer(urlsplit(href).hostname or ""):
        options |= {"GDAL_HTTP_AUTH": "BEARER", "GDAL_HTTP_BEARER": token}
    return options


def source_filesystem(href: str) -> tuple[Any, str]:
    """(fsspec filesystem, path) of a source: with the source's own S3 identity, the requester's consent, a bearer token."""
    options: dict[str, Any] = {}
    if href.startswith(("s3://", "s3a://")):
        who = {
            "key": os.environ.get("SOURCE_AWS_ACCESS_KEY_ID"), "secret": os.environ.get("SOURCE_AWS_SECRET_ACCESS_KEY"),
            "token": os.environ.get("SOURCE_AWS_SESSION_TOKEN"), "endpoint_url": os.environ.get("SOURCE_AWS_ENDPOINT_URL"),
        }  # fmt: skip
        options = {name: value for name, value in who.items() if value}
        if os.environ.get("AWS_REQUEST_PAYER") == "requester":
            options["requester_pays"] = True
        if os.environ.get("AWS_NO_SIGN_REQUEST", "").upper() in ("YES", "TRUE", "1"):
            options["anon"] = True
        if options:
            return fsspec.core.url_to_fs(href, use_listings_cache=False, **options)
    elif href.startswith(("http://", "https://")) and (token := _bearer(urlsplit(href).hostname or "")):
        return fsspec.core.url_to_fs(href, headers={"Authorization": f"Bearer {token}"})
    return filesystem(href)


def open_source(href: str) -> Any:
    """A readable binary file of a source; raises what the file system raises."""
    fs, path = source_filesystem(href)
    file = fs.open(path, "rb")
    cache: Any = getattr(file, "cache", None)
    if TRAFFIC.counting and hasattr(cache, "fetcher"):
        cache.fetcher = _counted(cache.fetcher)
    return file


def _counted(fetch: Callable[..., bytes]) -> Callable[..., bytes]:
    def fetcher(*arguments: Any, **options: Any) -> bytes:
        data = fetch(*arguments, **options)
        TRAFFIC.ask(len(data))
        return data

    return fetcher


def read_source(href: str, start: int | None = None, end: int | None = None) -> bytes:
    """Bytes [start, end) of a source, tried again where the error may pass. A short answer is an error, not an end."""
    fs, path = source_filesystem(href)

    def fetch() -> bytes:
        data = fs.cat_file(path, start=start, end=end)
        if not is_local(href):
            TRAFFIC.ask(len(data))
        if start is not None and end is not None and len(data) < end - start:
            raise ConnectionError(f"{href}: {len(data)} of {end - start} bytes arrived")
        return data

    return retrying(fetch, href)


def retrying(call: Callable[[], Result], href: str, wait: Callable[[float], None] = time.sleep) -> Result:
    """`call()`, again after a pause where its error may pass: at most ATTEMPTS times, pauses doubling, with full jitter (many
    workers that one server has turned away do not come back together)."""
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except Exception as error:
            if attempt == ATTEMPTS - 1 or not may_pass(error, href):
                raise
            wait(random.uniform(0, FIRST_WAIT_S * 2**attempt))
    raise AssertionError("not reached")


def may_pass(error: BaseException, href: str) -> bool:
    """Whether the same call may succeed a moment later. Remote: everything but a clear refusal. Local: what a network file system
    says in passing."""
    if isinstance(error, FileNotFoundError | PermissionError | MemoryError | NotImplementedError):
        return False
    if is_local(href):
        return isinstance(error, OSError) and error.errno in PASSING
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    text = " ".join(str(one).lower() for one in chain)
    return not any(word in text for word in FINAL)


def _gdal_s3() -> dict[str, str]:
    """GDAL's names for an S3 identity: the source's own, else the standard variables; an endpoint's address and scheme."""
    options: dict[str, str] = {}
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION"):
        if value := os.environ.get(f"SOURCE_{name}"):
            options[name] = value
    endpoint = os.environ.get("SOURCE_AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        parts = urlsplit(endpoint)
        options |= {
            "AWS_S3_ENDPOINT": parts.netloc, "AWS_HTTPS": "YES" if parts.scheme == "https" else "NO", "AWS_VIRTUAL_HOSTING": "FALSE",
        }  # fmt: skip
    return options


def _bearer(host: str) -> str:
    """The token to send to a host; "" for all that it is not meant for."""
    pairs: list[tuple[str, tuple[str, ...]]] = [(os.environ.get("EARTHDATA_TOKEN", ""), NASA_HOSTS)]
    hosts = tuple(filter(None, os.environ.get("SOURCE_BEARER_HOSTS", "").split(",")))
    pairs.append((os.environ.get("SOURCE_BEARER_TOKEN", ""), hosts))
    return next(
        (token for token, known in pairs if token and any(host == h or host.endswith(f".{h}") for h in known)), ""
    )
