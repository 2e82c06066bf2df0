"""The command: one case after the other, each stored when it is done."""

from importlib import metadata
from pathlib import Path

import click

from bench import results
from bench.network.cases import GROUPS, choose

# What must be the same before results are added to a file; commits are the results' own.
SAME = ("kind", "device", "machine", "versions")


@click.command("network")
@click.option("--group", default=",".join(GROUPS), help="Groups of cases, by comma.")
@click.option("--case", "name", default="", help="Only cases whose name has this in it.")
@click.option("--out", type=click.Path(path_type=Path), default="build/bench/network.json")
@click.option("--again", is_flag=True, help="Measure again what the file has.")
def command(group: str, name: str, out: Path, again: bool) -> None:
    """Measure federations over a network on loopback, against the same in one process.

    Every case is stored at once, and one that the file already has is left as it is. All parties
    share this machine's cores; those of Flower and of fedspa have one thread each.
    """
    chosen = choose(group.split(","), name)
    # Imported here, since it needs Flower, and `python -m bench --help` does not.
    from bench.network.measure import measure

    document = results.new("network", "cpu", [], {})
    document["versions"]["flwr"] = metadata.version("flwr")
    if out.exists():
        stored = results.read(out)
        for key in SAME:
            if stored[key] != document[key]:
                raise ValueError(
                    f"{out} has {key} {stored[key]}, and this run has {document[key]}; remove the "
                    f"file or choose another with --out"
                )
        document = {**document, "results": stored["results"]}
    for case in chosen:
        key = (case.group, case.name)
        there = [one for one in document["results"] if (one["group"], one["case"]) == key]
        if there and not again:
            click.echo(f"{case.group}, {case.name}: {out} has it already")
            continue
        found = measure(case)
        document["results"] = [one for one in document["results"] if one not in there] + [found]
        results.write(out, document)
        far, near = found["far"], found["near"]
        click.echo(
            f"{case.group}, {case.name}: {far['seconds']:.1f} s, in one process "
            f"{near['seconds']:.1f} s; {far['phases']}; {far['stages']}"
        )
