"""One composition for all tests of this folder. Without a Docker engine they skip; in CI they fail."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.deploy.composition import composed
from tests.deploy.engine import MissingError, running

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.deploy.composition import Composition
    from tests.deploy.engine import Engine


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    try:
        with running() as there:
            there.import_base()
            yield there
    except MissingError as error:
        reason = f"{error}: run tests/deploy/prepare.sh"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def composition(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Composition]:
    with composed(engine, tmp_path_factory.mktemp("composition")) as there:
        there.wait_healthy()
        yield there
