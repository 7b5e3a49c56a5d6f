"""s3:// on moto's server, in a process of its own: interrupted, refused, damaged, raced; and what is not S3."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from compiler.errors import RegistryError, ReleaseError
from compiler.manifest import MANIFEST
from compiler.registries import connect, objects, transfer
from compiler.stages.publish import alias, pull, push, versions
from compiler.verify import read_release, verify_files
from tests.registries.conftest import FILES, finish, make_release, one_line, race, signed_round_trip, start
from tests.registries.proxy import ALWAYS, Fault, Proxy
from tests.registries.s3 import S3, environment

OTHER = {**FILES, "config.json": b'{"model_type": "other"}\n'}
SECRET = environment("")["AWS_SECRET_ACCESS_KEY"]
FILE_COUNT = len(FILES) + 2  # with validation.json and SHA256SUMS


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with S3() as running:
        yield running


@pytest.fixture(scope="module")
def proxy(server: S3) -> Iterator[Proxy]:
    with Proxy(server.url) as running:
        yield running


@pytest.fixture(autouse=True)
def settings(proxy: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every client goes through the proxy, without faults until a test injects one, and waits little between tries."""
    proxy.heal()
    for name, value in environment(proxy.url).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setattr(transfer, "DELAYS", (0.01,) * 4)


@pytest.fixture
def url(server: S3, request: pytest.FixtureRequest) -> str:
    url: str = server.make_bucket(f"bucket-{abs(hash(request.node.nodeid))}")
    return url


@pytest.fixture
def release(tmp_path: Path) -> Path:
    make_release(tmp_path / "release")
    return tmp_path / "release"


def stored(server: S3, url: str) -> dict[str, int]:
    """The objects of a bucket: key below the model's place → size."""
    found = server.client().list_objects_v2(Bucket=url.split("/")[2]).get("Contents", [])
    return {item["Key"].removeprefix("models/tiny/"): item["Size"] for item in found}


def key_ending(server: S3, url: str, end: str) -> str:
    (key,) = (key for key in stored(server, url) if key.endswith(end))
    return f"models/tiny/{key}"


