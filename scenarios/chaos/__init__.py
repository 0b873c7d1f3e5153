"""Real training while everything goes wrong: `python -m scenarios.chaos --help`.

options   what a seed draws          world     one run: owner, workers, faulty wire, trainer
model     what is trained            worker    a worker of that world
checks    the promises, watched      arithmetic  products and secrets, watched
log       the event log              search    many seeds on all cores
planted   known defects, looked for
mutants   changes made by machine, looked for (mutation makes them, nursery runs the tests,
          equivalent lists those that change nothing promised)
"""
