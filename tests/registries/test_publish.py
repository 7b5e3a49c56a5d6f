"""`publish:` in pipeline.yaml, and push, pull, list and alias, as users run them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from compiler.config import parse
from compiler.errors import ConfigError, RegistryError, ReleaseError
from compiler.manifest import SIGNATURE, SUMS
from compiler.registries import check_place, connect, ready
from compiler.registries import parse as parse_url
from compiler.registries.filesystem import Folder
from compiler.stages.publish import UNSENT, move, pull, push, send, versions
from compiler.verify import is_signed, read_release, verify_files
from tests.conftest import Command, error_line, write_pipeline
from tests.registries.conftest import FILES, make_release, one_line
from tests.test_plan import changed, planned


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/registry"


def rows(stdout: str) -> dict[str, tuple[str, str]]:
    return {row["step"]: (row["state"], row["why"]) for row in json.loads(stdout)}


class TestBuild:
    def test_it_is_the_last_stage(self, command: Command, tmp_path: Path, bert: Path, url: str) -> None:
        pipeline = write_pipeline(tmp_path, bert, publish=[{"url": url, "aliases": ["latest", "prod"]}])
        step = f"publish {url}"
        before = rows(command("plan", pipeline, "--json").stdout)
        assert list(before)[-1] == step
        assert before[step][0] == "run"
        assert versions(url) == ()
        first = command(pipeline, "--json")
        assert first.returncode == 0, first.stderr
        (version,) = versions(url)
        assert json.loads(first.stdout)[0]["published"] == [
            {
                "url": url,
                "release": "1.0.0",
                "digest": version.digest,
                "made": True,
                "aliases": ["latest", "prod"],
                "moved": ["latest", "prod"],
                "moved_from": {},
                "signed": False,
            }
        ]
        steps = [line.split("  ")[1].strip() for line in first.stderr.splitlines()]
        assert [text.split()[0] for text in steps[-3:]] == ["package", "publish", "alias"], first.stderr
        assert re.search(rf"{step} +published", first.stderr)
        assert re.search(rf"alias {url} +moved .* latest, prod", first.stderr)
        assert command("verify", tmp_path / "registry/1.0.0").returncode == 0
        # The same again sends nothing, and says so.
        again = command(pipeline)
        assert again.returncode == 0
        assert re.search(r"release +unchanged", again.stderr)
        assert re.search(rf"{step} +unchanged", again.stderr)

    def test_another_build_of_the_same_version(self, command: Command, tmp_path: Path, bert: Path, url: str) -> None:
        """With --no-cache too, the release that is there is what is published; other content under its version is refused."""
        pipeline = write_pipeline(tmp_path, bert, publish=[url])
        assert command(pipeline, "--no-publish").returncode == 0
        assert versions(url) == ()
        result = command(pipeline, "--no-cache")
        assert result.returncode == 0, result.stderr
        assert len(versions(url)) == 1
        make_release(tmp_path / "taken/1.0.0")
        write_pipeline(tmp_path, bert, publish=[f"file://{tmp_path}/taken"])
        assert "1.0.0 is published already, with other content" in error_line(command(pipeline))
        assert (tmp_path / "artifacts/tiny/1.0.0").is_dir()

    def test_when_one_model_fails_nothing_goes_out(self, command: Command, tmp_path: Path, bert: Path) -> None:
        pipeline = write_pipeline(tmp_path, bert, publish=[f"file://{tmp_path}/one"])
        document = yaml.safe_load(pipeline.read_text())
        failing = {**document["models"][0], "name": "other", "publish": [f"file://{tmp_path}/two"]}
        failing |= {"targets": {"torchscript": ["bf16"]}, "budget": {"bf16": {"cosine": 1.0}}}
        document["models"].append(failing)
        pipeline.write_text(yaml.safe_dump(document))
        assert "its limit is 1" in error_line(command(pipeline))
        assert (tmp_path / "artifacts/tiny/1.0.0").is_dir()
        assert not (tmp_path / "one").exists()
        assert not (tmp_path / "two").exists()
        blocked = json.loads(command("plan", pipeline, "--json").stdout)
        assert [row["state"] for row in blocked if row["step"].startswith("publish")] == ["run", "blocked"]
        # The model that passes, alone.
        assert command(pipeline, "--only", "tiny").returncode == 0
        assert len(versions(f"file://{tmp_path}/one")) == 1

    def test_a_registry_that_fails(self, command: Command, tmp_path: Path, bert: Path, url: str) -> None:
        """Exit 1; the release stays on disk, what was published before stays published, and the next build goes on."""
        (tmp_path / "file").touch()
        places = [{"url": url, "aliases": ["latest"]}, f"file://{tmp_path}/file"]
        pipeline = write_pipeline(tmp_path, bert, publish=places)
        result = command(pipeline)
        assert f"file://{tmp_path}/file" in error_line(result)
        assert re.search(rf"publish file://{tmp_path}/file +FAILED", result.stderr)
        assert "passed" in result.stdout
        assert [version.aliases for version in versions(url)] == [()]  # none moves before all is published
        answer = json.loads(command(pipeline, "--json").stdout)
        assert f"file://{tmp_path}/file" in answer["error"]
        assert [(one["release"], [done["url"] for done in one["published"]]) for one in answer["releases"]] == [
            ("1.0.0", [url])
        ]
        (tmp_path / "file").unlink()
        # One whose alias cannot be moved: that both have the version, and where an alias was moved, is told all the same.
        (tmp_path / "file/aliases/prod").mkdir(parents=True)
        places[1] = {"url": places[1], "aliases": ["prod"]}
        answer = json.loads(command(write_pipeline(tmp_path, bert, publish=places), "--json").stdout)
        assert "aliases" in answer["error"]
        (release,) = answer["releases"]
        assert [(done["made"], done["moved"]) for done in release["published"]] == [(False, ["latest"]), (True, [])]
        (tmp_path / "file/aliases/prod").rmdir()
        assert command(pipeline).returncode == 0
        assert [version.aliases for version in versions(f"file://{tmp_path}/file")] == [("prod",)]
        assert [version.aliases for version in versions(url)] == [("latest",)]

    def test_an_alias_that_somebody_moved_back(self, command: Command, tmp_path: Path, bert: Path, url: str) -> None:
        """A build that has nothing to do brings it where pipeline.yaml says, and says from where."""
        pipeline = write_pipeline(tmp_path, bert, release="1.1.0", publish=[{"url": url, "aliases": ["latest", "prod"]}])
        make_release(tmp_path / "old")
        push(tmp_path / "old", url, ("stable",))
        assert command(pipeline).returncode == 0
        back = f"{url}@1.0.0"
        assert command("alias", back, "prod").stdout == "prod moved from 1.1.0 to 1.0.0\n"
        again = command(pipeline, "--json")
        assert re.search(rf"alias {url} +moved .* s  prod moved from 1\.0\.0 to 1\.1\.0$", again.stderr, re.MULTILINE)
        (done,) = json.loads(again.stdout)[0]["published"]
        assert (done["moved"], done["moved_from"]) == (["prod"], {"prod": "1.0.0"})
        said = json.loads(command("alias", back, "prod", "--json").stdout)
        assert (said["moved"], said["moved_from"]) == (True, "1.1.0")
        said = json.loads(command("alias", back, "prod", "--json").stdout)
        assert (said["moved"], said["moved_from"]) == (False, None)
        release = tmp_path / "artifacts/tiny/1.1.0"
        pushed = command("push", release, url, "--alias", "prod", "--alias", "new", "--alias", "latest", "--alias", "stable")
        ends = "new moved to it; prod moved from 1.0.0 to 1.1.0; stable moved from 1.0.0 to 1.1.0"
        assert pushed.stdout.splitlines()[0].endswith(f"nothing was sent; {ends}")
        assert command("alias", f"{url}@1.1.0", "prod").stdout == "prod → 1.1.0, as before\n"

    def test_a_signature_made_after_it(self, command: Command, tmp_path: Path, bert: Path, url: str) -> None:
        pipeline = write_pipeline(tmp_path, bert, publish=[url])
        assert command(pipeline).returncode == 0
        (tmp_path / "artifacts/tiny/1.0.0" / SIGNATURE).write_text("signature")
        late = command(pipeline, "--json")
        assert late.returncode == 0, late.stderr
        (done,) = json.loads(late.stdout)[0]["published"]
        assert (done["made"], done["signed"], done["signature_sent"]) == (False, True, False)
        assert re.search(rf"publish {url} +unchanged .* {UNSENT}", late.stderr)

    def test_what_is_missing_is_told_before_the_build(self, command: Command, tmp_path: Path, bert: Path) -> None:
        for place, says in (("s3:///nothing", "names no bucket"), ("local://folder/tiny", "cannot be kept from replacing")):
            pipeline = write_pipeline(tmp_path, bert, publish=[place])
            assert says in error_line(command(pipeline))
        assert not (tmp_path / "artifacts").exists()
        assert command(pipeline, "--no-publish").returncode == 0

    def test_it_is_in_no_cache_key(self, bert: Path) -> None:
        assert (
            changed(planned(bert), planned(bert, publish=["file:///x", {"url": "s3://bucket/x", "aliases": ["a"]}])) == set()
        )


TEXT = """\
schema: 1
models:
  - name: tiny
    release: 1.0.0
    source: path:checkpoint
    targets: {onnx: [fp32]}
    publish:
      - file:///srv/models/tiny
      - url: s3://bucket/tiny
        aliases: [latest, prod]
