"""``shardlab doctor``: what runs where on this machine, and what to mend."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console

    from shardlab.cli.findings import Finding

_MARKS = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "broken": "[bold red]broken[/]"}


@click.command()
def doctor() -> int:
    """Report faces of ops, torch, CUDA, fbgemm and the machine.

    Ends with exit code 1 only where something that training needs is broken.
    """
    from rich.console import Console

    from shardlab.cli.findings import machine, native_library, torch_and_devices, transport

    findings = [*machine(), *torch_and_devices()]
    if not _broken(findings, "torch"):
        findings += [native_library(), transport(), _fbgemm()]
    console = Console()
    _print_findings(console, findings)
    if not _broken(findings, "torch", "native library"):
        _print_faces(console)
    return int(any(finding.state == "broken" for finding in findings))


def _broken(findings: list[Finding], *subjects: str) -> bool:
    return any(finding.state == "broken" for finding in findings if finding.subject in subjects)


def _fbgemm() -> Finding:
    import torch

    from shardlab.cli.fbgemm import check_fbgemm

    return check_fbgemm(torch.__version__, torch.version.cuda)


def _print_findings(console: Console, findings: list[Finding]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="installation and machine", title_justify="left", show_header=False)
    for finding in findings:
        text = escape(finding.text) + (f"\n-> {escape(finding.advice)}" if finding.advice else "")
        table.add_row(finding.subject, _MARKS[finding.state], text)
    console.print(table)


def _print_faces(console: Console) -> None:
    from rich.table import Table

    from shardlab.ops.registry import describe_faces

    table = Table("op", "face", "why", title="faces of ops", title_justify="left")
    for row in describe_faces():
        table.add_row(*row)
    console.print(table)
