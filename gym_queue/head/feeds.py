"""What has ended, line by line: a cursor says how far a reader is, and leads it on in any head."""

from __future__ import annotations

from fastapi import APIRouter

router = APIRouter(tags=["feeds"])