"""


class TestConfig:
    def test_both_forms(self) -> None:
        one, two = parse(TEXT, "p.yaml").models[0].publish
        assert (one.url, one.aliases) == ("file:///srv/models/tiny", ())
        assert (two.url, two.aliases) == ("s3://bucket/tiny", ("latest", "prod"))

    @pytest.mark.parametrize(
        ("old", "new", "line", "says"),
        [
            ("file:///srv", "srv", 8, "no registry's URL"),
            ("file:///srv", "foo:///srv", 8, "nothing serves foo://"),
            ("s3://bucket/tiny", "s3://key:secret@bucket/tiny", 9, "a password before an '@'"),
            ("s3://bucket/tiny", "s3://key:sec/ret@bucket/tiny", 9, "is no port"),
            ("s3://bucket/tiny", "s3://bucket/tiny@1.0.0", 9, "leave out what follows the '@'"),
            ("[latest, prod]", "[latest, 1.0.0]", 9, "alias '1.0.0'"),
            ("[latest, prod]", "latest", 10, "expected a list"),
            ("aliases:", "alias:", 10, "did you mean 'aliases'?"),
            ("- url: s3://bucket/tiny\n        aliases", "- aliases", 9, "this key is missing"),
            ("file:///srv/models/tiny", "7", 8, "expected"),
        ],
    )
    def test_what_is_wrong_has_its_line(self, old: str, new: str, line: int, says: str) -> None:
        text = TEXT.replace(old, new)
        assert text != TEXT
        with pytest.raises(ConfigError) as caught:
            parse(text, "p.yaml")
        message = str(caught.value)
        assert message.startswith(f"p.yaml:{line}: models.0.publish."), message
        assert says in message
        assert not re.search("sec/?ret", message)

    @pytest.mark.parametrize(
        ("one", "two"),
        [
            ("file:///srv/m", "file://localhost/srv//m/"),
            ("oci://Host.example/m", "oci://host.EXAMPLE/m"),
            ("mlflow://host/m", "mlflow://host/m?pyfunc=true"),
            ("hf://org/m/", "hf://org/m?private=false"),
        ],
    )
    def test_one_place_in_two_spellings(self, one: str, two: str) -> None:
        model: dict[str, Any] = yaml.safe_load(TEXT)["models"][0]
        models = [{**model, "publish": [one]}, {**model, "name": "other", "publish": [two]}]
        with pytest.raises(ConfigError, match="give each a place of its own"):
            parse(yaml.safe_dump({"schema": 1, "models": models}), "p.yaml")
        parse(yaml.safe_dump({"schema": 1, "models": [models[0], {**models[1], "publish": ["file:///srv/M"]}]}), "p.yaml")

    def test_one_place_for_two_models(self) -> None:
        model: dict[str, Any] = yaml.safe_load(TEXT)["models"][0]
        document = {"schema": 1, "models": [model, {**model, "name": "other"}]}
        with pytest.raises(ConfigError) as caught:
            parse(yaml.safe_dump(document), "p.yaml")
        assert "tiny and other publish to file:///srv/models/tiny; give each a place of its own" in str(caught.value)
        parse(yaml.safe_dump({**document, "models": [model, {**model, "release": "1.1.0"}]}), "p.yaml")


class TestVerified:
    """A release that was hashed in this process is sent without hashing it all again; what is free to check is checked."""

    def test_sums_that_are_not_the_manifests(self, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        manifest = make_release(tmp_path / "one")
        sums = tmp_path / "one" / SUMS
        content = sums.read_bytes()
        sums.write_bytes(b"other\n")
        with pytest.raises(ReleaseError, match=f"{SUMS} is changed"):
            push(tmp_path / "one", url, verified=manifest)
        sums.write_bytes(content)

        def meanwhile(*arguments: Any, **options: Any) -> None:
            verify_files(*arguments, **options)
            sums.write_bytes(b"other\n")

        monkeypatch.setattr("compiler.stages.publish.verify_files", meanwhile)
        with pytest.raises(RegistryError, match="changed while it was pushed"):
            push(tmp_path / "one", url, verified=manifest)
        assert versions(url) == ()

    def test_a_file_too_many(self, tmp_path: Path, url: str) -> None:
        manifest = make_release(tmp_path / "one")
        (tmp_path / "one/more").touch()
        with pytest.raises(ReleaseError, match="more is not in the manifest"):
            push(tmp_path / "one", url, verified=manifest)

    def test_a_registry_that_does_not_hash(self, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        manifest = make_release(tmp_path / "one")
        (tmp_path / "one/onnx/model.onnx").write_bytes(b"other")
        monkeypatch.setattr(Folder, "hashes", False)
        with pytest.raises(ReleaseError, match=r"onnx/model\.onnx is changed"):
            push(tmp_path / "one", url, verified=manifest)
        assert versions(url) == ()


def test_an_alias_that_the_registry_does_not_take(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told before anything is sent."""

    def refuse(self: Folder, name: str) -> None:
        raise RegistryError(f"{self.url}: {name} is no alias here")

    monkeypatch.setattr(Folder, "check_alias", refuse, raising=False)
    make_release(tmp_path / "one")
    with pytest.raises(RegistryError, match="main is no alias here"):
        push(tmp_path / "one", url, ("main",))
    assert versions(url) == ()


