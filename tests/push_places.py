"""A Hub on the loopback interface, and a process that trains and pushes to it."""

import pytest
from hub_server import HubServer
from push_worker import Worker


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the worker runs, so that its output folders are relative."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def worker(hub, folder):
    worker = Worker(hub, folder)
    yield worker
    worker.close()
