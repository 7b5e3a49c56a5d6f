"""A real S3 server for the tests: moto's, in a process of its own, which can be killed and started again on the same port."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import Any, Self

from tests.ports import free_port

SECONDS = 60


class S3:
    """The server; a context manager. What it holds is gone with its process."""

    def __init__(self) -> None:
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self._port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **environment(self.url)},
        )
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/moto-api/", timeout=5).close()
                return
            except (urllib.error.URLError, OSError):
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("moto's server does not start") from None
                time.sleep(0.05)

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    @functools.cache  # noqa: B019 - a few servers a run
    def client(self) -> Any:
        """A client of boto3's, to look at what is stored and to damage it."""
        import boto3

        secret = environment(self.url)
        return boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name=secret["AWS_DEFAULT_REGION"],
            aws_access_key_id=secret["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=secret["AWS_SECRET_ACCESS_KEY"],
        )

    def make_bucket(self, name: str) -> str:
        """Make a bucket; the URL of a model's place in it."""
        self.client().create_bucket(Bucket=name)
        return f"s3://{name}/models/tiny"


def environment(endpoint: str) -> dict[str, str]:
    """The variables that send a process to an endpoint, with credentials that moto takes."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test-secret-of-the-test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
