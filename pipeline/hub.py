"""Can the model hub be spoken to? Asked once, since its own client tries for half a minute, file by file; no torch."""

from __future__ import annotations

import logging
import ssl
from functools import lru_cache
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

TIMEOUT_S = 5.0


def is_reachable() -> bool:
    """Whether the hub, or its mirror in HF_ENDPOINT, answers; from here on its client keeps its retries to itself."""
    from huggingface_hub import constants

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    return not constants.HF_HUB_OFFLINE and answers(constants.ENDPOINT)


@lru_cache
def answers(url: str) -> bool:
    """Whatever it says; also if it has a certificate that only the hub's client knows."""
    try:
        with urlopen(Request(url, method="HEAD"), timeout=TIMEOUT_S):
            return True
    except HTTPError:
        return True
    except URLError as error:
        return isinstance(error.reason, ssl.SSLError)
    except OSError:
        return False
