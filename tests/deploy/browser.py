"""Flower as a person sees it: in a browser, logged in."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from playwright.sync_api import sync_playwright

from tests.deploy.engine import found

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Page

_FLAGS = [
    "--no-sandbox",  # root may not have one
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def page(user: str, password: str) -> Iterator[Page]:
    """Open a page of a browser that knows a name and a password."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found("chromium"), args=_FLAGS)
        try:
            context = browser.new_context(
                http_credentials={"username": user, "password": password},
                viewport={"width": 1400, "height": 900},
            )
            yield context.new_page()
        finally:
            browser.close()
