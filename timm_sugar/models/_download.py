"""Downloads from the Hub, with retries and a check of the file's hash."""

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import get_session, httpx

T = TypeVar("T")
_BUSY = (408, 429, 500, 502, 503, 504)
_WAITS = (1, 2, 4, 8, 8)  # seconds
_LONGEST_WAIT = 300
_TO_CONNECT = 2.0  # seconds
_reached: set[str] = set()


def retry(call: Callable[..., T], *args: Any, unsafe: bool = False, **kwargs: Any) -> T:
    """Return ``call(*args, **kwargs)``, retried with backoff while the server is busy or the connection fails.

    huggingface_hub's own http_backoff takes a URL, and not all calls of HfApi use it.

    Args:
        call: Any call of huggingface_hub.
        unsafe: The call is not idempotent: it is retried only if the server refused it, not if the response was lost.
    """
    wait: float
    for wait in _WAITS:
        try:
            return call(*args, **kwargs)
        except HfHubHTTPError as error:
            if error.response.status_code not in _BUSY:
                raise
            wait = _retry_after(error.response, wait)
        except (httpx.TransportError, json.JSONDecodeError):  # the latter: a proxy returned its own page
            if unsafe:
                raise
        time.sleep(wait)
    return call(*args, **kwargs)


def _retry_after(response: Any, otherwise: float) -> float:
    """Return the seconds in the server's Retry-After header, else `otherwise`."""
    asked = response.headers.get("retry-after", "")
    return min(int(asked) + 1, _LONGEST_WAIT) if asked.isdigit() else otherwise


def reach_hub() -> None:
    """Raise ConnectionError within seconds if the Hub cannot be reached; success is remembered for the process.

    huggingface_hub itself retries for half a minute before it raises.
    """
    endpoint = constants.ENDPOINT
    if endpoint in _reached or constants.HF_HUB_OFFLINE:
        return
    failures: list[str] = ["no answer"]

    def ask() -> None:
        try:
            get_session().head(endpoint, timeout=_TO_CONNECT)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as error:
            failures.append(str(error) or type(error).__name__)
            return
        except httpx.TransportError:  # slow or interrupted, but reachable
            pass
        failures.clear()

    thread = threading.Thread(target=ask, daemon=True)  # the timeout does not cover DNS lookups
    thread.start()
    thread.join(_TO_CONNECT + 0.5)
    if failures:
        raise ConnectionError(f"the Hub at {endpoint} cannot be reached ({failures[-1]})")
    _reached.add(endpoint)


@contextmanager
def cache_alone_out_of_reach() -> Iterator[None]:
    """Context in which libraries that download by themselves use only the cache if the Hub cannot be reached.

    Otherwise they would retry for most of a minute before they raise.

    Raises:
        ConnectionError: the Hub cannot be reached, and a file is not in the cache.
    """
    before = constants.HF_HUB_OFFLINE
    try:
        reach_hub()
    except ConnectionError as error:
        constants.HF_HUB_OFFLINE = True
        try:
            yield
        except LocalEntryNotFoundError:
            raise error from None
        finally:
            constants.HF_HUB_OFFLINE = before
    else:
        yield


def download(repo_id: str, name: str, revision: str | None = None, cache_dir: str | None = None) -> Path:
    """Return the path of a repository's file, from huggingface_hub's cache or the Hub, with its hash checked.

    Raises:
        ValueError: invalid repository name.
        RemoteEntryNotFoundError: the repository has no such file.
        FileNotFoundError: there is no such repository, or the token has no access to it.
        ConnectionError: the Hub cannot be reached, and the file is not in the cache.
        PermissionError: the Hub rejects the token.
        OSError: another error of the Hub, the Hub stays busy, or the file is corrupted.
    """
    arguments: dict[str, Any] = dict(revision=revision, cache_dir=cache_dir)
    try:
        reach_hub()
    except ConnectionError as error:
        try:
            path = hf_hub_download(repo_id, name, local_files_only=True, **arguments)
        except LocalEntryNotFoundError:
            raise error from None
        _check(Path(path))
        return Path(path)
    try:
        path = retry(hf_hub_download, repo_id, name, **arguments)
    except RemoteEntryNotFoundError:
        raise
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(f"{constants.ENDPOINT} shows no repository {repo_id} to you") from error
    except HfHubHTTPError as error:
        check_token(error)
        raise
    _check(Path(path))
    return Path(path)


def check_token(error: HfHubHTTPError) -> None:
    """Raise PermissionError if the Hub rejects the token, which affects public repositories too."""
    if error.response.status_code == 401:
        raise PermissionError(f"{constants.ENDPOINT} does not accept the token; check HF_TOKEN") from error


def _check(path: Path) -> None:
    """Raise OSError if a file in huggingface_hub's cache does not match its hash from the Hub.

    The cache names a file by this hash: SHA-256 for large files, git's SHA-1 of a blob for others. The client itself
    compares only sizes, and HfApi.verify_repo_checksums needs the network.
    """
    blob = path.resolve()
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob.name):
        return  # a cache without symbolic links
    if file_hash(blob, git=len(blob.name) == 40) != blob.name:
        raise OSError(f"{path.name} is corrupted: it does not have the hash that the Hub gave; delete {blob} and retry")


def file_hash(path: Path, git: bool = False) -> str:
    """Return the SHA-256 of a file in hexadecimal, or with `git` its SHA-1 as a git blob."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size) if git else hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
