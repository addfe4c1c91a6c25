"""The jobs that a kernel or a verb runs: train, evaluate, predict, demo, and the facts about where they ran."""
