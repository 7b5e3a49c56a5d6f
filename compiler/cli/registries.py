"""Commands over registries: push, pull, list, alias."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from compiler.cli.options import json_option
from compiler.cli.output import lines, print_json, published_json


@click.command(short_help="Publish a release to a registry.")
@click.argument("release", type=click.Path(path_type=Path))
@click.argument("url")
@click.option("--alias", "aliases", multiple=True, metavar="NAME", help="Move this alias to it; may be given again.")
@json_option
def push(release: Path, url: str, aliases: tuple[str, ...], as_json: bool) -> None:
    """Publish RELEASE at URL (file://, s3://, oci://, mlflow:// or hf://) under its version, which never changes there."""
    from compiler.progress import Display
    from compiler.stages.publish import UNSENT, move_aliases, publish
    from compiler.verify import read_release

    manifest, _ = read_release(release)
    with Display() as display:
        published = publish(release, url, aliases, display.tell, manifest)
        published = move_aliases(published, aliases, display.tell, manifest)
    if as_json:
        print_json(published_json(published))
        return
    version = published.version
    there = UNSENT if published.unsent else "nothing was sent"
    what = "published" if published.made else f"is there already, the same; {there}"
    said = "; ".join((what, *([f"{published.new} moved to it"] if published.new else []), *published.taken))
    click.echo(f"{manifest.name} {version.release}  {url}@{version.release}  {said}")
    click.echo(f"sha256:{version.digest}")


@click.command(short_help="Fetch a release from a registry.")
@click.argument("url", metavar="URL[@REF]")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@json_option
def pull(url: str, folder: Path, as_json: bool) -> None:
    """Fetch the release that REF names (a version, an alias or sha256:DIGEST; `latest` when left out) into DIR, which appears
    whole and verified."""
    from compiler import registries
    from compiler.progress import status
    from compiler.stages.publish import pull as run
    from compiler.store import check_can_appear

    registries.parse(url)  # before it is shown: one that holds a login is refused, and not repeated
    if not folder.is_dir() or not any(folder.iterdir()):  # or else it may be the release already
        check_can_appear(folder)
    with status() as tell:
        tell(f"fetching {url}")
        manifest, made = run(url, folder)
    if as_json:
        print_json(
            {
                "url": url,
                "name": manifest.name,
                "release": manifest.release,
                "digest": manifest.identity,
                "path": str(folder),
                "files": len(manifest.every_file),
                "made": made,
            }
        )
        return
    what = "files are what the manifest says" if made else "files are there already, and are what the manifest says"
    click.echo(f"{manifest.name} {manifest.release}  {folder}  {len(manifest.every_file)} {what}")
    click.echo(f"sha256:{manifest.identity}")


@click.command("list", short_help="List a registry's versions and aliases.")
@click.argument("url")
@json_option
def list_versions(url: str, as_json: bool) -> None:
    """List the versions that are published at URL, oldest first, with the aliases that name them now."""
    from compiler.stages.publish import versions

    found = versions(url)
    if as_json:
        print_json([asdict(version) for version in found])
        return
    if not found:
        click.echo(f"{url}: nothing is published there", err=True)
        return
    click.echo(lines([(version.release, f"sha256:{version.digest}", ", ".join(version.aliases)) for version in found]))


@click.command(short_help="Move an alias in a registry.")
@click.argument("url", metavar="URL@REF")
@click.argument("name")
@json_option
def alias(url: str, name: str, as_json: bool) -> None:
    """Make NAME (such as prod) name the version that REF names, in one step."""
    from compiler.stages.publish import alias as run
    from compiler.stages.publish import moved_from

    version, moved, before = run(url, name)
    if as_json:
        print_json({"alias": name, "moved": moved, "moved_from": before if moved else None, **asdict(version)})
    elif moved and before is not None:
        click.echo(moved_from(name, before, version.release))
    else:
        click.echo(f"{name} → {version.release}" + ("" if moved else ", as before"))
