"""Replay of recorded answers through the code that selects and learns: ``replay_routing``."""
