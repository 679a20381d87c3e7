"""Layers of PEFT methods whose mathematics outgrows their plug-in file. Heavy: imports torch."""
