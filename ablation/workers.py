"""Who runs the cells of an experiment, if other processes do: one a device, or the tasks of a Ray cluster.

The experiment that started them shows their lines, runs what they left, and writes the results.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ablation.actions import Actions
from ablation.cells import Cell
from ablation.command_line import find_device
from ablation.device_processes import run_on_devices
from ablation.distributed import failures_reported
from ablation.fields import InputError
from ablation.ray_tasks import connect, gpus_of_task, run_on_ray
from checkpointing import read_events

if TYPE_CHECKING:
    from ablation.context import Context, Ledger
    from ablation.settings import Settings


def run_by_workers(context: Context, ledger: Ledger) -> list[Cell]:
    """Run the missing cells by other processes, and add the failures that they met to the ledger.

    Returns the cells that they left.
    """
    store = context.store
    before = len(read_events(store.folder / "events.jsonl"))
    if ledger.missing:
        run = run_on_ray if context.actions.ray else run_on_devices
        with context.clock("training"):
            run(context, ledger.missing)
    ledger.failures |= failures_reported(store, ledger.missing, before)
    unfinished = [c for c in ledger.missing if store.state(c.name, ledger.inputs[c]).kind != "done"]
    return [cell for cell in unfinished if cell not in ledger.failures]


def kind_of_workers(settings: Settings, actions: Actions) -> str:
    """The kind of device that the workers train on: "cuda" or "cpu".

    Raises InputError for devices that are not there or of both kinds, and for a cluster that is not there.
    """
    if actions.ray:
        connect(actions.ray)
        return "cuda" if gpus_of_task(settings) else "cpu"
    kinds = {find_device(device).split(":")[0] for device in actions.devices}
    if len(kinds) > 1:
        raise InputError(
            "--devices are of both kinds: a CPU and a GPU train in different ways, so give one kind"
        )
    return kinds.pop()