def test_ready_needs_what_a_push_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    ready("mlflow://host/name")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(RegistryError) as caught:
        ready("mlflow://host/name")
    one_line(caught, "needs mlflow: pip install")
    for url, says in (
        ("local://folder/name", "local:// cannot be kept from replacing"),
        ("memory://a/b", "once this command"),
    ):
        with pytest.raises(RegistryError) as caught:
            ready(url)
        one_line(caught, says)


@pytest.mark.parametrize("url", ["gs://bucket/name", "gcs://bucket/name", "ftp://host/name", "memory://bucket/name"])
def test_where_no_push_can_go_asks_for_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    make_release(tmp_path / "one")
    with pytest.raises(RegistryError) as caught:
        push(tmp_path / "one", url)
    message = one_line(caught, url, "push to file://, s3://")
    assert "package" not in message and "install" not in message


class TestCommands:
    def test_a_signature_made_after_the_push(self, command: Command, tmp_path: Path, url: str) -> None:
        """A published version takes nothing new: whoever signs too late is told so, and what is published has no signature."""
        make_release(tmp_path / "one")
        says = "nothing was sent, not even a signature made since: sign before you push; prod moved to it"
        assert command("push", "one", url).returncode == 0
        (tmp_path / "one" / SIGNATURE).write_text("signature")
        late = command("push", "one", url, "--alias", "prod")
        assert late.returncode == 0, late.stderr
        assert late.stdout.splitlines()[0].endswith(says)
        pull(f"{url}@prod", tmp_path / "back")
        assert not is_signed(tmp_path / "back")

    def test_latest_does_not_go_back(self, command: Command, tmp_path: Path, url: str) -> None:
        """Neither by a push nor by publish:, and nothing is sent then; `compile alias` moves it where it is told to."""
        make_release(tmp_path / "new", release="1.10.0")
        make_release(tmp_path / "old", release="1.9.0")
        push(tmp_path / "new", url, ("latest",))
        line = error_line(command("push", "old", url, "--alias", "latest"))
        assert "latest names 1.10.0, which is newer than 1.9.0" in line
        assert [version.release for version in versions(url)] == ["1.10.0"]
        sent = send(tmp_path / "old", url)
        with pytest.raises(RegistryError, match="is newer than"):  # pushed by somebody between the two
            move(sent, ("prod", "latest"))
        assert [version.aliases for version in versions(url)] == [(), ("latest",)]
        push(tmp_path / "old", url, ("prod",))
        assert command("alias", f"{url}@1.9.0", "latest").returncode == 0
        assert [version.aliases for version in versions(url)] == [("latest", "prod"), ()]

    @pytest.mark.parametrize("damage", ["folder", "link"])
    def test_a_signature_that_is_no_file(self, command: Command, tmp_path: Path, url: str, damage: str) -> None:
        make_release(tmp_path / "one")
        signature = tmp_path / "one" / SIGNATURE
        signature.mkdir() if damage == "folder" else signature.symlink_to("nowhere")
        assert f"{SIGNATURE} is " in error_line(command("push", "one", url))
        assert versions(url) == ()

    def test_a_signature_that_is_pushed(self, command: Command, tmp_path: Path, url: str) -> None:
        make_release(tmp_path / "one")
        (tmp_path / "one" / SIGNATURE).write_text("signature")
        assert command("push", "one", url).stdout.splitlines()[0].endswith("published")
        pull(f"{url}@1.0.0", tmp_path / "back")
        assert (tmp_path / "back" / SIGNATURE).read_text() == "signature"

    def test_a_session(self, command: Command, tmp_path: Path, url: str) -> None:
        manifest = make_release(tmp_path / "one")
        make_release(tmp_path / "two", release="1.1.0")
        first = command("push", "one", url, "--alias", "latest")
        assert first.returncode == 0, first.stderr
        assert first.stdout == f"tiny 1.0.0  {url}@1.0.0  published; latest moved to it\nsha256:{manifest.identity}\n"
        assert re.search(r"publish .* published", first.stderr)
        again = command("push", "one", url)
        assert again.returncode == 0
        assert again.stdout.splitlines()[0].endswith("is there already, the same; nothing was sent")
        second = json.loads(command("push", "two", url, "--json").stdout)
        assert (second["release"], second["made"], second["moved"]) == ("1.1.0", True, [])
        listed = command("list", url)
        assert listed.stdout.splitlines()[0] == f"1.0.0  sha256:{manifest.identity}  latest"
        assert [entry["aliases"] for entry in json.loads(command("list", url, "--json").stdout)] == [["latest"], []]
        assert command("alias", f"{url}@1.1.0", "latest").stdout == "latest moved from 1.0.0 to 1.1.0\n"
        assert json.loads(command("alias", f"{url}@1.1.0", "latest", "--json").stdout)["moved"] is False
        pulled = command("pull", url, "out")
        assert pulled.returncode == 0, pulled.stderr
        assert "5 files are what the manifest says" in pulled.stdout
        assert read_release(tmp_path / "out")[0].release == "1.1.0"
        there = json.loads(command("pull", f"{url}@latest", "out", "--json").stdout)
        assert (there["release"], there["made"], there["files"]) == ("1.1.0", False, 5)
        assert command("verify", "out").returncode == 0

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["push", "missing", "{url}"], "no such release"),
            (["push", "one", "{url}@latest"], "leave out what follows the '@'"),
            (["push", "one", "{url}", "--alias", "2.0.0"], "alias '2.0.0'"),
            (["push", "one", "nowhere"], "no registry's URL"),
            (["push", "one", "s3://key:secret@bucket/x"], "a password before an '@'"),
            (["push", "one", "s3://key:sec/ret@bucket/x"], "is no port"),
            (["pull", "{url}@3.0.0", "out"], "has no 3.0.0; it has 1.0.0, and the aliases prod, stable"),
            (["list", "s3://"], "error: s3://: names no bucket"),
            (["pull", "{url}@-", "out"], "is no version (1.0.0), alias (prod) or digest"),
            (["list", "{url}@1.0.0"], "leave out what follows the '@'"),
            (["alias", "{url}", "prod"], "names no version; say which"),
            (["alias", "{url}@3.0.0", "prod"], "has no 3.0.0"),
            (["alias", "{url}@1.0.0", "1.0.0"], "alias '1.0.0'"),
        ],
    )
    def test_what_is_wrong_is_one_line(
        self, command: Command, tmp_path: Path, url: str, arguments: list[str], says: str
    ) -> None:
        make_release(tmp_path / "one")
        push(tmp_path / "one", url, ("stable", "prod"))
        result = command(*(argument.replace("{url}", url) for argument in arguments))
        assert says in error_line(result)
        assert not re.search("sec/?ret", result.stdout + result.stderr)
        assert len(versions(url)) == 1
        assert not (tmp_path / "out").exists()

    def test_other_content_as_json(self, command: Command, tmp_path: Path, url: str) -> None:
        make_release(tmp_path / "one")
        make_release(tmp_path / "two", {**FILES, "config.json": b"{}"})
        push(tmp_path / "one", url)
        result = command("push", "two", url, "--json")
        assert json.loads(result.stdout)["kind"] == "RegistryError"
        assert "FAILED" in result.stderr

    def test_an_empty_place(self, command: Command, url: str) -> None:
        result = command("list", url)
        assert (result.returncode, result.stdout) == (0, "")
        assert "nothing is published there" in result.stderr

    def test_no_heavy_import(self, command: Command, tmp_path: Path, url: str) -> None:
        """Pushing to a folder loads neither torch nor fsspec."""
        make_release(tmp_path / "one")
        script = (
            "import sys; from compiler.cli import cli; "
            f"cli.main(['push', {str(tmp_path / 'one')!r}, {url!r}], standalone_mode=False); "
            "assert not {'torch', 'transformers', 'onnxruntime', 'openvino', 'fsspec', 'botocore'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("url", "place", "reference"),
    [
        ("file:///a/b", "file:///a/b", "latest"),
        ("file:///a/b@1.0.0-rc.1", "file:///a/b", "1.0.0-rc.1"),
        ("file:///a@b/c@prod", "file:///a@b/c", "prod"),
        ("oci://host:5000/a/b@prod", "oci://host:5000/a/b", "prod"),
        (f"s3://bucket@sha256:{'0' * 64}", "s3://bucket", f"sha256:{'0' * 64}"),
        (f"s3://bucket@sha256:{'a' * 64}", "s3://bucket", f"sha256:{'a' * 64}"),
        ("s3://bucket@1.0.0", "s3://bucket", "1.0.0"),
        ("mlflow://host/name?pyfunc=true@prod", "mlflow://host/name?pyfunc=true", "prod"),
    ],
)
def test_references(url: str, place: str, reference: str) -> None:
    assert parse_url(url) == (place, reference)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("oci://SECRET@registry.example/x/y", "before an '@'"),
        ("oci://SECRET@registry.example", "before an '@'"),
        ("mlflow://SECRET@host/x", "before an '@'"),
        ("hf://SECRET@org", "before an '@'"),
        ("hf://SECRET@org/name", "before an '@'"),
        ("gs://SECRET@bucket", "before an '@'"),
        ("s3://me:SECRET@bucket/x", "before an '@'"),
        ("s3://me:12/SECRET@bucket/x", "before an '@'"),
        ("s3://me:SECRET/x@bucket/x", "is no port"),
        ("s3://me:SECRET?x@bucket/x", "is no port"),
        ("gs://b/x?sig=SECRET", "has no ? or #"),
        ("gs://b/x#SECRET", "has no ? or #"),
        ("mlflow://h/x?token=SECRET", "pyfunc=true"),
        ("mlflow://h/x?pyfunc=SECRET", "pyfunc=true"),
        ("hf://org/name?token=SECRET", "private=true"),
        ("SECRET@host/x", "no registry's URL"),
        ("file:///a%00SECRET", "a control character"),
        ("mlflow:///tmp/%00/SECRET", "a control character"),
    ],
)
def test_a_secret_is_not_repeated(url: str, says: str) -> None:
    for use in (connect, parse_url, check_place):
        with pytest.raises(RegistryError) as caught:
            use(url)
        assert "SECRET" not in one_line(caught, says)
