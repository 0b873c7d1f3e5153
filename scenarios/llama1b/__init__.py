"""Fine-tune a model of the Llama-3.2-1B shape privately, for real or simulated."""
