"""The pure middle: messages, events, effects, and the owner's and worker's state machines.

Events in, effects out. No sockets, no threads, no clock, no torch, no randomness: whoever
drives a machine supplies all of these, and the machine cannot tell the real world from the
simulated one. A test holds this package to importing nothing beyond a few pure modules.
"""
