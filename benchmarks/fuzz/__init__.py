"""Hostile input: on the decoder and both machines in this process, and on a worker that listens.

crash   a process ends, a machine raises anything, the decoder raises anything but ProtocolError or
        takes what `encode` could not have made, or a stack trace is in the worker's log
hang    a good owner beside the attack does not get its answer, the right one, within the bound
memory  the worker's resident memory grows by more than follows from its limits (`live.Bound`)
"""
