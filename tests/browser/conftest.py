import pytest

from .driver import Visitor, serve


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """Of the digits, which are drawn sooner than the emoji."""
    with serve(tmp_path_factory.mktemp("space"), "digits") as served:
        yield served


@pytest.fixture
def visit(server, tmp_path):
    """A function that opens the page in a browser of its own, that of `server` or another one."""
    visitors = []

    def open_page(address=server[0], **size):
        visitors.append(Visitor(address, tmp_path / f"profile{len(visitors)}", **size))
        return visitors[-1]

    yield open_page
    for visitor in visitors:
        visitor.leave()
