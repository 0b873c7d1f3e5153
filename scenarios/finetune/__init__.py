"""Private fine-tuning of one's own model on one's own text: `python -m scenarios.finetune`.

options  what it can be asked, on the command line or in a file of YAML (`config`)
setting  model, text and training, all looked at
run      the run itself, in order
cost     what it will take, said before it starts
held     the held-out loss of a run through all its interruptions, and prompts for samples
"""
