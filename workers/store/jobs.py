"""`JobStore`: every job, from submission to delivery.

Its parts, each with the statements it needs:

admission   writing jobs, each once                     `Admissions`
claims      leases: taking, keeping, giving back        `Claims`
outcomes    one transaction at the end, publication     `Outcomes`
outbox      what recovery has to send or end            `Outbox`
steering    cancelling, running once more               `Steering`
inventory   reading                                     `Inventory`
batches     a file's worth of jobs                      `Batches`
broker      what was lost when Redis lost its data      `Broker`
"""

from __future__ import annotations

from workers.store.admission import Admissions
from workers.store.batches import Batches
from workers.store.broker import Broker
from workers.store.claims import Claims
from workers.store.inventory import Inventory
from workers.store.outbox import Outbox
from workers.store.outcomes import Outcomes
from workers.store.steering import Steering


class JobStore(Admissions, Claims, Outcomes, Outbox, Steering, Inventory, Batches, Broker):
    """Jobs in Postgres.

    Each call is one statement, or one transaction; none keeps a connection beyond its return.

    Args:
        database: Where they live. The caller closes it.
    """
