"""What the build of the site checks beyond mkdocs --strict."""

import logging
import re
from typing import Any

log = logging.getLogger("mkdocs.hooks")

# what a browser would fetch by itself; links are for people
FETCHED = re.compile(r"<(?:script|img|iframe|link)\b[^>]*(?:src|href)=\"?(?:https?:)?//[^\s\">]+")


def on_post_page(output: str, page: Any, config: Any) -> None:
    """A script, image, frame or style from another host is a warning, and so fails the build."""
    for tag in FETCHED.findall(output):
        log.warning("%s loads from another host: %s", page.file.src_uri, tag)
