"""Real processes that really die: `python -m scenarios.chaos --processes --help`.

A black box: nothing in here watches the product from inside, and nothing is shared with the
simulated chaos. What is attacked and what attacks are two groups of files:

owner         a small private training, as a command        zygote    starts processes quickly
private_half  the quickstart's private half, as a command   line      a TCP line: cut, healed, read
plan          the faults of a seed                          wire      what passed, read anew
campaign      many kills                                    disk      what lies in a run's directory
training      one training under attack                     verdict   lost, doubled, reused: judged
quickstart    the quickstart under attack
"""
