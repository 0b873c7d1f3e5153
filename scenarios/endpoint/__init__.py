"""An endpoint on this machine that speaks the API of Tinker's client, and trains privately.

proto     the client's binary messages, written and read
fields    a JSON request's fields, each within bounds
requests  what a request may say, checked before anything is computed
learner   LoRA adapters of several training clients over one model, and their steps
sampler   completions, in as many passes as were asked for
futures   the queue of work, and results
states    what is saved, and found again
service   sessions, training clients, samplers: the routes
server    HTTP on loopback: who may ask, and how much
"""
