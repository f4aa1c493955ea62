"""Text without what is secret in it."""

from __future__ import annotations

import re

# An access token of the Hub, and the user and password of an address.
SECRET = re.compile(r"hf_[A-Za-z0-9]{8,}|(?<=://)[^/@\s'\"]+(?=@)")
# A signature or a token among the parameters of an address.
PARAMETER = re.compile(
    r"([?&][\w.-]*(?:token|signature|credential|secret|password|api_?key)[\w.-]*=)[^&#\s'\"]+", re.IGNORECASE
)
SHORTEST = 4


def redacted(text: str, *known: str) -> str:
    """Without what looks like a token, or a password or signature in an address.

    Args:
        text: any.
        known: secrets that look like nothing, taken out wherever they stand. Shorter than 4 characters they are left,
            as they would be found in every word.
    """
    for secret in known:
        if len(secret) >= SHORTEST:
            text = text.replace(secret, "***")
    return PARAMETER.sub(r"\1***", SECRET.sub("***", text))
