"""Names of the parts of a training step, the same where it is predicted and where it is measured.

    ids        de-duplicate ids and send them to the owners of their rows
    prefetch   caches fetch the rows that they lack
    read       owners read rows
    rows       rows travel
    pool       sources expand and pool rows, and undo that for gradients
    grads      gradients travel
    update     owners merge gradients and step rows
    dense      the dense model, its loss and its optimiser
    overhead   bookkeeping: Python, launches, metrics
"""

PHASES = ("ids", "prefetch", "read", "rows", "pool", "grads", "update", "dense", "overhead")

#: Phases in which ranks talk.
EXCHANGE_PHASES = ("ids", "rows", "grads")
#: Waiting for the next batch; measured, never predicted.
WAIT = "wait"
MEASURED_PHASES = (*PHASES, WAIT)
