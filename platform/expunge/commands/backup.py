"""`expunge backup`, `expunge restore`: the request store, the sealed images, and their key if a passphrase seals it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expunge.commands.common import AsJson, open_settings, print_json
from expunge.errors import InputError

if TYPE_CHECKING:
    from expunge.requests.manifest import Manifest

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder of the backup.")]
KeyIncluded = Annotated[
    Path | None,
    typer.Option(
        "--passphrase-file", metavar="FILE", help="Include the sealing key, encrypted with the first line of FILE."
    ),
]
KeyDecrypted = Annotated[
    Path | None,
    typer.Option(
        "--passphrase-file",
        metavar="FILE",
        help="Restore the sealing key, too; the first line of FILE is the passphrase that it was encrypted with.",
    ),
]
AllowDamaged = Annotated[
    bool, typer.Option("--allow-damaged", help="Back up even if blobs do not open or requests lack pictures.")
]
Unverified = Annotated[
    bool,
    typer.Option("--unverified", help="Restore even without a key to check it with, or if an earlier version made it."),
]


def backup(
    folder: Folder,
    passphrase_file: KeyIncluded = None,
    allow_damaged: AllowDamaged = False,
    as_json: AsJson = False,
) -> None:
    """Back up requests and sealed images to a new FOLDER. MLflow and the config file are not included."""
    from expunge.requests.backup import back_up

    manifest = back_up(open_settings(), folder, _passphrase(passphrase_file), allow_damaged=allow_damaged)
    key = (
        "with the key, sealed"
        if manifest.key
        else "WITHOUT the key: keep a copy of blob.key or EXPUNGE_BLOB_KEY elsewhere"
    )
    _say(folder, manifest, key, as_json)


def restore(
    folder: Folder, passphrase_file: KeyDecrypted = None, unverified: Unverified = False, as_json: AsJson = False
) -> None:
    """Check FOLDER, then restore it into EXPUNGE_HOME, which must be empty but for blob.key and config.toml."""
    from expunge.requests.restore import restore as bring_back

    settings = open_settings()
    manifest = bring_back(settings, folder, _passphrase(passphrase_file), unverified=unverified)
    at_hand = settings.blob_key or (settings.home / "blob.key").exists()
    key = "the key opens them" if at_hand else "no key yet: copy it to blob.key in the home, or set EXPUNGE_BLOB_KEY"
    _say(settings.home, manifest, key, as_json)


def _say(where: Path, manifest: "Manifest", key: str, as_json: bool) -> None:
    if as_json:
        print_json({"path": str(where), **manifest.model_dump(mode="json", exclude={"files", "signature"})})
        return
    typer.echo(f"{where}: {manifest.requests} requests, {manifest.blobs} sealed blobs, {key}")
    if manifest.damaged:
        typer.echo(f"DAMAGED: {len(manifest.damaged)} blobs do not open: {', '.join(manifest.damaged)}")
    if manifest.lacking:
        typer.echo(
            f"DAMAGED: {len(manifest.lacking)} requests lack pictures: {', '.join(manifest.lacking)}; "
            "submit these again, unchanged"
        )


def _passphrase(file: Path | None) -> str | None:
    """Read the passphrase from a file: arguments and variables show up in the list of processes."""
    if file is None:
        return None
    try:
        return file.read_text("utf-8").splitlines()[0]
    except (OSError, UnicodeDecodeError, IndexError) as error:
        reason = getattr(error, "strerror", None) or "it is empty or not text"
        raise InputError(f"passphrase-file: {file} cannot be read ({reason})", hint="write one line to it") from None