class TestPushAndPull:
    def test_what_comes_back_is_what_was_sent(self, server: S3, url: str, release: Path, tmp_path: Path) -> None:
        (release / "model.sig").write_text("signature\n")
        published = push(release, url, ["latest"])
        assert published.made
        manifest, made = pull(url, tmp_path / "out")
        assert made
        assert manifest.identity == published.version.digest
        verify_files(tmp_path / "out", read_release(tmp_path / "out")[0])
        assert (tmp_path / "out/model.sig").read_text() == "signature\n"
        assert connect(url).resolve(f"sha256:{manifest.identity}") == published.version
        assert connect(url).resolve("nothing") is None
        assert connect(url).resolve(f"sha256:{'0' * 64}") is None

    def test_the_same_again_sends_nothing(self, proxy: Proxy, url: str, release: Path) -> None:
        push(release, url, ["latest"])
        proxy.heal()
        assert not push(release, url, ["latest"]).made
        assert proxy.count("PUT|POST") == 0
        assert proxy.count("GET") > 0

    def test_other_content_is_refused(self, server: S3, url: str, release: Path, tmp_path: Path) -> None:
        push(release, url)
        make_release(tmp_path / "other", OTHER)
        before = stored(server, url)
        with pytest.raises(RegistryError) as caught:
            push(tmp_path / "other", url, ["prod"])
        one_line(caught, "1.0.0 is published already, with other content")
        assert stored(server, url) == before

    def test_versions_and_aliases(self, url: str, tmp_path: Path) -> None:
        assert versions(url) == ()
        for name in ("1.10.0", "1.9.0", "1.9.0-rc.1"):
            make_release(tmp_path / name, release=name)
            push(tmp_path / name, url, ["first"])
        assert [(version.release, version.aliases) for version in versions(url)] == [
            ("1.9.0-rc.1", ("first",)),
            ("1.9.0", ()),
            ("1.10.0", ()),
        ]
        assert alias(f"{url}@1.10.0", "prod")[1]
        assert not alias(f"{url}@1.10.0", "prod")[1]
        assert pull(f"{url}@prod", tmp_path / "out")[0].release == "1.10.0"

    def test_the_top_of_a_bucket(self, url: str, release: Path) -> None:
        bucket = url.rpartition("/models")[0]
        assert push(release, bucket).made
        assert [version.release for version in versions(f"{bucket}/")] == ["1.0.0"]

    def test_large_files_go_in_parts(
        self, server: S3, proxy: Proxy, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(objects, "BLOCK", 5 << 20)
        content = bytes(range(256)) * (12 << 12)
        make_release(tmp_path / "large", {"onnx/model.onnx": content, "empty": b""})
        assert push(tmp_path / "large", url).made
        assert proxy.count("PUT", "partNumber=") == 3
        pull(f"{url}@1.0.0", tmp_path / "out")
        assert (tmp_path / "out/onnx/model.onnx").read_bytes() == content
        assert (tmp_path / "out/empty").read_bytes() == b""

    @pytest.mark.parametrize("size", [1000, 12 << 20])
    def test_a_release_that_changed_is_not_published(
        self, server: S3, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
    ) -> None:
        monkeypatch.setattr(objects, "BLOCK", 5 << 20)
        make_release(tmp_path / "release", {"onnx/model.onnx": b"x" * size})
        (tmp_path / "release/onnx/model.onnx").write_bytes(b"y" * size)
        with pytest.raises(ReleaseError) as caught:
            push(tmp_path / "release", url)
        one_line(caught, "onnx/model.onnx is not what the manifest says")
        assert [key for key in stored(server, url) if key.endswith(("model.onnx", "1.0.0"))] == []
        uploads = server.client().list_multipart_uploads(Bucket=url.split("/")[2]).get("Uploads", [])
        assert uploads == []


class TestFaults:
    @pytest.mark.parametrize("number", [1, 6, 9, 12])
    def test_the_nth_request_is_answered_500(self, proxy: Proxy, url: str, release: Path, number: int, tmp_path: Path) -> None:
        proxy.inject(Fault(status=500, first=number))
        assert push(release, url, ["latest"]).made
        pull(url, tmp_path / "out")
        assert [seen.status for seen in proxy.requests].count(500) == 1

    @pytest.mark.parametrize("status", [429, 500])
    def test_a_push_that_is_given_up_is_taken_up_again(
        self, server: S3, proxy: Proxy, url: str, release: Path, status: int
    ) -> None:
        """Objects arrive and the version's pointer does not: nothing resolves, and only the rest is sent later."""
        proxy.inject(Fault(status=status, method="PUT", path="/versions/", times=ALWAYS))
        with pytest.raises(RegistryError) as caught:
            push(release, url)
        one_line(caught, url, str(status), "tried again")
        assert SECRET not in str(caught.value)
        assert proxy.count("PUT", "/versions/") == 1 + len(transfer.DELAYS)
        assert versions(url) == ()
        assert connect(url).resolve("1.0.0") is None
        proxy.heal()
        assert push(release, url).made
        assert proxy.count("PUT", "/objects/") == 2  # the manifest, and once more, which the store must refuse
        assert [version.release for version in versions(url)] == ["1.0.0"]

    def test_what_was_sent_is_not_believed_by_its_name(self, server: S3, proxy: Proxy, url: str, release: Path) -> None:
        proxy.inject(Fault(status=500, method="PUT", path="/versions/", times=ALWAYS))
        with pytest.raises(RegistryError):
            push(release, url)
        proxy.heal()
        key = key_ending(server, url, "onnx/model.onnx")
        server.client().put_object(Bucket=url.split("/")[2], Key=key, Body=b"onnX " * 2000)
        assert push(release, url).made
        assert proxy.count("PUT", "/objects/.*onnx/model.onnx") == 1
        assert proxy.count("PUT", "/objects/") == 3  # and the manifest twice

    @pytest.mark.parametrize("where", ["/objects/.*model.pt", "/versions/", "/aliases/"])
    def test_a_connection_that_is_reset(self, proxy: Proxy, url: str, release: Path, where: str) -> None:
        proxy.inject(Fault(reset=10, method="PUT", path=where, times=2))
        published = push(release, url, ["latest"])
        assert published.made
        assert published.version.aliases == ("latest",)
        assert [seen.status for seen in proxy.requests].count(0) == 2

    def test_an_answer_that_is_lost(self, proxy: Proxy, url: str, release: Path) -> None:
        """The pointer was created and nobody said so: the version is there, and it is ours."""
        proxy.inject(Fault(lost=True, method="PUT", path="/versions/"))
        push(release, url, ["latest"])
        assert [(version.release, version.aliases) for version in versions(url)] == [("1.0.0", ("latest",))]

    @pytest.mark.parametrize("status", [401, 403])
    @pytest.mark.parametrize("method", ["GET", "PUT"])
    def test_refused(self, proxy: Proxy, url: str, release: Path, status: int, method: str) -> None:
        proxy.inject(Fault(status=status, method=method, times=ALWAYS))
        with pytest.raises(RegistryError) as caught:
            push(release, url)
        one_line(caught, url, "refused", "AWS_ACCESS_KEY_ID", "AWS_PROFILE")
        assert SECRET not in str(caught.value)
        assert proxy.count(method) <= FILE_COUNT  # none again: that would not help

    def test_no_credentials(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        with pytest.raises(RegistryError) as caught:
            versions(url)
        one_line(caught, "no credentials", "AWS_ACCESS_KEY_ID")

    def test_connection_refused(self, url: str, release: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        for work in (lambda: push(release, url), lambda: pull(url, tmp_path / "out"), lambda: versions(url)):
            with pytest.raises(RegistryError) as caught:
                work()
            one_line(caught, "tried again", "can be reached")

    def test_no_such_bucket(self, release: Path, tmp_path: Path) -> None:
        url = "s3://missing-bucket/models/tiny"
        for work in (lambda: push(release, url), lambda: pull(url, tmp_path / "out"), lambda: versions(url)):
            with pytest.raises(RegistryError) as caught:
                work()
            one_line(caught, "there is no such bucket; make it")

    @pytest.mark.parametrize("path", ["/versions/", f"/{MANIFEST}", "model.pt"])
    def test_a_download_that_breaks_off_is_tried_again(
        self, proxy: Proxy, url: str, release: Path, tmp_path: Path, path: str
    ) -> None:
        push(release, url)
        proxy.inject(Fault(cut=20, method="GET", path=path, times=2))
        assert pull(f"{url}@1.0.0", tmp_path / "out")[1]
        verify_files(tmp_path / "out", read_release(tmp_path / "out")[0])

    def test_a_download_that_always_breaks_off(self, proxy: Proxy, url: str, release: Path, tmp_path: Path) -> None:
        push(release, url)
        proxy.inject(Fault(cut=20, method="GET", path="model.pt", times=ALWAYS))
        with pytest.raises(RegistryError) as caught:
            pull(f"{url}@1.0.0", tmp_path / "out")
        one_line(caught, "tried again")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["release"]

    def test_a_download_that_is_corrupted(self, proxy: Proxy, url: str, release: Path, tmp_path: Path) -> None:
        push(release, url)
        """The client compares S3's own checksum too, and what may have been damaged on the way is fetched again."""
        proxy.inject(Fault(corrupt=20, method="GET", path="model.pt", times=ALWAYS))
        with pytest.raises(RegistryError) as caught:
            pull(f"{url}@1.0.0", tmp_path / "out")
        one_line(caught, "checksum", "tried again")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["release"]
        proxy.heal()
        proxy.inject(Fault(corrupt=20, method="GET", path="model.pt"))
        assert pull(f"{url}@1.0.0", tmp_path / "out")[1]


class TestDamage:
    @pytest.mark.parametrize(
        ("end", "content", "says"),
        [
            ("onnx/model.onnx", b"onnX " * 2000, "onnx/model.onnx is not what the manifest says"),
            ("onnx/model.onnx", b"onnx " * 2001, "onnx/model.onnx is not what the manifest says"),
            ("onnx/model.onnx", b"onnx " * 1999, "onnx/model.onnx ends after 9995 of 10000 bytes"),
            ("onnx/model.onnx", None, "onnx/model.onnx is missing"),
            (MANIFEST, b"{}", "not a manifest"),
            (MANIFEST, None, "has no manifest.json"),
            ("versions/1.0.0", b"", "the version is damaged"),
            ("versions/1.0.0", b'{"content": "../../x", "digest": "", "release": "1.0.0"}', "the version is damaged"),
            ("versions/1.0.0", b"[" * 5000, "the version is damaged"),
            ("aliases/latest", b"../1.0.0", "names no version"),
            ("aliases/latest", b"3.0.0\n", "latest names 3.0.0, which is not there"),
        ],
    )
    def test_on_the_server(
        self, server: S3, url: str, release: Path, tmp_path: Path, end: str, content: bytes | None, says: str
    ) -> None:
        push(release, url, ["latest"])
        bucket, key = url.split("/")[2], key_ending(server, url, end)
        if content is None:
            server.client().delete_object(Bucket=bucket, Key=key)
        else:
            server.client().put_object(Bucket=bucket, Key=key, Body=content)
        with pytest.raises((RegistryError, ReleaseError)) as caught:
            pull(url, tmp_path / "out")
        one_line(caught, says)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["release"]

    def test_another_version_under_the_name(self, server: S3, url: str, release: Path, tmp_path: Path) -> None:
        """The pointer is replaced by that of another release after it was resolved."""
        push(release, url)
        registry = connect(url)
        version = registry.resolve("1.0.0")
        assert version is not None
        key = key_ending(server, url, "versions/1.0.0")
        pointer = json.loads(server.client().get_object(Bucket=url.split("/")[2], Key=key)["Body"].read())
        pointer["digest"] = "0" * 64
        server.client().put_object(Bucket=url.split("/")[2], Key=key, Body=json.dumps(pointer).encode())
        (tmp_path / "out").mkdir()
        with pytest.raises(RegistryError) as caught:
            registry.pull(version, tmp_path / "out")
        one_line(caught, "changed while it was fetched")


class TestKilled:
    @pytest.mark.parametrize("sent", [2, FILE_COUNT])
    def test_a_push(self, server: S3, proxy: Proxy, url: str, release: Path, sent: int) -> None:
        """kill -9 of who pushes, after some objects: nothing can be seen, and these are not sent again."""
        lines = (
            "from compiler.registries import objects",
            "put, left = objects.Objects._put, [" + str(sent) + "]",
            "def counted(*arguments):",
            "    if not left[0]: die()",
            "    left[0] -= 1",
            "    put(*arguments)",
            "objects.Objects._put, objects.AT_ONCE, objects.canonical = counted, 1, lambda _: die()",
            f"push(Path({str(release)!r}), {url!r})",
        )
        finish(start(*lines), code=-signal.SIGKILL)
        assert versions(url) == ()
        assert sum(not key.endswith(MANIFEST) for key in stored(server, url)) == sent
        proxy.heal()
        assert push(release, url).made
        assert proxy.count("PUT", "/objects/") == FILE_COUNT - sent + 2  # the manifest twice
        assert [version.release for version in versions(url)] == ["1.0.0"]

    @pytest.mark.parametrize("work", ["push", "pull"])
    def test_the_server(self, work: str, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The server is killed while a request is under way, and does not come back."""
        with S3() as mine, Proxy(mine.url) as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
            url = mine.make_bucket("mine")
            if work == "pull":
                push(release, url)
            proxy.heal()
            proxy.inject(Fault(delay=1, method="PUT" if work == "push" else "GET", path="model.pt"))
            killer = threading.Thread(target=self.kill_at, args=(mine, proxy))
            killer.start()
            with pytest.raises(RegistryError) as caught:
                push(release, url) if work == "push" else pull(f"{url}@1.0.0", tmp_path / "out")
            killer.join()
            one_line(caught, url, "tried again")
            assert sorted(path.name for path in tmp_path.iterdir()) == ["release"]
            mine.start()  # as empty as moto starts
            mine.make_bucket("mine")
            assert push(release, url).made
            assert pull(f"{url}@1.0.0", tmp_path / "out")[1]

    @staticmethod
    def kill_at(server: S3, proxy: Proxy) -> None:
        deadline = time.monotonic() + 20
        while proxy.count(path="/objects/") < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        server.kill()


class TestAtOnce:
    def test_pushes(self, server: S3, url: str, release: Path, tmp_path: Path) -> None:
        """Of the same and of other content: one content wins, whole, and those that pushed it all say so."""
        make_release(tmp_path / "other", OTHER)
        paths = (release, tmp_path / "other", release)
        answers = race(tmp_path, *(f"push(Path({str(path)!r}), {url!r})" for path in paths))
        (version,) = versions(url)
        won = [read_release(path)[0].identity == version.digest for path in paths]
        assert [answer == "won" for answer in answers] == won, answers
        assert all("with other content" in answer for answer in answers if answer != "won"), answers
        pull(f"{url}@1.0.0", tmp_path / "out")

    def test_between_the_look_and_the_creation(self, url: str, release: Path, tmp_path: Path) -> None:
        """Another content is published just before ours would be: the store itself refuses ours."""
        other = tmp_path / "other"
        make_release(other, OTHER)
        lines = (
            "from compiler.registries import objects",
            "canonical = objects.canonical",
            "objects.canonical = lambda body: (print('about to', flush=True), input(), canonical(body))[2]",
            f"push(Path({str(release)!r}), {url!r})",
        )
        process = start(*lines, stdin=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == "about to\n"
        assert push(other, url).made
        _, stderr = process.communicate("\n", timeout=60)
        assert "1.0.0 is published already, with other content" in stderr
        assert versions(url)[0].digest == read_release(other)[0].identity

    def test_aliases(self, server: S3, url: str, release: Path, tmp_path: Path) -> None:
        make_release(tmp_path / "next", release="1.1.0")
        push(release, url, ["latest"])
        push(tmp_path / "next", url)
        registry = connect(url)
        both = versions(url)

        def move(number: int) -> None:
            for _ in range(10):
                registry.alias("latest", both[number])

        movers = [threading.Thread(target=move, args=(number,)) for number in (0, 1)]
        for mover in movers:
            mover.start()
        while any(mover.is_alive() for mover in movers):
            found = registry.resolve("latest")
            assert found is not None
            assert found.release in ("1.0.0", "1.1.0")
        for mover in movers:
            mover.join()


class TestOtherStores:
    @pytest.fixture(autouse=True)
    def memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """memory:// stands for stores that we do not have; as one of its own nobody can push to it."""
        monkeypatch.setattr(objects, "ready", lambda url: None)

    def test_any_that_creates(self, release: Path, tmp_path: Path) -> None:
        url = "memory://bucket/tiny"
        assert push(release, url, ["latest"]).made
        assert not push(release, url).made
        make_release(tmp_path / "other", OTHER)
        with pytest.raises(RegistryError):
            push(tmp_path / "other", url)
        assert pull(url, tmp_path / "out")[1]

    @pytest.mark.parametrize(
        ("url", "says"),
        [
            ("foo://bucket/x", "nothing serves foo://"),
            ("s3:///x", "names no bucket"),
            ("s3://bucket/x?versionId=1", "has no ? or #"),
            ("zip://a/b", "fsspec cannot open zip:// by this URL alone"),
            ("ftp://host/x", "fsspec cannot open ftp:// by this URL alone"),
            ("github://o/r", "fsspec cannot open github:// by this URL alone"),
            ("reference://a/b", "fsspec cannot open reference:// by this URL alone"),
            ("jupyter://a/b", "fsspec cannot open jupyter:// by this URL alone"),
        ],
    )
    def test_what_is_no_place(self, url: str, says: str) -> None:
        with pytest.raises(RegistryError) as caught:
            connect(url)
        one_line(caught, says)

    def test_one_that_lacks_a_host_says_so_in_one_line(self) -> None:
        process = start(
            "try: connect('ftp://host/x')", "except CompileError as error: print(error)", "import gc; gc.collect()"
        )
        stdout, stderr = process.communicate(timeout=60)
        assert "fsspec cannot open ftp://" in stdout
        assert stderr == ""

    def test_what_follows_a_question_mark_is_not_repeated(self) -> None:
        with pytest.raises(RegistryError) as caught:
            connect("s3://bucket/x?token=TOPSECRET")
        assert "SECRET" not in str(caught.value)

    @pytest.mark.parametrize("status", [400, 500])
    def test_a_signed_address_is_not_repeated(self, proxy: Proxy, status: int, tmp_path: Path) -> None:
        """A store that redirects to one, as those behind a web server do, and then fails."""
        location = f"{proxy.url.replace('://', '://USERSECRET@')}/blob?X-Amz-Signature=TOPSECRET"
        proxy.inject(Fault(status=302, headers=(("Location", location),), path="/versions/", times=ALWAYS))
        proxy.inject(Fault(status=status, path="/blob", times=ALWAYS))
        proxy.inject(Fault(status=404, times=ALWAYS))
        with pytest.raises(RegistryError) as caught:
            pull(f"{proxy.url}/x@1.0.0", tmp_path / "out")
        message = one_line(caught, str(status), "/blob?…")
        assert "SECRET" not in message

    def test_one_that_creates_an_object_twice(
        self, server: S3, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A store that does not know If-None-Match: nothing is published there."""
        pipe = MemoryFileSystem.pipe_file
        monkeypatch.setattr(MemoryFileSystem, "pipe_file", lambda self, path, value, mode="": pipe(self, path, value))
        url = "memory://careless/tiny"
        with pytest.raises(RegistryError) as caught:
            push(release, url)
        one_line(caught, url, "ignores If-None-Match", "push to a store that refuses it")
        assert versions(url) == ()

    def test_one_that_replaces_the_version_meanwhile(
        self, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What is there after the creation is not ours, although the release is: the push does not say that it sent it."""
        url = "memory://racing/tiny"
        shutil.copytree(release, tmp_path / "signed")
        (tmp_path / "signed/model.sig").write_text("signature\n")
        push(tmp_path / "signed", f"{url}-aside")
        pipe = MemoryFileSystem.pipe_file

        def replaced(self: MemoryFileSystem, path: str, value: bytes, mode: str = "overwrite") -> None:
            pipe(self, path, value, mode)
            if path.endswith("/tiny/versions/1.0.0"):
                pipe(self, path, self.cat_file("/racing/tiny-aside/versions/1.0.0"))

        monkeypatch.setattr(MemoryFileSystem, "pipe_file", replaced)
        assert not push(release, url).made

    def test_a_stray_alias_is_in_the_way_of_nothing_else(self, release: Path, tmp_path: Path) -> None:
        url = "memory://stray/tiny"
        push(release, url, ["latest"])
        MemoryFileSystem().pipe_file("/stray/tiny/aliases/README", b"hello\n")
        MemoryFileSystem().pipe_file("/stray/tiny/aliases/folder/README", b"hello\n")
        assert [version.aliases for version in versions(url)] == [("latest",)]
        assert pull(f"{url}@1.0.0", tmp_path / "out")[1]
        make_release(tmp_path / "next", release="1.1.0")
        assert push(tmp_path / "next", url, ["latest"]).made
        with pytest.raises(RegistryError) as caught:
            pull(f"{url}@README", tmp_path / "none")
        one_line(caught, "alias README", "names no version", "compile alias")
        assert alias(f"{url}@1.0.0", "README")[1]
        assert pull(f"{url}@README", tmp_path / "out") == (read_release(release)[0], False)

    def test_without_its_package(self) -> None:
        line = "sys = __import__('sys'); sys.modules['s3fs'] = None"
        process = start(line, "try: connect('s3://bucket/x')", "except CompileError as error: print(error)")
        (said,) = finish(process)
        assert said.endswith("s3:// needs a package that is not installed: pip install 'aot-model-compiler[s3]'")


def test_a_signed_release(url: str, tmp_path: Path) -> None:
    signed_round_trip(url, tmp_path)
