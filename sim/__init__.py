"""The simulated world: the protocol's own machines under a virtual clock.

driver        one machine in SimPy
hosts, world  owners and workers, and what they share
network       hosts and links; `flows`: their fair shares
device        costs, queues, cores; profiles in profiles/
workload      what a training step costs; from a config by `tracing`, `tally` and `layers`
models        the configs that studies know by name
lanes         real torch code, one lane at a time
faults        what goes wrong, drawn from one seed
trace         spans, timelines, the critical path
calibrate     this machine's profile; by `rehearsal` and `fitting`
"""
