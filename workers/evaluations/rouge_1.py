"""ROUGE-1: words that answer and reference share."""

from __future__ import annotations

from workers.evaluations._rouge import NgramRouge


class Rouge1(NgramRouge):
    name = "rouge_1"
    label = "ROUGE-1"
    help = "F1 over the words that the generated answer and the reference share, averaged over rows (Lin 2004)."
    order = 1


PLUGIN = Rouge1()
