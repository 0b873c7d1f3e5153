"""The simulated world. Its driver arrives with a later version; nothing is simulated yet."""
