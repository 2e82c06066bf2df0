"""The ServerApp: waits for the clients, and prunes the model with what they send."""

from __future__ import annotations

import logging

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from rich.console import Console

from fedspa.flower import record
from fedspa.flower.courier import Courier
from fedspa.flower.exchange import Exchange
from fedspa.flower.mailbox import Mailbox
from fedspa.flower.roster import Roster
from fedspa.flower.run_config import Network, read_run_config
from fedspa.flower.site import open_checkpoint
from fedspa.machine import give_back_freed_memory
from fedspa.output import check_output
from fedspa.ranks import alone
from fedspa.report import Report, client_table
from fedspa.run import Surroundings
from fedspa.settings import Settings
from fedspa.streaming.federation import federate_streamed
from fedspa.streaming.fingerprint import model_digest
from fedspa.streaming.folder import folders_of

log = logging.getLogger("flwr")
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Prune a model over the clients that are connected (`fedspa.flower.run_config`)."""
    give_back_freed_memory()
    try:
        settings, network = read_run_config(context.run_config)
        report = serve(grid, settings, network)
    except (ValueError, RuntimeError, OSError) as error:
        # Flower shows a traceback, of which this is the line to read.
        log.error("fedspa: %s", error)
        raise
    # A client's name is its own: what it calls itself is no markup.
    console = Console(width=100, markup=False, highlight=False)
    console.print(client_table(report.clients))
    console.print(f"the pruned model is in {network.out}", soft_wrap=True)
    left_out = [(b.round, b.block, n, why) for b in report.blocks for n, why in b.left_out.items()]
    for round_index, block, name, why in left_out:
        console.print(f"round {round_index}, block {block}: without {name!r}: {why}")


def serve(grid: Grid, settings: Settings, network: Network) -> Report:
    """Wait for the clients, let the rounds happen, and write the pruned checkpoint.

    Raises ValueError for what the caller can mend, and RuntimeError where too few clients answer;
    the same run then goes on after the last finished block.
    """
    check_output(network.out, source=network.model)
    source = open_checkpoint(network.model, network, network.device)
    model = model_digest(source)
    state = folders_of(network.out).state
    run, known = ("", []) if network.restart else record.interrupted(state)
    around = Surroundings(device=network.device, dtype=network.dtype, restart=network.restart)
    with Mailbox(grid, network.deadline) as mailbox:
        roster = Roster(grid, mailbox, network, settings, model, run, known)
        roster.join()
        courier = Courier(grid, mailbox, roster, network)
        far = Exchange(roster, courier, network, model)
        return federate_streamed(source, [], settings, network.out, around, alone(), remote=far)
