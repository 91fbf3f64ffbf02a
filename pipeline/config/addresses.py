"""Addresses of servers, as texts."""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import urlsplit


def origins(urls: Iterable[str]) -> list[str]:
    """What stands before the path of each address: equal texts are one origin, whatever a URL parser makes of them."""
    return ["/".join(url.split("/", 3)[:3]).lower() for url in urls]


def check_addresses(urls: Iterable[str]) -> None:
    """ValueError for what is no address of a server, for a password in one, and for one that stands there twice."""
    urls = list(urls)
    if any("@" in origin for origin in origins(urls)):
        raise ValueError("no password belongs into an address; name a variable in api_key_env")
    for url in urls:
        if not _is_address(url):
            raise ValueError(f"{url[:100]!r} is no http(s) address; write it like http://127.0.0.1:8000/v1")
    if len({url.rstrip("/") for url in urls}) < len(urls):
        raise ValueError("an address stands in base_urls twice; name each once")


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
