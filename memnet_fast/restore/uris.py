"""URIs, as messages and logs may show them: a password or a signature in one of them must not stand there."""

from __future__ import annotations

import re


def is_uri(text: str) -> bool:
    return "://" in text


def masked(text: str) -> str:
    """A URI without its user information and its query; other text as it is.

    What cannot be parsed is masked all the same: secret keys hold "/" and "+", and are easily left unescaped. So user
    information ends at the last "@" wherever something before it looks like a part of it.
    """
    scheme, mark, rest = text.partition("://")
    if not mark:
        return text
    user, at, place = rest.rpartition("@")
    if at and (":" in user or "@" in re.split("[/?#]", rest, maxsplit=1)[0]):
        rest = f"***@{place}"
    place, mark, _ = rest.partition("?")
    return f"{scheme}://{place}?***" if mark else f"{scheme}://{rest}"
