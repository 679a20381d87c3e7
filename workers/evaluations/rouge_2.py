"""ROUGE-2: pairs of words that answer and reference share."""

from __future__ import annotations

from workers.evaluations._rouge import NgramRouge


class Rouge2(NgramRouge):
    name = "rouge_2"
    label = "ROUGE-2"
    help = (
        "F1 over the pairs of neighbouring words that the generated answer and the reference share, averaged over rows "
        "(Lin 2004)."
    )
    order = 2


PLUGIN = Rouge2()
