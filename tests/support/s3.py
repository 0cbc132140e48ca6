"""s3:// by moto's server."""

import contextlib

import pytest


@contextlib.contextmanager
def served_s3(tmp_path, monkeypatch):
    """A client of boto3's, of a server with the bucket `mine`, which this process's clients use."""
    server, boto3 = pytest.importorskip("moto.server"), pytest.importorskip("boto3")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    settings = dict(AWS_ACCESS_KEY_ID="a", AWS_SECRET_ACCESS_KEY="b", AWS_REGION="us-east-1")
    settings |= dict(AWS_ENDPOINT_URL=f"http://{host}:{port}", XDG_CACHE_HOME=str(tmp_path / "cache"))
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    try:
        client = boto3.client("s3", endpoint_url=settings["AWS_ENDPOINT_URL"], region_name="us-east-1")
        client.create_bucket(Bucket="mine")
        yield client
    finally:
        running.stop()
