"""`nanovllm keygen`: makes the keys of a pipeline and of its clients."""

from __future__ import annotations

from pathlib import Path

import click

from nanovllm.client.terminal import told_in_one_line
from nanovllm.keys import make_keys


@click.command(
    help="""Make the keys of a pipeline in DIRECTORY, or with --client a key for one more client.

    A pipeline that is launched with --keys DIRECTORY takes only clients and services that have a
    key. Files are private, and none is printed or overwritten.

    A client carries clients/NAME.key away, and names the file with --keys or NANOVLLM_KEYS. To take
    its key back, remove clients/NAME.pub: the pipeline notices without a restart. A machine that
    joins the pipeline needs services.key.

    \b
    Examples:
      nanovllm keygen keys --client alice
      nanovllm-launch --keys keys --ingress 'tcp://*:5555'
      nanovllm generate "Once" --endpoint tcp://HOST:5555 --keys alice.key
      rm keys/clients/alice.pub
    """,
    short_help="Make the keys of a pipeline, or of a client.",
)
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.option("--client", metavar="NAME", help="Whom the new key is for.")
def keygen(directory: Path, client: str | None) -> None:
    with told_in_one_line():
        made = make_keys(directory, client)
    for file in made:
        click.echo(f"made {file}")
    if not made:
        click.echo(f"{directory} has its keys; --client NAME makes one for a client")
