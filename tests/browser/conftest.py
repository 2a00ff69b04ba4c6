import pytest

from .driver import Visitor, serve


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("space")) as served:
        yield served


@pytest.fixture
def visit(server, tmp_path):
    """A function that opens the page in a browser of its own."""
    visitors = []

    def open_page(**size):
        visitors.append(Visitor(server[0], tmp_path / f"profile{len(visitors)}", **size))
        return visitors[-1]

    yield open_page
    for visitor in visitors:
        visitor.leave()
