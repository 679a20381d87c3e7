"""Splits: which rows of a dataset version are trained on, chosen on (validation) and scored (test), frozen in a file.

asked.py      what a person asks for
rows.py       what of each usable row decides where it goes, read from the dataset's file
together.py   which rows stay together: groups, equal rows, near duplicates
dividing.py   the parts, by count or share, in every stratum alike
columns.py    the parts that a column of the file names
making.py     all of it in a process of its own
frozen.py     the file that is made, and what a trainer reads
"""
